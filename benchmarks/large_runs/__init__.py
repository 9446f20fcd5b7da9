"""What runs on many GPUs ask for, without them: memory, messages, a start, lost time."""
