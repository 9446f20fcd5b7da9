"""Which layout of a run fits a number of GPUs, and how fast it can be at best."""
