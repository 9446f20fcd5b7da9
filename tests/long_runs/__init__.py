"""Proofs that take hours: each is a command, which goes on where it was stopped."""
