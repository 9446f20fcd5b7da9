"""Preparation of corpora: speed and memory beside peers, plans of many documents, generators.

`python -m benchmarks.data_prep` compares with the peers.
"""
