"""What ``taskmoe inspect`` says of a run or a saved adapter, as one object that is the same for every method.

docs/TRACKING.md describes the object. Legend: T tasks, H heads, E experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track import routing
from taskmoe.train.track.facts import Facts, FactsError, latest
from taskmoe.train.track.verdicts import ALIKE, verdicts

NUMBERS = ("entropy", "effective_experts", "utilisation_max", "dead_experts", "over_uniform",
           "between_tasks", "drift")  # fmt: skip
MODEL_NUMBERS = ("entropy", "effective_experts", "dead_expert_frac", "over_uniform", "between_tasks", "drift")
METHOD = ("representation", "router", "gate", "bank", "regularisers", "r", "num_experts", "num_heads",
          "router_scope", "top_k")  # fmt: skip
CONFLICT_NUMBERS = ("conflict_frac", "cosine", "same_task_cosine", "update_change")
AGAINST = ("adjusted_rand_index", "adjusted_mutual_information", "p_value", "num_groups", "num_tasks")
ARMS = ("experts", "disabled", "uniform")
TOP = 3  # experts of a task, tasks of an expert
CLEAR = 0.25  # a smaller silhouette shows no clusters worth the name (Kaufman and Rousseeuw 1990)
MOST_CLUSTERS, PAIRS = 12, 10


def narrowed(facts: Facts, pattern: str | None) -> Facts:
    """``facts`` of the routing groups that ``pattern`` names.

    It is a part of their names; with ``*`` and ``?``, as in names of files, it is the whole of one.

    Raises:
        FactsError: no group has such a name; says which are nearest.
    """
    if pattern is None:
        return facts
    whole = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = list(facts.snapshot.gates)
    kept = [name for name in names if fnmatchcase(name, whole)]
    if not kept:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        hint = f"the nearest of {len(names)} are {', '.join(near)}" if names else "it has none"
        raise FactsError(f"--layer: no routing group of {facts.source} is called {pattern!r}; {hint}")
    return replace(facts, snapshot=_only(facts.snapshot, kept), first=_only(facts.first, kept))


def _only(snapshot: Any, names: Sequence[str]) -> Any:
    if snapshot is None:
        return None
    return Snapshot(snapshot.level, {n: snapshot.gates[n] for n in names if n in snapshot.gates})


def describe(facts: Facts) -> dict[str, Any]:
    """The object; what a method or a folder does not have is None or empty, never missing."""
    snapshot, first, last = facts.snapshot, facts.first, latest(facts.log)
    similarity_TT = routing.similarity(snapshot)
    overall = routing.metrics(snapshot, first)
    clusters = _clusters(facts, similarity_TT, overall)
    moe = facts.config.get("moe") or {}
    return {
        "source": str(facts.source),
        "kind": facts.kind,
        "step": facts.step,
        "run_name": facts.config.get("run_name"),
        "method": {key: moe.get(key) for key in METHOD},
        "level": snapshot.level,
        "verdicts": verdicts(snapshot, facts.tasks, first, facts.conflict, similarity_TT),
        "routing": {key: overall.get(f"routing/{key}") for key in MODEL_NUMBERS},
        "groups": _groups(facts),
        "tasks": _tasks(facts, last, similarity_TT, clusters["labels"]),
        "clusters": clusters,
        "conflicts": _conflicts(facts, last),
        "loss": last.get("train/loss"),
        "scores": {arm: ((facts.results or {}).get(arm) or {}).get("score") for arm in ARMS},
    }


def _groups(facts: Facts) -> dict[str, dict[str, Any]]:
    """{routing group: its numbers, those of each head where there are several, and its experts}."""
    result = {}
    for group, gates_THE in facts.snapshot.gates.items():
        _, H, E = gates_THE.shape
        before_THE = facts.first.gates.get(group) if facts.first is not None else None
        heads = [
            _numbers(gates_THE[:, [h]], None if before_THE is None else before_THE[:, [h]])
            for h in range(H if H > 1 else 0)
        ]
        about = {"num_experts": E, "num_heads": H, **_numbers(gates_THE, before_THE), "heads": heads}
        result[group] = {**about, "experts": _experts(gates_THE, facts.tasks)}
    return result


def _numbers(gates_THE: Tensor, before_THE: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = dict(routing.group_metrics(gates_THE, before_THE))
    if found:
        found["dead_experts"] = int(found["dead_experts"])
    return {key: found.get(key) for key in NUMBERS}


def _experts(gates_THE: Tensor, tasks: TaskTable) -> list[dict[str, Any]]:
    """Which tasks use each expert: its share, mean over tasks and heads, and the tasks that use it most."""
    p_TE = routing.shares(gates_THE).nanmean(1)
    values, ids = p_TE.nan_to_num(0.0).topk(min(TOP, len(p_TE)), dim=0)
    least = routing.dead_share(p_TE.shape[1])
    return [
        {
            "share": _number(p_TE[:, e].nanmean()),
            "tasks": [
                {"task": tasks[t].name, "share": v}
                for v, t in zip(values[:, e].tolist(), ids[:, e].tolist(), strict=True)
                if v >= least
            ],
        }
        for e in range(p_TE.shape[1])
    ]


def _tasks(
    facts: Facts, last: Mapping[str, Any], similarity_TT: Tensor, labels: Sequence[int | None]
) -> list[dict[str, Any]]:
    tops = _top_experts(facts)
    begun = latest(facts.log[::-1])  # the first value of every key
    scores_of: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        if key.count("/") >= 2 and key.startswith("eval/"):
            _, slug, name = key.split("/", 2)  # a metric may be of a label, which is any text: f1:yes/no
            scores_of.setdefault(slug, {})[name] = value
    rows = []
    for t, task in enumerate(facts.tasks):
        scores = scores_of.get(task.slug, {})
        metric = scores.pop("metric", None)
        rows.append(
            {
                "name": task.name,
                "slug": task.slug,
                "group": task.group,
                "cluster": labels[t],
                "nearest": _nearest(similarity_TT, t, facts),
                "top_experts": tops[t],
                "first_loss": begun.get(f"train/loss/{task.slug}"),
                "loss": last.get(f"train/loss/{task.slug}"),
                "tokens": last.get(f"train/tokens/{task.slug}"),
                "epochs": last.get(f"train/epochs/{task.slug}"),
                "effective_weight": last.get(f"weight/{task.slug}"),
                "loss_weight": last.get(f"train/weight/{task.slug}"),
                "metric": metric,
                "value": scores.get(metric) if metric else None,
                "metrics": scores,
            }
        )
    return rows


def _top_experts(facts: Facts) -> list[list[dict[str, Any]]]:
    """Of each task the experts with its largest shares, wherever they are.

    Where shares are alike to two places (one-hot gates), those come first that other tasks use least.
    """
    T = len(facts.tasks)
    places: list[tuple[str, int, int]] = []
    least: list[float] = []
    shares, over = [torch.empty(T, 0)], [torch.empty(T, 0)]
    for group, gates_THE in facts.snapshot.gates.items():
        p_THE = routing.shares(gates_THE)
        shares.append(p_THE.flatten(1))
        over.append((p_THE - p_THE.nanmean(0)).flatten(1))
        places += [(group, h, e) for h in range(p_THE.shape[1]) for e in range(p_THE.shape[2])]
        least += [routing.dead_share(p_THE.shape[2])] * (len(places) - len(least))
    p_TK, over_TK = torch.cat(shares, 1), torch.cat(over, 1)
    rank_TK = (p_TK.nan_to_num(-1.0) * 100).round() + over_TK.nan_to_num(0.0) / 4  # |over| < 1: a tie-break
    best = rank_TK.topk(min(TOP, rank_TK.shape[1]), dim=1).indices.tolist()
    return [
        [
            {**dict(zip(("group", "head", "expert"), places[k], strict=True)), "share": _number(p_TK[t, k])}
            for k in best[t]
            if p_TK[t, k] >= least[k]
        ]
        for t in range(T)
    ]


def _nearest(similarity_TT: Tensor, t: int, facts: Facts) -> dict[str, Any] | None:
    """The task that is routed most like this one."""
    if len(similarity_TT) < 2 or similarity_TT[t, t].isnan():
        return None
    row_T = similarity_TT[t].nan_to_num(-1.0)
    row_T[t] = -1.0
    other = int(row_T.argmax())
    return {"task": facts.tasks[other].name, "cosine": float(row_T[other])} if row_T[other] >= 0 else None


def _clusters(facts: Facts, similarity_TT: Tensor, overall: Mapping[str, float]) -> dict[str, Any]:
    """As many clusters of tasks as the routing suggests (best silhouette); one where it shows none.

    ``labels`` has None for tasks that have not been seen.
    """
    names = facts.tasks.names
    order: list[int] = []
    labels, score, against = [-1] * len(names), None, None
    if len(similarity_TT):
        tree = routing.cluster(similarity_TT)
        order, labels = tree.order, tree.labels(1)
        if overall.get("routing/between_tasks", 0.0) >= ALIKE:
            cut, score = _best_cut(tree, similarity_TT)
            labels = labels if score is not None and score < CLEAR else cut
        against = routing.against_groups(similarity_TT, [task.group for task in facts.tasks])
    members = [[names[t] for t in order if labels[t] == c] for c in range(max(labels) + 1)]
    return {
        "number": len(members) or None,
        "silhouette": score,
        "order": [names[t] for t in order],
        "members": members,
        "labels": [None if label < 0 else label for label in labels],
        "against_groups": against or dict.fromkeys(AGAINST),
    }


def _best_cut(tree: routing.Clustering, similarity_TT: Tensor) -> tuple[list[int], float | None]:
    """The cut into at most :data:`MOST_CLUSTERS` whose clusters lie furthest apart (Rousseeuw 1987)."""
    labels = tree.labels(1)
    seen = [t for t, label in enumerate(labels) if label >= 0]
    if len(seen) == 2:
        return tree.labels(2), None  # a silhouette needs a third
    distances = (1 - similarity_TT[seen][:, seen]).clamp(min=0).fill_diagonal_(0).numpy()
    best: tuple[list[int], float | None] = (labels, None)
    for k in range(2, min(MOST_CLUSTERS, len(seen) - 1) + 1):
        labels = tree.labels(k)
        cut = np.array([labels[t] for t in seen])
        if cut.max() + 1 == k:
            score = float(silhouette_score(distances, cut, metric="precomputed"))
            if best[1] is None or score > best[1]:
                best = (labels, score)
    return best


def _conflicts(facts: Facts, last: Mapping[str, Any]) -> dict[str, Any]:
    """What surgery saw of the tasks' gradients, and the pairs of rows that disagree most."""
    pairs = []
    if facts.conflict is not None:
        names = {task.slug: task.name for task in facts.tasks}
        rows = [[names.get(slug, slug) for slug in row] for row in facts.conflict[0]]
        cosines = facts.conflict[1]
        found = sorted(
            (cosines[i][j], i, j) for i, j in combinations(range(len(rows)), 2) if cosines[i][j] < 0
        )
        pairs = [{"tasks": rows[i], "others": rows[j], "cosine": c} for c, i, j in found[:PAIRS]]
    return {**{key: last.get(f"grad/{key}") for key in CONFLICT_NUMBERS}, "pairs": pairs}


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
