"""What a run file promises, tried on the machine at hand: an exact resume, the same model."""
