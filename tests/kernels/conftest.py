"""One maker of operands for every test of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

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
