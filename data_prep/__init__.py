"""Raw corpora -> tokenizer -> packed WebDataset shards with a manifest; verify, inspect, baselines.

``data_prep.shards`` owns the format and is the only module that the trainer imports.
"""
