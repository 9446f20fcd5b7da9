"""Checks between the keys of a run file. `problems` in fields.py makes all of them."""
