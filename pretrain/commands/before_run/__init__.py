"""Commands that look before a run: check, plan, rehearse, self-test."""
