"""The place of the Slurm launchers. None is built yet; `pretrain.launch` serves one machine."""
