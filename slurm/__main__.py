"""`python -m slurm`: the same as the console script `xlstm-slurm`."""

from slurm.cli import main

main()
