"""Poisoned memory for every test of the operator."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an element nobody writes fails the test.

    PyTorch does so itself in deterministic mode, which also refuses operations that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
