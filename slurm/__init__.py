"""Slurm launchers: sbatch templates, site files, submit, preflight."""
