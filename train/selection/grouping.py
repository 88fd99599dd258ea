"""Groups of tasks that have much to give each other.

Legend: T tasks, C groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe import TaskTable
from taskmoe.train.selection.base import SelectError
from taskmoe.train.track.routing import against_groups, cluster

FUZZINESS = 1.07  # m of STG-MTL: memberships are nearly, but not quite, one or zero


@dataclass(frozen=True)
class Groups:
    """label: {task: its group, -1 where nothing is known of it}. membership: {task: [C], summing to one}.
    agreement: of as many groups as the task table has with those, as of
    :func:`~taskmoe.train.track.routing.against_groups`; None: it has none."""

    label: dict[str, int]
    membership: dict[str, list[float]]
    agreement: dict[str, float] | None


def group(affinity_TT: Tensor, tasks: TaskTable, count: int) -> Groups:
    """Average linkage on squared distances, cut at ``count``; memberships of fuzzy c-means around the groups'
    centres (Bezdek 1981), where STG-MTL (Sherif et al. 2023) begins with k-means.

    There are fewer groups where tasks cannot be told apart.

    Args:
        affinity_TT: of a symmetric method.

    Raises:
        SelectError: more groups than tasks.
    """
    if not 1 <= count <= len(tasks):
        raise SelectError(
            f"--group: {count} groups of {len(tasks)} tasks; give a number from 1 to {len(tasks)}"
        )
    own_T = affinity_TT.diagonal()
    away_TT = (own_T[:, None] + own_T - affinity_TT - affinity_TT.T).clamp_min(0)
    largest = float(away_TT.nan_to_num(0.0).max())
    near_TT = 1 - away_TT / largest if largest else 1 - away_TT
    labels = cluster(near_TT).labels(count)
    labels_T = torch.tensor(labels)
    u_TC = memberships(away_TT, labels_T)
    known = dict(zip(tasks.names, labels, strict=True))
    rows = {name: u_TC[t].tolist() for t, name in enumerate(tasks.names) if known[name] >= 0}
    return Groups(known, rows, against_groups(near_TT, [task.group for task in tasks]))


def memberships(squared_TT: Tensor, labels_T: Tensor, fuzziness: float = FUZZINESS) -> Tensor:
    """[T, C] float64: u_tc proportional to d_tc^(-2 / (m - 1)), d_tc the distance of t from the centre of c.

    Distances from centres follow from those of the tasks: d_tc^2 = mean_j D_tj - mean_jk D_jk / 2 over the
    members j, k of c. A task at a centre is of that group alone.

    Args:
        squared_TT: squared distances. labels_T: int64, groups from 0; -1: of none (its row is NaN or so).
    """
    C = int(labels_T.max()) + 1
    away_TC = squared_TT.new_zeros(len(squared_TT), C)
    for c in range(C):
        mine = (labels_T == c).nonzero().flatten()
        inner = squared_TT[mine][:, mine].mean()
        away_TC[:, c] = (squared_TT[:, mine].mean(1) - inner / 2).clamp_min(0)
    # As logarithms: the power is large.
    return torch.softmax(-away_TC.clamp_min(torch.finfo(away_TC.dtype).tiny).log() / (fuzziness - 1), dim=1)
