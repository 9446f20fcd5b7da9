"""The checkpoint format, readable without a trainer."""
