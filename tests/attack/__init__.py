"""Damaged input for every reader of the product: it is read, or refused in one message."""
