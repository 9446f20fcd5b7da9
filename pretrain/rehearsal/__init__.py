"""A run before the run: the real engine as any rank of a large run, on tensors without data."""
