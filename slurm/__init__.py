"""The place of the Slurm launchers: none is built yet. `pretrain launch` serves one machine."""
