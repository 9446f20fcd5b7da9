"""Reading the models of others as checkpoints."""
