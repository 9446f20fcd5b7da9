"""Conversion of checkpoints to and from the formats of others, and the proof that it is exact.

The only package of the project that imports transformers.
"""
