from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from taskmoe.kernels import reference
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand, low_rank_core, shrink

T, E, r, K, N = 4, 5, 2, 7, 9
PLAN = Plan.from_rows([2, 2, 2, 0, 2, 2, 1, 1, 1, 0, 0], T)  # task 3 has no rows
M = PLAN.rows


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def ids(k: int, seed: int = 0) -> Tensor:
    """Expert ids of each task; task 0 names expert 1 in every slot, nobody the last."""
    chosen = torch.randint(E - 1, (T, k), generator=torch.Generator().manual_seed(seed))
    chosen[0] = 1
    return chosen


def grads_of(out: Tensor, *wanted: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream, retain_graph=True)]


def assert_close(found: list[Tensor], truth: list[Tensor]) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("siblings", [1, 2, 3])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("G", [1, T])
def test_siblings_shrink_as_they_would_alone(siblings: int, k: int | None, G: int) -> None:
    x, banks = randn(M, K), [randn(E, r, K, seed=i) for i in range(siblings)]
    slots = [None if k is None else ids(k, i) for i in range(siblings)]
    spread = [bank.expand(G, -1, -1, -1) for bank in banks]
    found = shrink(x, spread, slots, PLAN)
    truth = [reference.shrink(x, bank, s, PLAN) for bank, s in zip(spread, slots, strict=True)]
    assert [s.shape for s in found] == [(M, r * (k or E))] * siblings
    wanted = [x, *banks, *spread]
    assert_close(grads_of(torch.stack(found), *wanted), grads_of(torch.stack(truth), *wanted))


def test_siblings_that_need_no_gradient_get_none() -> None:
    x, banks = randn(M, K), [randn(1, E, r, K, seed=i) for i in range(3)]
    slots = [ids(2, i) for i in range(3)]
    weights = randn(M, 2 * r).detach()
    torch.stack(shrink(x, banks, slots, PLAN)).mul(weights).sum().backward()
    every = [bank.grad for bank in banks]
    for frozen in range(3):
        fresh = [bank.detach().requires_grad_(i != frozen) for i, bank in enumerate(banks)]
        # Frozen rows as well: the one op gives what is asked of it, and no more.
        torch.stack(shrink(x.detach(), fresh, slots, PLAN)).mul(weights).sum().backward()
        for i, bank in enumerate(fresh):
            if i == frozen:
                assert bank.grad is None
            else:
                assert_close([bank.grad], [every[i]])
    x.grad = None
    torch.stack(shrink(x, [bank.detach() for bank in banks], slots, PLAN)).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero()


def test_a_sibling_that_is_not_used_gets_zeros() -> None:
    banks = [randn(1, E, r, K, seed=i) for i in range(2)]
    first, _ = shrink(randn(M, K), banks, [None, None], PLAN)
    first.sum().backward()
    assert banks[0].grad.count_nonzero() and not banks[1].grad.count_nonzero()


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("G", [1, T])
@pytest.mark.parametrize("with_y", [True, False])
def test_expand_is_the_reference(k: int | None, G: int, with_y: bool) -> None:
    slots = None if k is None else ids(k)
    width = k or E
    # Rank-space rows of their own: the two slots that task 0 gives to one expert hold different values.
    s, B, gates, y = randn(M, width * r), randn(E, r, N), randn(T, width), randn(M, N)
    spread, add = B.expand(G, -1, -1, -1), y if with_y else None
    found = expand(s, add, spread, gates, slots, 0.5, PLAN)
    truth = reference.expand(s, add, spread, gates, slots, 0.5, PLAN, torch.float64)
    wanted = [s, B, spread, gates, *([y] if with_y else [])]
    outcome = grads_of(found, *wanted)
    assert_close(outcome, grads_of(truth, *wanted))
    assert not outcome[4][3].any(), "the gates of a task without rows"
    if k is not None:
        assert not outcome[2][E - 1].any(), "an expert that nobody names"


def test_one_expert_in_two_slots_of_different_rows_by_hand() -> None:
    plan = Plan.from_rows([0], 1)
    s = torch.tensor([[3.0, 10.0]], requires_grad=True)
    B, gates = torch.tensor([[[[2.0]]]], requires_grad=True), torch.tensor([[1.0, 0.5]], requires_grad=True)
    out = expand(s, torch.tensor([[1.0]]), B, gates, torch.zeros(1, 2, dtype=torch.int64), 2.0, plan)
    assert out.item() == 1 + 2 * (3 * 2 + 0.5 * 10 * 2)
    out.backward()
    assert s.grad.tolist() == [[4.0, 2.0]]
    assert gates.grad.tolist() == [[12.0, 40.0]]
    assert B.grad.item() == 2 * (3 + 0.5 * 10)


def test_shrink_then_expand_is_the_whole() -> None:
    x, y, A, B, gates = randn(M, K), randn(M, N), randn(1, E, r, K), randn(1, E, r, N), randn(T, 2)
    halves = expand(shrink(x, [A], [ids(2)], PLAN)[0], y, B, gates, ids(2), 0.5, PLAN)
    whole = reference.low_rank(x, y, A, B, gates, ids(2), 0.5, PLAN)
    assert_close(grads_of(halves, x, y, A, B, gates), grads_of(whole, x, y, A, B, gates))


def test_expand_casts_to_what_is_asked_or_to_y() -> None:
    s, B, gates = (t.float() for t in (randn(M, E * r), randn(1, E, r, N), randn(T, E)))
    y = randn(M, N, dtype=torch.bfloat16)
    assert expand(s, None, B, gates, None, 0.5, PLAN).dtype == torch.float32
    assert expand(s, None, B, gates, None, 0.5, PLAN, torch.float16).dtype == torch.float16
    out = expand(s, y, B, gates, None, 0.5, PLAN)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    truth = reference.expand(s, y, B, gates, None, 0.5, PLAN, torch.float32)
    torch.testing.assert_close(out.float(), truth, rtol=2**-6, atol=2**-6)


def hydra() -> tuple[Tensor, Tensor, Tensor]:
    """One A for E heads B: the core stacks ``g_te I``."""
    gates, eye = randn(T, E), torch.eye(r, dtype=torch.float64)
    return randn(r, K), randn(E * r, N), torch.einsum("te,ij->teij", gates, eye).flatten(1, 2)


def t_rex() -> tuple[Tensor, Tensor, Tensor]:
    """Rank-1 factors mixed and matched: a full gate matrix a task."""
    return randn(3, K), randn(4, N), randn(T, 4, 3)


def mtl_lora() -> tuple[Tensor, Tensor, Tensor]:
    """A low-rank matrix of the task's own, then a weighted sum of several up-projections."""
    weights, own = randn(T, 3), randn(T, r, r)
    return randn(r, K), randn(3 * r, N), torch.einsum("tj,tab->tjab", weights, own).flatten(1, 2)


@pytest.mark.parametrize("method", [hydra, t_rex, mtl_lora])
@pytest.mark.parametrize("G", [1, T])
@pytest.mark.parametrize("with_y", [True, False])
def test_any_core_matrix(method, G: int, with_y: bool) -> None:
    x, (A, B, core) = randn(M, K), method()
    y = randn(M, N) if with_y else None
    banks = [bank.expand(G, -1, -1) for bank in (A, B)]
    found = low_rank_core(x, y, *banks, core, 0.5, PLAN)
    truth = reference.low_rank_core(x, y, *banks, core, 0.5, PLAN)
    wanted = [x, A, B, core, *banks, *([y] if with_y else [])]
    assert_close(grads_of(found, *wanted), grads_of(truth, *wanted))


def test_a_core_of_low_precision_rows_is_computed_in_fp32() -> None:
    x, (A, B, core) = randn(M, K, dtype=torch.bfloat16), (t.float() for t in t_rex())
    out = low_rank_core(x, None, A[None], B[None], core, 0.5, PLAN)
    assert out.dtype == torch.bfloat16
    truth = reference.low_rank_core(x.double(), None, A[None], B[None], core, 0.5, PLAN)
    rounding = torch.finfo(torch.bfloat16).eps * float(truth.detach().abs().max())
    assert float((out - truth).detach().abs().max()) <= 2 * rounding


def test_no_rows() -> None:
    plan = Plan.from_rows([], T)
    x, banks, B, gates = (
        randn(0, K),
        [randn(1, E, r, K, seed=i) for i in range(2)],
        randn(1, E, r, N),
        randn(T, 2),
    )
    s, other = shrink(x, banks, [ids(2)] * 2, plan)
    out = expand(s, None, B, gates, ids(2), 0.5, plan)
    assert s.shape == other.shape == (0, 2 * r) and out.shape == (0, N)
    for grad in torch.autograd.grad(out.sum() + other.sum(), [x, *banks, B, gates]):
        assert not grad.count_nonzero()


@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(k: int | None) -> None:
    plan = Plan.from_rows([1, 1, 0, 1], T)
    slots, width = (None, E) if k is None else (ids(k), k)

    def halves(x, y, A, other, B, gates):
        banks = [bank.expand(T, -1, -1, -1) for bank in (A, other)]
        first, second = shrink(x, banks, [slots, slots], plan)
        spread = B.expand(T, -1, -1, -1)
        return expand(first, y, spread, gates, slots, 0.5, plan), expand(
            second, None, spread, gates, slots, 2.0, plan
        )

    leaves = (
        randn(4, 3),
        randn(4, 2),
        randn(E, 1, 3),
        randn(E, 1, 3, seed=1),
        randn(E, 1, 2),
        randn(T, width),
    )
    assert torch.autograd.gradcheck(halves, leaves)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    x, y, A, other, B, gates = (
        randn(M, K), randn(M, N), randn(1, E, r, K), randn(1, E, r, K, seed=1), randn(1, E, r, N), randn(T, 2)
    )  # fmt: skip

    def halves(x, y, A, other, B, gates):
        parts = shrink(x, [A, other], [ids(2), ids(2, 1)], PLAN)
        return sum(expand(s, y, B, gates, ids(2), 0.5, PLAN) for s in parts)

    leaves = [x, y, A, other, B, gates]
    plain = grads_of(halves(*leaves), *leaves)
    out = checkpoint(halves, *leaves, use_reentrant=reentrant)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    for value, truth in zip([out.detach(), *(leaf.grad for leaf in leaves)], plain, strict=True):
        assert torch.equal(value, truth)


def test_autocast_leaves_the_sums_alone() -> None:
    x, A, B, gates = (t.detach().float().requires_grad_() for t in (
        randn(M, K), randn(1, E, r, K), randn(1, E, r, N), randn(T, E)))  # fmt: skip
    outcomes = []
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            out = expand(shrink(x, [A], [None], PLAN)[0], None, B, gates, None, 0.5, PLAN)
            outcomes.append(grads_of(out, x, A, B, gates))
    for plain, cast in zip(*outcomes, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


GOOD = torch.zeros(T, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([], []), r"0 banks and 0 slots"),
        (([torch.ones(1, E, r, K)], []), r"1 banks and 0 slots; give .* slots for each"),
        (([torch.ones(E, r, K)], [None]), r"must be \[G, E, r, K\], all alike"),
        (([torch.ones(1, E, r, K), torch.ones(1, E, 1, K)], [None] * 2), r"\(1, 5, 1, 7\).*all alike"),
        (([torch.ones(2, E, r, K)], [None]), r"task axis of 2; it must be 1 or 4 tasks"),
        (([torch.ones(1, E, r, 8)], [None]), r"x is \(11, 7\); the plan and the banks ask for \(11, 8\)"),
        (([torch.ones(1, E, r, K)] * 2, [GOOD, None]), r"slots are .*None.*int64 ids \[4, k\]"),
        (([torch.ones(1, E, r, K)] * 2, [GOOD, GOOD[:, :1]]), r"slots are .*\(4, 1\)"),
        (([torch.ones(1, E, r, K)], [GOOD.int()]), r"slots are .*int32"),
        (([torch.ones(1, E, r, K)], [GOOD[:2]]), r"slots are .*\(2, 2\)"),
        (([torch.ones(1, E, r, K)], [GOOD[:, 0]]), r"slots are .*\(4,\)"),
    ],
)
def test_shrink_names_what_does_not_fit(args, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(torch.ones(M, K), *args, PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(M, 3)}, r"s is \(11, 3\); the plan, gates and B ask for \(11, 4\)"),
        ({1: torch.ones(M, 8)}, r"y is \(11, 8\); the plan and B ask for \(11, 9\)"),
        ({2: torch.ones(E, r, N)}, r"B is \(5, 2, 9\); it must be \[G, E, r, N\]"),
        ({2: torch.ones(2, E, r, N)}, r"with G 1 or the plan's 4 tasks"),
        ({3: torch.ones(3, 2)}, r"gates are \(3, 2\); they must be \[4, k\]"),
        ({4: None}, r"gates are \(4, 2\); .* without slots k = 5"),
        ({4: GOOD.float()}, r"slots are \(4, 2\) torch.float32; they must be int64"),
        ({4: GOOD[:, :1]}, r"slots are \(4, 1\) .* shape \(4, 2\)"),
    ],
)
def test_expand_names_what_does_not_fit(change, message: str) -> None:
    args = [torch.ones(M, 2 * r), torch.ones(M, N), torch.ones(1, E, r, N), torch.ones(T, 2), GOOD]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=message):
        expand(*args, 1.0, PLAN)


@pytest.mark.parametrize("core", [torch.ones(T, 3, 2), torch.ones(T, 4, 4), torch.ones(3, 4, 2)])
def test_a_core_that_does_not_fit(core: Tensor) -> None:
    with pytest.raises(ValueError, match=r"core is .*; the rows of B and A .* ask for \(4, 4, 2\)"):
        low_rank_core(torch.ones(M, K), None, torch.ones(1, 2, K), torch.ones(1, 4, N), core, 1.0, PLAN)


def test_rank_space_rows_of_sixteen_bits_are_refused(make_case) -> None:
    case = make_case(r=2)
    s = torch.zeros(15, 10, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rank-space rows are float32 or float64"):
        expand(s, None, case.B[None], case.gates, None, 1.0, case.plan)
