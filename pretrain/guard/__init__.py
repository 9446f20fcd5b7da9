"""What stops a run: divergence, ranks that differ, and wrong kernels."""
