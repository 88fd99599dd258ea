"""Each way of merging against its formula on dense arrays, one entry at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from taskmoe.moe import ConfigError
from taskmoe.moe.collapse import Pair
from taskmoe.moe.merging.kinds import merge_loras


def check(dense: Any, sources: Any, expected: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:
    found = dense(merge_loras(sources, *args, **kwargs).pairs)
    for name, delta in expected.items():
        assert np.abs(delta).max() > 0.01
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=1e-12 * np.abs(delta).max())


def factors(sources: Any, name: str, which: int) -> np.ndarray:
    """[T, r, D] of one linear, padded with zeros."""
    found = [source[name][which].numpy() if name in source else None for source in sources]
    r = max(len(x) for x in found if x is not None)
    D = next(x.shape[1] for x in found if x is not None)
    return np.stack([np.zeros((r, D)) if x is None else np.pad(x, [(0, r - len(x)), (0, 0)]) for x in found])


def test_task_arithmetic(dense, sources) -> None:
    expected = {n: 0.7 * sum(dense(source)[n] for source in sources) for n in ("q", "v")}
    check(dense, sources, expected, "task_arithmetic", 0.7)
    check(dense, sources, {n: delta * 0.4 / 0.7 for n, delta in expected.items()}, "task_arithmetic")


def test_task_arithmetic_of_factors(dense, sources) -> None:
    expected = {}
    for name in ("q", "v"):
        A, B = factors(sources, name, 0), factors(sources, name, 1)
        expected[name] = 0.7 * B.sum(0).T @ (A.sum(0) / 3)
    check(dense, sources, expected, "task_arithmetic", 0.7, {"space": "factors"})


def ties(tensors_T: list[dict[str, np.ndarray]], density: float) -> dict[str, np.ndarray]:
    trimmed = []
    for tensors in tensors_T:
        ordered = sorted((abs(x) for tensor in tensors.values() for x in tensor.flatten()), reverse=True)
        last = ordered[round(density * len(ordered)) - 1]
        trimmed.append({n: np.where(abs(x) >= last, x, 0) for n, x in tensors.items()})
    merged = {n: np.zeros_like(x) for n, x in tensors_T[0].items()}
    for name, out in merged.items():
        for at in np.ndindex(out.shape):
            entries = [tensors[name][at] for tensors in trimmed]
            kept = [x for x in entries if x != 0 and (x > 0) == (sum(entries) > 0)]
            out[at] = sum(kept) / len(kept) if kept else 0.0
    return merged


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties(dense, sources, density) -> None:
    merged = ties([dense(source) for source in sources], density)
    assert density == 1.0 or any((delta == 0).any() for delta in merged.values())
    expected = {n: 1.3 * delta for n, delta in merged.items()}
    check(dense, sources, expected, "ties", 1.3, {"density": density})


def test_ties_of_factors(dense, sources) -> None:
    sides = []
    for which in (0, 1):
        stacks = {name: factors(sources, name, which) for name in ("q", "v")}
        sides.append(ties([{n: x[t] for n, x in stacks.items()} for t in range(3)], 0.5))
    expected = {n: sides[1][n].T @ sides[0][n] for n in ("q", "v")}
    check(dense, sources, expected, "ties", None, {"space": "factors", "density": 0.5})


@pytest.mark.parametrize(
    ("method", "options"), [("task_arithmetic", {}), ("breadcrumbs", {"drop": 0.0, "keep": 1.0})]
)
def test_with_one_a_both_spaces_are_the_same(dense, make, method, options) -> None:
    A = make(3, 9)
    sources = [{n: Pair(A[n].A_RK, pair.B_RN) for n, pair in make(3, seed).items()} for seed in (1, 2, 3)]
    expected = {n: 0.6 * sum(dense(source)[n] for source in sources) for n in ("q", "v")}
    for space in ("delta", "factors"):
        check(dense, sources, expected, method, 0.6, {**options, "space": space})


def middling(row: np.ndarray, drop: float, keep: float) -> np.ndarray:
    order, out = np.argsort(-abs(row)), np.zeros_like(row)
    chosen = order[round(drop * len(row)) : round((drop + keep) * len(row))]
    out[chosen] = row[chosen]
    return out


@pytest.mark.parametrize("scope", ["linear", "row"])
@pytest.mark.parametrize(("drop", "keep"), [(0.1, 0.2), (0.0, 0.5), (0.3, 0.7)])
def test_breadcrumbs(dense, sources, scope, drop, keep) -> None:
    expected = {}
    for name in ("q", "v"):
        deltas = [dense(source)[name] for source in sources]
        if scope == "linear":
            parts = [middling(delta.flatten(), drop, keep).reshape(delta.shape) for delta in deltas]
        else:
            parts = [np.stack([middling(row, drop, keep) for row in delta]) for delta in deltas]
        expected[name] = 0.4 * sum(parts)
    check(dense, sources, expected, "breadcrumbs", None, {"scope": scope, "drop": drop, "keep": keep})


def test_breadcrumbs_of_factors(dense, sources) -> None:
    expected = {}
    for name in ("q", "v"):
        A, B = ([middling(x.flatten(), 0.2, 0.6).reshape(x.shape) for x in factors(sources, name, i)]
                for i in (0, 1))  # fmt: skip
        expected[name] = 0.9 * sum(B).T @ (sum(A) / 3)
    check(dense, sources, expected, "breadcrumbs", 0.9, {"space": "factors", "drop": 0.2, "keep": 0.6})


def pruned(x: np.ndarray, density: float) -> np.ndarray:
    ordered = np.sort(abs(x).flatten())[::-1]
    return np.where(abs(x) >= ordered[round(density * x.size) - 1], x, 0)


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.8])
def test_copa(dense, make, floor) -> None:
    sources = [make(3, 1), make(3, 2), make(2, 4)]
    expected = {}
    for name in ("q", "v"):
        above, below, scales = 0.0, 0.0, np.zeros(3)
        for source in sources:
            A, B = (x.numpy() for x in source[name])
            kept_A, kept_B = pruned(A, 0.6), pruned(B, 0.6)
            s = abs(A).sum(1) / abs(kept_A).sum(1)
            s = np.maximum(s, np.sort(s)[int(floor * len(s))])
            pad = [(0, 3 - len(A)), (0, 0)]
            above = above + np.pad(kept_A, pad)
            below = below + np.pad(s[:, None] * kept_B, pad)
            scales += np.pad(s, (0, 3 - len(A)))
        expected[name] = 4 * (below / scales[:, None]).T @ above
    check(dense, sources, expected, "copa", None, {"density": 0.6, "floor": floor})


def test_copa_when_nothing_is_left_of_a_row(dense, make) -> None:
    """The authors' program divides by zero there."""
    first, second = make(3, 1), make(3, 2)
    first["q"].A_RK[1] *= 1e-3
    found = dense(merge_loras([first, second], "copa", options={"density": 0.2}).pairs)
    assert np.isfinite(found["q"]).all() and abs(found["q"]).max() > 0


def test_concatenation(dense, sources) -> None:
    expected = {n: sum(dense(source)[n] for source in sources) / 3 for n in ("q", "v")}
    check(dense, sources, expected, "concatenation")
    weights = (0.5, -1.0, 2.0)
    expected = {
        n: 3 * sum(w * dense(s)[n] for w, s in zip(weights, sources, strict=True)) for n in ("q", "v")
    }
    check(dense, sources, expected, "concatenation", 3.0, {"weights": list(weights)})
    with pytest.raises(ConfigError, match=r"merge\.options\.weights: 2 of them for 3 LoRAs"):
        merge_loras(sources, "concatenation", options={"weights": [1.0, 2.0]})


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_mean(dense, sources, rank) -> None:
    expected = {}
    for name in ("q", "v"):
        U, s, V = np.linalg.svd(sum(dense(source)[name] for source in sources) / 3, full_matrices=False)
        kept = rank or 3
        expected[name] = 2 * (U[:, :kept] * s[:kept]) @ V[:kept]
    check(dense, sources, expected, "svd_mean", 2.0, {} if rank is None else {"rank": rank})
