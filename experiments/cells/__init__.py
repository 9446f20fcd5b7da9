"""What a cell does: a training run that is measured, or a measurement."""
