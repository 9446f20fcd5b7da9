"""Tests that need a GPU; elsewhere each of them is skipped and says why.

The rest of the suite hides the GPU (see tests/conftest.py), so these run on their own:
`pytest tests/gpu`.
"""

import os

import pytest
import torch


def reason():
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "the GPU is hidden from the rest of the suite: run pytest tests/gpu by itself"
    return "no GPU here: torch.cuda.is_available() is False"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix() and "gpu" in item.fixturenames:
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=reason()))


@pytest.fixture
def gpu():
    """Name of the device."""
    return "cuda"
