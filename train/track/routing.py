"""What a snapshot of the routing says, in numbers: for the log, wandb, the terminal and the report alike.

Pure functions of tensors on the CPU. Rows of tasks that have not been seen are NaN and count nowhere.

Legend: T tasks, H heads, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.linalg import eigh
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot

DEAD = 0.01  # an expert with a smaller share for every task is dead
UNSEEN_HEIGHT = 2.0  # where a tree joins tasks that have not been seen: the largest 1 - cosine there is
_EQUAL = 1e-12  # distances below are rounding
_PERMUTATIONS = 999
_ORDERED = 1_000  # tasks whose leaves are put in the best order: 4,000 would hold a training up for a minute


def shares(gates_THE: Tensor) -> Tensor:
    """What each expert has of a task: |g| / sum |g|, [T, H, E] float32; a row of zeros is NaN."""
    sizes_THE = gates_THE.float().abs()
    return sizes_THE / sizes_THE.sum(-1, keepdim=True)  # 0 / 0 is the NaN


def group_metrics(gates_THE: Tensor, first_THE: Tensor | None = None) -> dict[str, float]:
    """Numbers of one routing group; empty where no task has been seen.

    ``entropy``: of a row's shares, in nats; ``effective_experts``: its exponential; both means over tasks and
    heads. ``utilisation_max``: the largest mean share of an expert. ``dead_experts``: how many have a share
    under :func:`dead_share` for every task and head. ``over_uniform``: mean total variation distance of the
    rows from 1 / E, in [0, 1]. ``between_tasks``: mutual information of task and expert over log min(T, E),
    tasks equally likely, mean over heads; 0: all tasks are routed alike, 1: the expert tells the task.
    ``drift``: mean total variation distance of the rows from those of ``first_THE``.

    Args:
        gates_THE: [T, H, E].
        first_THE: [T', H, E], of an earlier time; tasks missing or unseen there do not count for ``drift``,
            which is absent where none is left, or where heads or experts differ.
    """
    p_THE = shares(gates_THE).double()
    seen_TH = ~p_THE.isnan().any(-1)
    if not seen_TH.any():
        return {}
    E = p_THE.shape[-1]
    rows_RE = p_THE[seen_TH]
    entropy_TH = torch.special.entr(p_THE).sum(-1)
    entropy_R = entropy_TH[seen_TH]
    numbers = {
        "entropy": float(entropy_R.mean()),
        "effective_experts": float(entropy_R.exp().mean()),
        "utilisation_max": float(rows_RE.mean(0).max()),
        "dead_experts": float((rows_RE < dead_share(E)).all(0).sum()),
        "over_uniform": float((rows_RE - 1 / E).abs().sum(-1).mean() / 2),
        "between_tasks": _between_tasks(p_THE, entropy_TH, seen_TH),
    }
    if first_THE is not None and first_THE.shape[1:] == gates_THE.shape[1:]:
        T = min(len(first_THE), len(gates_THE))
        moved_TH = (p_THE[:T] - shares(first_THE[:T]).double()).abs().sum(-1) / 2
        if not moved_TH.isnan().all():
            numbers["drift"] = float(moved_TH.nanmean())
    return numbers


def dead_share(E: int) -> float:
    """The share under which one of ``E`` experts does nothing: :data:`DEAD`, or half of an equal share."""
    return min(DEAD, 0.5 / E)


def _between_tasks(p_THE: Tensor, entropy_TH: Tensor, seen_TH: Tensor) -> float:
    found = []
    for h in range(p_THE.shape[1]):
        p_TE = p_THE[seen_TH[:, h], h]
        most = min(p_TE.shape)
        if most > 1:
            shared = torch.special.entr(p_TE.mean(0)).sum() - entropy_TH[seen_TH[:, h], h].mean()
            found.append(max(float(shared), 0.0) / math.log(most))
    return sum(found) / len(found) if found else 0.0


def metrics(snapshot: Snapshot, first: Snapshot | None = None) -> dict[str, float]:
    """``routing/<number>`` of the model: means over the groups; empty without gates.

    ``routing/dead_expert_frac`` is the share of all experts of all groups that are dead.
    """
    found = by_group(snapshot, first)
    if not found:
        return {}
    result = {}
    for key in ("entropy", "effective_experts", "over_uniform", "between_tasks", "drift"):
        values = [numbers[key] for numbers in found.values() if key in numbers]
        if values:
            result[f"routing/{key}"] = sum(values) / len(values)
    experts = sum(snapshot.gates[group].shape[-1] for group in found)
    result["routing/dead_expert_frac"] = sum(n["dead_experts"] for n in found.values()) / experts
    return result


def group_keys(snapshot: Snapshot, first: Snapshot | None = None) -> dict[str, float]:
    """``routing/<group>/<number>``, or ``routing/<group>/head-<h>/<number>``, of :func:`group_metrics`."""
    result = {}
    for group, gates_THE in snapshot.gates.items():
        earlier_THE = _earlier(first, group)
        H = gates_THE.shape[1]
        for h in range(H):
            place = f"routing/{group}/head-{h}" if H > 1 else f"routing/{group}"
            before = None if earlier_THE is None else earlier_THE[:, h : h + 1]
            for key, value in group_metrics(gates_THE[:, h : h + 1], before).items():
                result[f"{place}/{key}"] = value
    return result


def _earlier(first: Snapshot | None, group: str) -> Tensor | None:
    return None if first is None else first.gates.get(group)


def by_group(snapshot: Snapshot, first: Snapshot | None = None) -> dict[str, dict[str, float]]:
    """{group: its :func:`group_metrics`, heads together} of all groups with a task that has been seen."""
    found = {g: group_metrics(gates, _earlier(first, g)) for g, gates in snapshot.gates.items()}
    return {group: numbers for group, numbers in found.items() if numbers}


def similarity(snapshot: Snapshot) -> Tensor:
    """Cosines of the tasks' shares, all groups and heads side by side: [T, T] float64, in [0, 1].

    Where a task has no gates in a group, it has zeros there; a task without any gates is NaN.
    """
    T = max((len(g) for g in snapshot.gates.values()), default=0)
    G_TT = torch.zeros(T, T, dtype=torch.float64)
    for gates_THE in snapshot.gates.values():
        p_TK = shares(gates_THE).double().nan_to_num(0.0).flatten(1)
        G_TT += p_TK @ p_TK.T
    norms_T = G_TT.diagonal().sqrt()
    C_TT = (G_TT / torch.outer(norms_T, norms_T)).clamp(0, 1)
    return C_TT.fill_diagonal_(1).masked_fill_((norms_T == 0)[:, None] | (norms_T == 0), torch.nan)


class Clustering(NamedTuple):
    """A tree of the tasks.

    order: task ids as the leaves lie, near ones side by side. linkage: [T - 1, 4] float64 as scipy has it.
    unseen: ids of tasks without a similarity; they join last, one by one at :data:`UNSEEN_HEIGHT`.
    """

    order: list[int]
    linkage: np.ndarray
    unseen: list[int]

    def labels(self, k: int) -> list[int]:
        """The cluster of each task, cut into at most ``k``: numbered as they lie in ``order``; unseen: -1.

        There are fewer than ``k`` where tasks cannot be told apart.
        """
        if len(self.unseen) == len(self.order):
            return [-1] * len(self.order)
        if len(self.order) == 1:
            return [0]
        cut_T = fcluster(self.linkage, k + len(self.unseen), "maxclust")
        numbers: dict[int, int] = {}
        labels = [-1] * len(self.order)
        for task in self.order[: len(self.order) - len(self.unseen)]:
            labels[task] = numbers.setdefault(int(cut_T[task]), len(numbers))
        return labels


def cluster(similarity_TT: Tensor) -> Clustering:
    """Average linkage on 1 - cosine, leaves in optimal order (Bar-Joseph et al. 2001).

    Of more than a thousand tasks the leaves are as the tree has them: clusters still lie side by side.

    Args:
        similarity_TT: [T, T]; a task whose diagonal is NaN has not been seen.
    """
    T = len(similarity_TT)
    unknown_T = similarity_TT.diagonal().isnan()
    seen, unseen = (~unknown_T).nonzero().flatten().tolist(), unknown_T.nonzero().flatten().tolist()
    tree = _tree(similarity_TT[seen][:, seen], ordered=len(seen) <= _ORDERED).tolist()
    names = [*seen, *range(T, T + len(tree))]  # scipy numbers the seen alone: from its ids to ours
    tree = [[names[int(a)], names[int(b)], height, size] for a, b, height, size in tree]
    roots = [*([T + len(tree) - 1] if tree else seen), *unseen]
    for i, task in enumerate(roots[1:]):
        tree.append([T + len(tree) - 1 if i else roots[0], task, UNSEEN_HEIGHT, len(tree) + 2])
    Z = np.array(tree, dtype=float).reshape(-1, 4)
    return Clustering(leaves_list(Z).tolist() if tree else list(range(T)), Z, unseen)


def _tree(similarity_TT: Tensor, ordered: bool) -> np.ndarray:
    if len(similarity_TT) < 2:
        return np.empty((0, 4))
    distances_TT = (1 - similarity_TT.double()).nan_to_num(1.0)
    distances_TT[distances_TT < _EQUAL] = 0
    return linkage(squareform(distances_TT.numpy(), checks=False), "average", optimal_ordering=ordered)


def map_2d(similarity_TT: Tensor) -> Tensor:
    """A map on which tasks routed alike lie together: classical scaling of the cosines, [T, 2] float64.

    Distances are those of unit vectors, sqrt(2 - 2 cos), as well as two dimensions can show them. A task that
    has not been seen is NaN.
    """
    T = len(similarity_TT)
    place_T2 = torch.full((T, 2), torch.nan, dtype=torch.float64)
    seen_T = ~similarity_TT.diagonal().isnan()
    C_SS = similarity_TT[seen_T][:, seen_T].double().nan_to_num(0.0)
    S = len(C_SS)
    if S == 0:
        return place_T2
    centred_SS = C_SS - C_SS.mean(0) - C_SS.mean(1, keepdim=True) + C_SS.mean()
    found = torch.zeros(S, 2, dtype=torch.float64)
    kept = min(S, 2)
    values, vectors = eigh(centred_SS.numpy(), subset_by_index=(S - kept, S - 1))
    axes = torch.from_numpy(vectors * np.sqrt(np.clip(values, 0, None))).flip(1)
    # An eigenvector has no sign of its own; this one makes equal snapshots equal maps.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    found[:, :kept] = axes * torch.where(largest < 0, -1.0, 1.0)
    place_T2[seen_T] = found
    return place_T2


def against_groups(similarity_TT: Tensor, groups: Sequence[str | None]) -> dict[str, float] | None:
    """How well clusters of the routing agree with given groups of the tasks.

    The tasks that are seen and have a group are clustered and cut at as many clusters as there are groups.
    ``adjusted_rand_index`` and ``adjusted_mutual_information``: 1 for the same clusters, 0 for chance.
    ``p_value``: the share of agreements at least as large, of this one and 999 of shuffled groups.
    ``num_groups``, ``num_tasks``: what was compared.

    Args:
        groups: T names; None for a task without a group.

    Returns:
        None where there are fewer than two groups, or none with two tasks.
    """
    seen = (~similarity_TT.diagonal().isnan()).tolist()
    picked = [t for t, group in enumerate(groups) if group is not None and seen[t]]
    names = [str(groups[t]) for t in picked]
    k = len(set(names))
    if k < 2 or k == len(names):
        return None
    found = fcluster(_tree(similarity_TT[picked][:, picked], ordered=False), k, "maxclust") - 1
    given = np.unique(names, return_inverse=True)[1]

    def agreement(groups_T: np.ndarray) -> int:
        # Shuffling keeps the sizes, so the Rand index grows with the squares of the table alone.
        return int((np.bincount(found * k + groups_T, minlength=k * k) ** 2).sum())

    own, draw = agreement(given), np.random.default_rng(0)
    as_large = sum(agreement(draw.permutation(given)) >= own for _ in range(_PERMUTATIONS))
    return {
        "adjusted_rand_index": float(adjusted_rand_score(given, found)),
        "adjusted_mutual_information": float(adjusted_mutual_info_score(given, found)),
        "p_value": (1 + as_large) / (1 + _PERMUTATIONS),
        "num_groups": k,
        "num_tasks": len(names),
    }
