from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from taskmoe.kernels import reference
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.token_level import gated_low_rank, grouped_low_rank

T, E, K, N = 4, 5, 7, 9
PLAN = Plan.from_rows([2, 2, 2, 0, 2, 2, 1, 1, 1, 0, 0], T)  # task 3 has no rows


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def ids(M: int, k: int) -> Tensor:
    """Experts of each row; row 0 names expert 1 in every slot, nobody the last."""
    chosen = torch.randint(E - 1, (M, k), generator=torch.Generator().manual_seed(0))
    chosen[:1] = 1
    return chosen


def operands(
    op: str, r: int = 2, k: int = 2, plan: Plan = PLAN, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor | None]:
    M = plan.rows
    leaves = {"x": randn(M, K, dtype=dtype), "y": randn(M, N, dtype=dtype)}
    banks = torch.float32 if dtype.itemsize == 2 else dtype
    leaves |= {"A": randn(E, r, K, dtype=banks), "B": randn(E, r, N, dtype=banks)}
    leaves["gates"] = randn(M, E if op == "gated" else k, seed=1, dtype=banks)
    return leaves, None if op == "gated" else ids(M, k)


def call(
    module: str, op: str, at: dict[str, Tensor], slots: Tensor | None, G: int, plan: Plan = PLAN
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the banks with their task axis."""
    functions: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("fast", "gated"): gated_low_rank,
        ("fast", "grouped"): grouped_low_rank,
        ("reference", "gated"): reference.gated_low_rank,
        ("reference", "grouped"): reference.grouped_low_rank,
    }
    A, B = (at[name].expand(G, -1, -1, -1) for name in ("A", "B"))
    args = [at["x"], at.get("y"), A, B, at["gates"], *([] if slots is None else [slots]), 0.5, plan]
    return functions[module, op](*args), A, B


def outcome(
    module: str, op: str, at: dict[str, Tensor], slots: Tensor | None, G: int = 1
) -> dict[str, Tensor]:
    out, A, B = call(module, op, at, slots, G)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = at | {"A_g": A, "B_g": B}
    grads = torch.autograd.grad(out, list(wanted.values()), upstream)
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("op", ["gated", "grouped"])
@pytest.mark.parametrize("G", [1, T])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("with_y", [True, False])
def test_forward_and_gradients_are_the_reference(op: str, G: int, r: int, k: int, with_y: bool) -> None:
    at, slots = operands(op, r, k)
    if not with_y:
        del at["y"]
    found, truth = outcome("fast", op, at, slots, G), outcome("reference", op, at, slots, G)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    if op == "grouped":
        for bank in ("A_g", "B_g"):
            assert not found[bank][:, -1].any(), "an expert without rows"
    if G == T:
        for bank in ("A_g", "B_g"):
            assert not found[bank][3].any(), "a task without rows"


def test_an_expert_named_twice_by_a_row_counts_twice_by_hand() -> None:
    plan = Plan.from_rows([0, 0], 1)
    x, A, B = (
        torch.tensor([[3.0], [5.0]], requires_grad=True),
        torch.full((1, 2, 1, 1), 2.0),
        torch.ones(1, 2, 1, 1),
    )
    gates = torch.tensor([[1.0, 0.5], [10.0, 100.0]], requires_grad=True)
    slots = torch.tensor([[1, 1], [0, 1]])
    out = grouped_low_rank(x, torch.ones(2, 1), A, B, gates, slots, 2.0, plan)
    assert out.flatten().tolist() == [1 + 2 * 1.5 * 6, 1 + 2 * 110 * 10]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [2 * 1.5 * 2, 2 * 110 * 2]
    assert gates.grad.tolist() == [[12.0, 12.0], [20.0, 20.0]]


def test_sparse_gates_are_the_slots_that_they_spread_from() -> None:
    at, slots = operands("grouped", k=3)
    grouped = outcome("fast", "grouped", at, slots, T)
    dense = torch.zeros(PLAN.rows, E, dtype=torch.float64).scatter_add(1, slots, at["gates"])
    gated = outcome("fast", "gated", at | {"gates": dense}, None, T)
    torch.testing.assert_close(
        gated.pop("gates").gather(1, slots), grouped.pop("gates"), rtol=1e-12, atol=1e-12
    )
    for name, value in grouped.items():
        torch.testing.assert_close(gated[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_gates_that_are_the_same_for_a_task_are_gates_a_task(op: str) -> None:
    at, _ = operands("gated")
    per_task = randn(T, E, seed=2)
    rows = PLAN.row_tasks()
    spread = at | {"gates": per_task[rows]}
    slots = None if op == "gated" else torch.arange(E).repeat(PLAN.rows, 1)
    out, A, B = call("fast", op, spread, slots, 1)
    truth = reference.low_rank(at["x"], at["y"], A, B, per_task, None, 0.5, PLAN)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["gated", "grouped"])
@pytest.mark.parametrize("G", [1, T])
def test_gradcheck(op: str, G: int) -> None:
    plan = Plan.from_rows([1, 1, 0], T)
    slots = None if op == "gated" else torch.tensor([[1, 1], [0, 2], [2, 0]])

    def run(x, y, A, B, gates):
        return call("fast", op, {"x": x, "y": y, "A": A, "B": B, "gates": gates}, slots, G, plan)[0]

    leaves = (randn(3, 3), randn(3, 2), randn(3, 2, 3), randn(3, 2, 2), randn(3, 3 if op == "gated" else 2))
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("op", ["gated", "grouped"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(op: str, reentrant: bool) -> None:
    at, slots = operands(op)
    plain = outcome("fast", op, at, slots)
    names = list(at)

    def run(*leaves):
        return call("fast", op, dict(zip(names, leaves, strict=True)), slots, 1)[0]

    out = checkpoint(run, *at.values(), use_reentrant=reentrant)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    assert torch.equal(out, plain["out"])
    for name in names:
        assert torch.equal(at[name].grad, plain[name]), name


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_autocast_leaves_the_sums_alone(op: str) -> None:
    at, slots = operands(op, dtype=torch.float32)
    plain = outcome("fast", op, at, slots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome("fast", op, at, slots)
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name


@pytest.mark.parametrize("op", ["gated", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_with_fp32_banks(op: str, dtype: torch.dtype) -> None:
    at, slots = operands(op, dtype=dtype)
    found, truth = outcome("fast", op, at, slots, T), outcome("reference", op, at, slots, T)
    for name, value in truth.items():
        assert found[name].dtype == value.dtype == (dtype if name in ("x", "y", "out") else torch.float32), (
            name
        )
        # A rounding of x, of the bank, of s and of the result, against a truth that rounds the result only.
        limit = 4 * torch.finfo(dtype).eps * max(float(value.abs().max()), 1.0)
        assert float((found[name] - value).abs().max()) <= limit, name


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_rows_take_the_dtype_of_y(op: str) -> None:
    at, slots = operands(op, dtype=torch.float32)
    out, *_ = call("fast", op, at | {"y": at["y"].bfloat16()}, slots, 1)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert at["x"].grad.dtype == at["y"].grad.dtype == torch.float32


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_a_frozen_operand_gets_no_gradient(op: str) -> None:
    for frozen in ("x", "y", "A", "B", "gates"):
        at, slots = operands(op)
        whole = outcome("fast", op, at, slots)
        at[frozen].requires_grad_(False)
        out, *_ = call("fast", op, at, slots, 1)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        for name, leaf in at.items():
            if name == frozen:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_no_rows_give_no_rows_and_zero_gradients(op: str) -> None:
    plan = Plan.from_rows([], T)
    for G in (1, T):
        at, slots = operands(op, plan=plan)
        out, *_ = call("fast", op, at, slots, G, plan)
        assert out.shape == (0, N)
        for name, grad in zip(at, torch.autograd.grad(out.sum(), list(at.values())), strict=True):
            assert grad.shape == at[name].shape and not grad.count_nonzero(), name


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_the_same_bits_every_time(op: str) -> None:
    at, slots = operands(op, r=3, k=3, dtype=torch.float32)
    first = outcome("fast", op, at, slots, T)
    for _ in range(5):
        for name, value in outcome("fast", op, at, slots, T).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("op", ["gated", "grouped"])
def test_the_environment_picks_the_implementation(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, slots = operands(op)
    monkeypatch.setattr(reference, f"{op}_low_rank", lambda *args: "the reference")
    monkeypatch.setenv("TASKMOE_KERNELS", "reference")
    functions = {"gated": gated_low_rank, "grouped": grouped_low_rank}
    head = [at["x"], at["y"], at["A"][None], at["B"][None], at["gates"], *([] if slots is None else [slots])]
    assert functions[op](*head, 0.5, PLAN) == "the reference"


M = PLAN.rows


@pytest.mark.parametrize("op", ["gated", "grouped"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(M, 8)}, r"x is \(11, 8\); the plan and A ask for \(11, 7\)"),
        ({1: torch.ones(3, 9)}, r"y is \(3, 9\); the plan and B ask for \(11, 9\)"),
        ({2: torch.ones(E, 2, K)}, r"A is \(5, 2, 7\) .*must be \[G, E, r, K\]"),
        ({3: torch.ones(1, E, 3, N)}, r"B \(1, 5, 3, 9\)"),
        ({2: torch.ones(2, E, 2, K), 3: torch.ones(2, E, 2, N)}, r"task axis of 2; .* 4 tasks"),
        ({4: torch.ones(T, E)}, r"gates are \(4, 5\); they must be one row for each of 11 rows"),
    ],
)
def test_shapes_that_do_not_fit_are_named(op: str, change, message: str) -> None:
    args = [
        torch.ones(M, K),
        torch.ones(M, N),
        torch.ones(1, E, 2, K),
        torch.ones(1, E, 2, N),
        torch.ones(M, E),
    ]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=message):
        if op == "gated":
            gated_low_rank(*args, 1.0, PLAN)
        else:
            grouped_low_rank(*args, torch.zeros(M, E, dtype=torch.int64), 1.0, PLAN)


def test_gates_and_slots_that_do_not_fit() -> None:
    head = torch.ones(M, K), None, torch.ones(1, E, 2, K), torch.ones(1, E, 2, N)
    with pytest.raises(ValueError, match=r"gates are \(11, 3\); 5 experts ask for \(11, 5\)"):
        gated_low_rank(*head, torch.ones(M, 3), 1.0, PLAN)
    for slots in (torch.zeros(M, 3, dtype=torch.int64), torch.zeros(M, 2)):
        with pytest.raises(ValueError, match=r"slots are \(11, .*int64 expert ids of shape \(11, 2\)"):
            grouped_low_rank(*head, torch.ones(M, 2), slots, 1.0, PLAN)
