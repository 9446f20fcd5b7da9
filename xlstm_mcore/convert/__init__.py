"""Conversion of checkpoints to Hugging Face's `xlstm` format, and checking the result.

The only package of the project that imports transformers.
"""
