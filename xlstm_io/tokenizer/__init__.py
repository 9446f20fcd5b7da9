"""Tokenizers: opening one, and encoding texts with it."""
