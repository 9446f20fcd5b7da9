"""Commands of `python -m pretrain` other than training itself."""
