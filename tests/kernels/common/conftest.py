"""What the tests of this folder share."""

import pytest
import torch


@pytest.fixture
def deterministic():
    """Deterministic algorithms during the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)
