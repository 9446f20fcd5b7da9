"""Parameters by their global names: slices, initial values, weight decay."""
