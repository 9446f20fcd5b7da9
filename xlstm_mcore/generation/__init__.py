"""Text from a trained model: batches of prompts of any lengths, and how tokens are drawn."""
