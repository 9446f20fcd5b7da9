"""A Python that has imported torch, megatron-core and the product already.

A fresh process spends 5 to 7 CPU seconds on these imports. `server` imports them once and forks for
each command, which then starts within milliseconds. Use it where a test is about what a command
does. Where it is about the process itself (signals, what is imported, a crash), start a real one.

What a fork does not show: modules that are missing in a fresh process, and ranks whose string
hashes differ. `make pretrain` in tests/pretrain and the pool in tests/dist run fresh processes.
"""
