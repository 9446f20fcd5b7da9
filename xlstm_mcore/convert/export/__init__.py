"""Writing a checkpoint as a Hugging Face folder."""
