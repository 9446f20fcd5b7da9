"""`python -m experiments`: the same as the console script `xlstm-experiments`."""

from experiments.cli import main

main()
