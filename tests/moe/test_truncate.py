"""LoRAs of lower rank: the best there are, with their errors, against a dense decomposition."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe.collapse import Pair
from taskmoe.moe.truncate import truncate


def pair(rank: int, K: int = 11, N: int = 7, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(*(torch.randn(rank, width, generator=generator) for width in (K, N)))


def product(pair: Pair) -> torch.Tensor:
    return (pair.B_RN.T @ pair.A_RK).double()


@pytest.mark.parametrize("rank", [4, 7, 20])  # below, at and above the smaller width
@pytest.mark.parametrize("kept", [1, 3])
def test_nearest_of_that_rank(rank: int, kept: int) -> None:
    whole = pair(rank)
    found, errors = truncate({"x": whole}, kept)
    U, s, V = torch.linalg.svd(product(whole), full_matrices=False)
    expected = (U[:, :kept] * s[:kept]) @ V[:kept]
    assert found["x"].A_RK.shape == (kept, 11) and found["x"].B_RN.shape == (kept, 7)
    torch.testing.assert_close(product(found["x"]), expected, rtol=0, atol=1e-5 * float(s[0]))
    apart = (product(whole) - product(found["x"])).norm() / product(whole).norm()
    assert errors["x"] == pytest.approx(float(apart), abs=1e-6) and errors["x"] > 0.05


def test_what_fits_is_not_touched() -> None:
    pairs = {"small": pair(2), "large": pair(5, seed=1), "none": Pair(torch.zeros(0, 11), torch.zeros(0, 7))}
    found, errors = truncate(pairs, 4)
    assert found["small"] is pairs["small"] and found["none"] is pairs["none"]
    assert errors["small"] == errors["none"] == 0.0 < errors["large"]


def test_a_product_of_low_rank_loses_nothing() -> None:
    low = pair(2)
    twice = Pair(torch.cat([low.A_RK, low.A_RK]), torch.cat([low.B_RN, 0.5 * low.B_RN]))
    found, errors = truncate({"x": twice, "zero": Pair(torch.zeros(3, 11), torch.zeros(3, 7))}, 2)
    torch.testing.assert_close(product(found["x"]), product(twice), rtol=0, atol=1e-5)
    assert errors["x"] < 1e-7 and errors["zero"] == 0.0 and not found["zero"].A_RK.isnan().any()


def test_no_rank() -> None:
    with pytest.raises(ValueError, match="max_rank: 0 must be at least 1"):
        truncate({"x": pair(2)}, 0)
