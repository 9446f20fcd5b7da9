"""What stops a run, or takes it back: divergence, and ranks that differ."""
