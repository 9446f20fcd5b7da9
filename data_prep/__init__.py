"""Raw corpora -> tokenizer -> packed WebDataset shards with a manifest; verify, inspect, baselines.

`xlstm_io.shards` owns the format, which is all that the trainer knows of this package.
"""
