"""Engines: what a training step does to a model, behind one small protocol."""
