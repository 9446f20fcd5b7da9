"""Checkpoints made from checkpoints: a copy, one without the optimizer, an average, a branch."""
