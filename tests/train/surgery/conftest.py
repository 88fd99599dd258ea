from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def jacobian():
    """Task gradients: fp64 [T, P], norms over two decades, ``together`` turns them towards one direction."""

    def make(T: int, P: int, seed: int = 0, together: float = 0.0) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        J_TP = torch.randn(T, P, generator=gen, dtype=torch.float64)
        J_TP += together * torch.randn(P, generator=gen, dtype=torch.float64)
        return J_TP * torch.logspace(-1, 1, T, dtype=torch.float64)[:, None]

    return make
