"""Slurm: jobs that start a run, and start it again until it is finished or has to be looked at."""
