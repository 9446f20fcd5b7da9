"""Comparing an export with the checkpoint that it was made from."""
