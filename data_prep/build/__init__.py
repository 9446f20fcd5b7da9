"""Corpus to shards: scan, plan, encode, pack, report."""
