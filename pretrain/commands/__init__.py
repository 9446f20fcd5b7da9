"""Commands of `python -m pretrain`: before a run, the run itself, and after it."""
