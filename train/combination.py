"""From J to ``p.grad``: the Gramians, what a method makes of them, and how an engine is given the result.

Passes come scaled by the number of ranks W, because an engine averages over them. So do J and what is handed
in; Gramians, and what a method sees, are of the gradients averaged over ranks.

Legend: R rows of J, s columns of a parameter on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe.targets import routing_group
from taskmoe.train.surgery.direct import BY_ENTRY, DirectSurgery
from taskmoe.train.surgery.gramian import same_task_cosines
from taskmoe.train.task_matrix import TaskMatrix
from taskmoe.train.task_scope import Scope

AddUp = Callable[[Tensor], Tensor]  # the sum over the ranks, a collective


@dataclass(frozen=True)
class Combination:
    """What :meth:`TaskGradients.combine` did.

    rows: the task ids of each row. gramians: {group of parameters: fp64 [R, R] on the CPU, of the gradients
    averaged over ranks}. weights: {group: fp64 [R]}; None for methods without one weight a row. same_task:
    fp64 [R], the cosine of two halves of each row's own sequences on the experts, nan where there is one
    half; None where it was not asked for.
    """

    rows: list[list[int]]
    gramians: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    same_task: Tensor | None = None


def group_gramians(matrix: TaskMatrix, scope: Scope, add_up: AddUp) -> dict[str, Tensor]:
    """{group of parameters: J J', fp64 [R, R] on the CPU}, equal on all ranks: one collective."""
    mine = torch.stack([matrix.gramian(names) for names in scope.groups.values()])
    return dict(zip(scope.groups, add_up(mine) / matrix.world_size**2, strict=True))


def half_cosines(matrix: TaskMatrix, scope: Scope, add_up: AddUp) -> Tensor:
    """What cosine noise leaves of tasks that agree: of rows r and R + r, the halves of one; fp64 [R]."""
    G = sum(group_gramians(matrix, scope, add_up).values(), torch.zeros(()))
    R = matrix.num_rows // 2
    return same_task_cosines(G.diagonal()[:R], G.diagonal()[R:], G[:R, R:].diagonal())


def combine_directly(
    matrix: TaskMatrix, scope: Scope, add_up: AddUp, method: DirectSurgery, step: int, rows: Sequence[int]
) -> dict[str, Tensor]:
    """{name: [s]}, this rank's columns of what a method makes of J itself; the same on any number of ranks.

    Args:
        rows: a task id for each row.
    """
    blocks = {}
    for name, p in scope.shared.items():
        block = matrix.block(name)
        zeros = p.new_zeros(len(rows), matrix.columns(name))
        blocks[name] = zeros if block is None else block / matrix.world_size
    found: dict[str, Tensor] = {}
    if method.name in BY_ENTRY:
        start = 0
        for name, block in blocks.items():
            offset = start + matrix.rank * matrix.columns(name)
            found[name] = method.combine(block, [block.shape[1]], step, rows, offset=offset)
            start += matrix.shapes[name].numel()
    else:
        layers: dict[str, list[str]] = {}
        for name in blocks:
            layers.setdefault(routing_group(name, "layer"), []).append(name)
        names = [n for members in layers.values() for n in members]
        sizes = [sum(matrix.columns(n) for n in members) for members in layers.values()]
        J_Rs = torch.cat([blocks[n] for n in names], dim=1)
        combined = method.combine(J_Rs, sizes, step, rows, reduce=add_up)
        found = dict(zip(names, combined.split([matrix.columns(n) for n in names]), strict=True))
    return {name: columns_s * matrix.world_size for name, columns_s in found.items()}


def hand_in(matrix: TaskMatrix, scope: Scope, columns: Mapping[str, Tensor | None]) -> None:
    """Put {name: [s]} (None: zeros) into ``p.grad``: each rank its columns, zeros elsewhere.

    The engine's own reduction puts them together: nothing is gathered.

    Raises:
        RuntimeError: a parameter has a gradient of which no task's part was kept.
    """
    for name, columns_s in columns.items():
        p = scope.shared[name]
        if columns_s is None:
            if p.grad is not None and p.grad.any():
                raise RuntimeError(
                    f"{name} has a gradient, but no task's part of it was kept: its module must take it "
                    "through gate.split (taskmoe.moe.parts), or use way: separate"
                )
            continue
        whole = matrix.place(name, columns_s)
        if p.grad is None:
            p.grad = whole.to(p.dtype)
        else:
            p.grad.copy_(whole)  # in place: under ZeRO-3 the parameter itself is not whole here
