"""What holds for every way of merging, and what is told of the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taskmoe.moe import ConfigError
from taskmoe.moe.collapse import Pair
from taskmoe.moe.merging.kinds import MERGERS, merge_loras

ALL = [(name, {}) for name in MERGERS]
ALL += [(name, {"space": "factors"}) for name in ("task_arithmetic", "ties", "breadcrumbs")]
# With these nothing is left out.
LOOSE = {
    "copa": {"density": 1.0, "floor": 0.0},
    "ties": {"density": 1.0},
    "breadcrumbs": {"drop": 0.0, "keep": 1.0},
}

pytestmark = pytest.mark.parametrize(("method", "options"), ALL)


def close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=1e-12 * max(1.0, np.abs(delta).max()))


def test_the_order_does_not_matter(method, options, sources, dense) -> None:
    forth = dense(merge_loras(sources, method, options=options).pairs)
    close(dense(merge_loras(sources[::-1], method, options=options).pairs), forth)


def test_the_result_grows_with_the_coefficient(method, options, sources, dense) -> None:
    once = dense(merge_loras(sources, method, 1.0, options).pairs)
    close(dense(merge_loras(sources, method, -2.5, options).pairs), {n: -2.5 * d for n, d in once.items()})


def test_what_all_share_comes_back(method, options, make, dense) -> None:
    """Three times the same LoRA, with nothing left out: a multiple of it."""
    same = make(3, 1)
    times = {"task_arithmetic": 3, "breadcrumbs": 3, "copa": 3}.get(method, 1)  # sums, and means
    found = merge_loras([same] * 3, method, 1.0, {**options, **LOOSE.get(method, {})})
    close(dense(found.pairs), {name: times * delta for name, delta in dense(same).items()})


def test_ranks_are_the_lowest_that_hold_it(method, options, sources, dense) -> None:
    found = merge_loras(sources, method, options=options)
    ranks = {name: np.linalg.matrix_rank(dense(found.pairs)[name], rtol=1e-9) for name in found.pairs}
    assert {name: len(pair.A_RK) for name, pair in found.pairs.items()} == ranks
    assert found.rank == max(ranks.values()) and set(found.errors.values()) == {0.0}


def test_cut_to_a_rank(method, options, sources, dense) -> None:
    whole = merge_loras(sources, method, options=options)
    found = merge_loras(sources, method, options=options, max_rank=1)
    assert found.rank == 1
    for name, delta in dense(whole.pairs).items():
        if name in whole.pairs:
            s = np.linalg.svd(delta, compute_uv=False)
            assert found.errors[name] == pytest.approx((s[1:] ** 2).sum() ** 0.5 / (s**2).sum() ** 0.5)
            gap = np.linalg.norm(dense(found.pairs)[name] - delta) / np.linalg.norm(delta)
            assert gap == pytest.approx(found.errors[name])
    assert max(found.errors.values()) > 0.1


def test_inputs_stay_as_they_are_and_float32_is_enough(method, options, sources, dense) -> None:
    single = [{n: Pair(*(x.float() for x in pair)) for n, pair in source.items()} for source in sources]
    before = [{n: Pair(*(x.clone() for x in pair)) for n, pair in source.items()} for source in single]
    found = merge_loras(single, method, options=options)
    for source, old in zip(single, before, strict=True):
        assert all(torch.equal(x, y) for n in source for x, y in zip(source[n], old[n], strict=True))
    assert {x.dtype for pair in found.pairs.values() for x in pair} == {torch.float32}
    expected = dense(merge_loras(sources, method, options=options).pairs)
    for name, delta in dense(found.pairs).items():
        np.testing.assert_allclose(delta, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


def test_zeros_leave_nothing(method, options, sources) -> None:
    nothing = [{n: Pair(A, torch.zeros_like(B)) for n, (A, B) in source.items()} for source in sources]
    with pytest.raises(ConfigError, match=f"merge.method: '{method}' leaves nothing of these LoRAs"):
        merge_loras(nothing, method, options=options)


def test_what_cannot_be_merged(method, options, sources, make) -> None:
    with pytest.raises(ConfigError, match="there are no LoRAs to merge"):
        merge_loras([], method, options=options)
    other = {"q": Pair(torch.zeros(1, 8), torch.zeros(1, 7))}
    with pytest.raises(
        ConfigError, match="LoRA 4 of 4 has q from 8 to 7 features, one before it from 9 to 7"
    ):
        merge_loras([*sources, other], method, options=options)
    with pytest.raises(ConfigError, match="max_rank: 0 must be at least 1"):
        merge_loras(sources, method, options=options, max_rank=0)
    with pytest.raises(ConfigError, match=f"merge.options.spcae: unknown option of method '{method}'"):
        merge_loras(sources, method, options={"spcae": 1})
    with pytest.raises(
        ConfigError, match=f"merge.method: '{method}_' is not one of .*; the nearest is '{method}'"
    ):
        merge_loras(sources, method + "_")
