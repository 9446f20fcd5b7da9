"""The tokenizer of an export, with the ids of training."""
