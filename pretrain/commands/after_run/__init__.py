"""Commands on what a run has left: its checkpoints, its losses, its samples."""
