"""Tiny matrices gain nothing from a second thread, and lose much to it when the machine is busy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if "real_model" not in request.module.__name__:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
