"""Reading of shards: speed in a run, milliseconds at its start; made-up shards to read.

`python -m benchmarks.loader` measures the speed.
"""
