"""Every number that the project claims, one command each: ``python -m benchmarks.<name>``."""
