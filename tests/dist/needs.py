"""What some distributed tests need that a machine may lack."""

import importlib.util

import pytest

# DeepSpeed is optional for users. `make setup` installs it, so CI skips nothing by this.
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
