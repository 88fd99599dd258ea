"""One maker of operands for every test of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from taskmoe.kernels import ops
from taskmoe.kernels.grouping import group_rows
from taskmoe.kernels.plan import Plan

# Unsorted tasks, several segments a task, lengths 1 to 5, task 3 absent.
RAGGED = [2, 2, 2, 0, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0]


@dataclass(frozen=True)
class Case:
    """Operands of the op; banks without the task axis, which :meth:`args` adds."""

    x: Tensor
    y: Tensor | None
    A: Tensor
    B: Tensor
    gates: Tensor
    slots: Tensor | None
    scale: float
    plan: Plan
    G: int

    def args(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, float, Plan]:
        A, B = (bank.expand(self.G, *bank.shape) for bank in (self.A, self.B))
        return self.x, self.y, A, B, self.gates, self.slots, self.scale, self.plan

    def with_task_axis(self, G: int) -> Case:
        return replace(self, G=G)

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "y": self.y, "A": self.A, "B": self.B, "gates": self.gates}
        return {name: t for name, t in named.items() if t is not None}


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(
        task_of_row: list[int] | None = None,
        num_tasks: int = 4,
        experts: int = 5,
        r: int = 2,
        k: int | None = None,
        K: int = 7,
        N: int = 9,
        G: int = 1,
        dtype: torch.dtype = torch.float64,
        bank_dtype: torch.dtype | None = None,
        slots: list[list[int]] | None = None,
        with_y: bool = True,
        seed: int = 0,
    ) -> Case:
        g = torch.Generator().manual_seed(seed)
        plan = Plan.from_rows(RAGGED if task_of_row is None else task_of_row, num_tasks)
        bank_dtype = bank_dtype or dtype

        def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

        chosen = None if slots is None else torch.tensor(slots)
        if k is not None:
            chosen = torch.randint(experts, (num_tasks, k), generator=g)
        width = experts if chosen is None else chosen.shape[1]
        return Case(
            x=leaf(plan.rows, K, dtype=dtype),
            y=leaf(plan.rows, N, dtype=dtype) if with_y else None,
            A=leaf(experts, r, K, dtype=bank_dtype),
            B=leaf(experts, r, N, dtype=bank_dtype),
            gates=leaf(num_tasks, width, dtype=bank_dtype),
            slots=chosen,
            scale=0.5,
            plan=plan,
            G=G,
        )

    return make


@pytest.fixture
def run_op() -> Callable[..., dict[str, Tensor]]:
    """Forward and backward of an op on a case: ``out`` and the gradient of every leaf, and of the banks with
    their task axis (``A_g``, ``B_g``)."""

    def run(op: Callable[..., Tensor], case: Case, upstream: Tensor | None = None) -> dict[str, Tensor]:
        args = case.args()
        out = op(*args)
        if upstream is None:
            upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = case.leaves() | {"A_g": args[2], "B_g": args[3]}
        grads = torch.autograd.grad(out, list(wanted.values()), upstream)
        return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))

    return run


@pytest.fixture
def op_arguments() -> Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]:
    """(name, arguments) of calls of every op: with and without y, slots, a task axis; some gradients and
    all."""

    def arguments() -> Iterator[tuple[str, tuple[Any, ...]]]:
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        plan, T, E, r, K, N, k = Plan.from_rows(RAGGED, 4), 4, 5, 2, 7, 9, 2
        M = plan.rows
        x, y, dy = randn(M, K), randn(M, N), randn(M, N)
        A, B = randn(E, r, K), randn(E, r, N)
        triton = ops.use_triton(x)
        tables = plan.op_tables(tiles=triton)
        chosen = torch.randint(E, (T, k), generator=g)
        for slots, G, add, few in ((chosen, T, y, False), (None, 1, None, True)):
            R = r * (E if slots is None else k)
            A_g, B_g = A.expand(G, -1, -1, -1), B.expand(G, -1, -1, -1)
            gates, s, ds = randn(T, R // r), randn(M, R), randn(M, R)
            needs = [not few, True, not few, True]
            yield "low_rank_fwd", (x, add, A_g, B_g, gates, slots, 0.5, tables)
            yield "low_rank_bwd", (dy, x, s, A_g, B_g, gates, slots, 0.5, tables, needs)
            yield "shrink_fwd", (x, A_g, slots, tables)
            yield "shrink_bwd", (ds, x, A_g, slots, tables, needs[:2])
            yield "expand_fwd", (s, add, B_g, gates, slots, 0.5, tables, torch.float64)
            yield "expand_bwd", (dy, s, B_g, gates, slots, 0.5, tables, needs[1:])
            gates, s = randn(M, E), randn(M, E * r)
            yield "gated_fwd", (x, add, A_g, B_g, gates, 0.5, tables)
            yield "gated_bwd", (dy, x, s, A_g, B_g, gates, 0.5, tables, needs)
            ids = torch.randint(E, (M, k), generator=g)
            groups = group_rows(ids, plan.row_tasks() if G > 1 else None, G, E, tiles=triton)
            gates, s = randn(M, k), randn(M, k * r)
            yield "grouped_fwd", (x, add, A_g, B_g, gates, ids, 0.5, groups)
            yield "grouped_bwd", (dy, x, s, A_g, B_g, gates, ids, 0.5, groups, needs)

    return arguments
