from __future__ import annotations

import io
from typing import Any

import pytest
import torch


@pytest.fixture
def stored():
    """What a checkpoint gives back of a state."""

    def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return through_a_file
