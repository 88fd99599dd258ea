"""Which experts run on which sequences, and how what they return is put together.

Legend: B sequences, R rows that are routed (sequences; packed: positions), Tb tasks in this batch, E experts,
S routing groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from taskmoe.moe.context import Context, Gate, RowSpaceError


def used_experts(context: Context, group: int, gate: Gate) -> list[set[int]]:
    """The experts that each task of the batch uses, on the host: what no gradient asks for is not run.

    The gates of all groups are read at once, so that a device waits once a forward pass.
    """
    if gate.slots is None and gate.values.requires_grad:
        return [set(range(gate.values.shape[-1]))] * len(gate.values)
    key = id(used_experts)
    if key not in context.shared:
        slots = [g.slots[:, 0] for g in context.gates if g.slots is not None]
        if slots:
            found = [[set(row) for row in rows] for rows in torch.stack(slots).tolist()]
        else:
            flags_STE = torch.stack([g.values[:, 0] != 0 for g in context.gates]).tolist()
            found = [[{e for e, on in enumerate(row) if on} for row in rows] for rows in flags_STE]
        context.shared[key] = found
    return context.shared[key][group]


def can_be_cut(args: tuple, kwargs: dict) -> bool:
    """Whether everything that could belong to single sequences is a tensor."""
    leaves, _ = tree_flatten((args, kwargs))
    return all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves)


def arguments_of(
    args: tuple, kwargs: dict, rows: Tensor | None, size: int
) -> tuple[tuple, dict, dict[int, Tensor]]:
    """The arguments of some sequences, and {id of an argument: the whole of it}.

    What has ``size`` entries along the first of several axes belongs to the sequences; a vector (positions in
    the cache) does not.
    """
    leaves, tree = tree_flatten((args, kwargs))
    cut = leaves
    if rows is not None:
        cut = [
            t[rows] if isinstance(t, Tensor) and t.dim() > 1 and len(t) == size else t for t in leaves
        ]
        args, kwargs = tree_unflatten(cut, tree)
    return args, kwargs, {id(c): t for c, t in zip(cut, leaves, strict=True) if isinstance(t, Tensor)}


def combine(
    outputs: list[Any],
    weights: list[Tensor],
    rows: list[Tensor | None],
    handed: list[dict[int, Tensor]],
    name: str,
) -> Any:
    """sum_e g_e E_e(x) of every tensor of floats that the experts return; the rest is the first one's.

    weights: of each expert, [R] or (packed) [B, L]. What a module hands through unchanged is not combined.
    """
    flat = [tree_flatten(output) for output in outputs]
    tree = flat[0][1]
    combined: list[Any] = []
    for i, first in enumerate(flat[0][0]):
        if not isinstance(first, Tensor) or not first.is_floating_point():
            combined.append(first)
        elif all(id(leaves[i]) in h for (leaves, _), h in zip(flat, handed, strict=True)):
            combined.append(handed[0][id(first)])
        elif i and weights[0].dim() > 1:
            combined.append(None)  # attention weights, which have no place for a gate of each position
        else:
            parts = [leaves[i] for leaves, _ in flat]
            combined.append(_weighted_sum(parts, weights, rows, name))
    return tree_unflatten(combined, tree)


def _weighted_sum(parts: list[Tensor], weights: list[Tensor], rows: list[Tensor | None], name: str) -> Tensor:
    lead = weights[0].shape
    total: Tensor | None = None
    for part, weight, mine in zip(parts, weights, rows, strict=True):
        w = weight if mine is None else weight[mine]
        if part.shape[:1] == (1,):  # the same for all sequences
            part = part.expand(len(w), *part.shape[1:])
        if part.shape[: w.dim()] != w.shape:
            raise RowSpaceError(
                f"{name}: an output of shape {tuple(part.shape)} has no place for {tuple(w.shape)} gates; "
                "choose other modules for experts"
            )
        part = part * w.view(*w.shape, *[1] * (part.dim() - w.dim()))
        if mine is not None:
            part = part.new_zeros(*lead, *part.shape[1:]).index_copy(0, mine, part)
        total = part if total is None else total + part
    assert total is not None
    return total.to(parts[0].dtype)
