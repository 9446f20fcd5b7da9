"""Synthetic tasks as corpora: samples are generated, and become shards with labels."""
