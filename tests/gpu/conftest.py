"""Tests that need a GPU; elsewhere each of them is skipped and says why."""

import pytest
import torch

REASON = "no GPU here: torch.cuda.is_available() is False"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix() and "gpu" in item.fixturenames:
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def gpu():
    """Name of the device."""
    return "cuda"
