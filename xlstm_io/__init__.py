"""What outlives a process: errors, storage, tokenizers, formats of checkpoints and shards."""
