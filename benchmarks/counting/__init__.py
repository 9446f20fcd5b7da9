"""Counts of bytes, operations and messages on tensors without data, and the limits of a device."""
