"""LoRAs to merge: three of two linears, of unequal ranks, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from taskmoe.moe.collapse import Pair

SIZES = {"q": (7, 9), "v": (10, 5)}  # N and K


def lora(rank: int, seed: int, names: tuple[str, ...] = ("q", "v")) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(rank, n, generator=generator, dtype=torch.float64)  # noqa: E731
    return {name: Pair(draw(SIZES[name][1]), draw(SIZES[name][0])) for name in names}


@pytest.fixture(scope="session")
def make() -> Callable[..., dict[str, Pair]]:
    """rank, seed, names -> a LoRA."""
    return lora


@pytest.fixture
def sources() -> list[dict[str, Pair]]:
    """The third lacks a linear."""
    return [lora(2, 1), lora(3, 2), lora(2, 3, ("v",))]


@pytest.fixture(scope="session")
def dense() -> Callable[..., dict[str, np.ndarray]]:
    """A LoRA -> {linear: its delta [N, K]}."""

    def make_dense(found: dict[str, Pair]) -> dict[str, np.ndarray]:
        zeros = {name: np.zeros(size) for name, size in SIZES.items()}
        return zeros | {name: pair.B_RN.numpy().T @ pair.A_RK.numpy() for name, pair in found.items()}

    return make_dense
