"""Commands that run: launch, train, and the demo, which is the whole pipeline."""
