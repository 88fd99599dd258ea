"""What the report draws, as plain values: the page gets it as JSON, and computes nothing but views of it.

Legend: T tasks, H heads, E experts, R rows of the Gramian.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report.learning import curves, finite, history, spaced, task_rows
from taskmoe.train.track.report.pack import pack_bytes
from taskmoe.train.track.routing import (
    UNSEEN_HEIGHT,
    Clustering,
    cluster,
    dead_share,
    group_metrics,
    map_2d,
    shares,
)

MAX_CELLS = 6_500_000  # bytes of gates: 1,000 tasks x 64 experts x 48 layers, now and at the start
MAX_COMPARED = 2_000  # tasks of which every pair is compared
MAX_STEMS = 200  # leaves of a tree that are drawn with their stems
LABEL = 36  # characters of a task's name beside a figure
OF_ROUTING = ("effective_experts", "over_uniform", "between_tasks", "drift", "entropy", "dead_expert_frac")
OF_CONFLICTS = ("conflict_frac", "cosine", "same_task_cosine", "update_change")
NO_LOG = "The log of the run (trainer_log.jsonl) does not lie beside this {kind}."


def payload(facts: Facts, similarity_TT: Tensor) -> dict[str, Any]:
    """{"tasks", "rows", "order", "routing", "similarity", "map", "tree", "conflict", "curves", "histories",
    "missing"}; the last one says of each figure that cannot be drawn why.

    similarity_TT: of ``facts.snapshot``.
    """
    seen = not bool(similarity_TT.diagonal().isnan().all())
    compared = similarity_TT if seen and 2 <= len(similarity_TT) <= MAX_COMPARED else None
    tree = None if compared is None else cluster(compared)
    names = labels(facts.tasks)
    found = {
        "tasks": {"label": names, "name": facts.tasks.names, "group": [task.group for task in facts.tasks]},
        "rows": task_rows(facts),
        "order": list(range(len(facts.tasks))) if tree is None else tree.order,
        "routing": _routing(facts.snapshot, facts.first) if seen else None,
        "similarity": None if compared is None else pack_bytes(compared, 0, 1),
        "map": None if compared is None else _map(compared),
        "tree": None if tree is None else dendrogram(tree),
        "conflict": _conflict(facts, names),
        "curves": curves(facts),
        "histories": {
            "routing": history(facts.log, [f"routing/{key}" for key in OF_ROUTING]),
            "conflict": history(facts.log, [f"grad/{key}" for key in OF_CONFLICTS]),
        },
    }
    return {**found, "missing": _missing(facts, found, seen)}


def labels(tasks: TaskTable) -> list[str]:
    """Names short enough to stand beside a figure, and still different."""
    found: list[str] = []
    taken: set[str] = set()
    for i, task in enumerate(tasks):
        name = re.sub(r"\s+", " ", task.name).strip()
        if len(name) > LABEL:
            name = f"{name[: LABEL - 14]}…{name[-13:]}"
        if name in taken:
            name = f"{name} #{i}"
        taken.add(name)
        found.append(name)
    return found


def dendrogram(tree: Clustering) -> dict[str, list[float | None]]:
    """The tree's lines: ``place`` (the leaf's position in the order) against ``height`` (1 - cosine).

    Four points for each join, then None. Tasks that have not been seen have no branch. Where leaves are very
    many they have no stem, for one would see nothing else.
    """
    T = len(tree.order)
    place = {task: float(i) for i, task in enumerate(tree.order)}
    height = dict.fromkeys(place, 0.0)
    lines: dict[str, list[float | None]] = {"place": [], "height": []}
    for node, (left, right, top, _) in enumerate(tree.linkage.tolist(), start=T):
        a, b = int(left), int(right)
        if T > MAX_STEMS:
            height.update((leaf, top) for leaf in (a, b) if leaf < T)
        place[node], height[node] = (place[a] + place[b]) / 2, top
        if top < UNSEEN_HEIGHT:
            lines["place"] += [place[a], place[a], place[b], place[b], None]
            lines["height"] += [round(h, 4) for h in (height[a], top, top, height[b])] + [None]
    return lines


def _routing(snapshot: Snapshot, first: Snapshot | None) -> dict[str, Any]:
    """The groups that have gates of a task, each with its numbers, and the shares of those that fit."""
    gates = {name: g for name, g in snapshot.gates.items() if not bool(shares(g).isnan().all())}
    start = {} if first is None else {n: g for n, g in first.gates.items() if n in gates}
    start = {n: g for n, g in start.items() if g.shape[1:] == gates[n].shape[1:]}
    cells = sum(g.numel() for g in gates.values())
    fits = cells + sum(g.numel() for g in start.values()) <= MAX_CELLS
    drawn = set(spaced(list(gates), max(1, len(gates) * MAX_CELLS // max(cells, MAX_CELLS))))
    notes = []
    if len(drawn) < len(gates):
        notes.append(f"{len(drawn)} of {len(gates)} layers, evenly spaced, so that the file stays small")
    if start and not fits:
        notes.append("the start is left out, so that the file stays small")
    short = short_names(list(gates))
    groups = []
    for name, now_THE in gates.items():
        then_THE = start.get(name)
        groups.append(
            {
                "name": name,
                "label": short[name],
                "heads": now_THE.shape[1],
                "experts": now_THE.shape[2],
                "now": _pack_shares(now_THE, len(now_THE)) if name in drawn else None,
                "start": None if then_THE is None or not fits else _pack_shares(then_THE, len(now_THE)),
                **_numbers(now_THE, then_THE),
            }
        )
    return {
        "level": snapshot.level,
        "groups": groups,
        "largest": _largest([*gates.values(), *start.values()]),
        "note": "; ".join(notes),
    }


def _largest(gates: Sequence[Tensor]) -> float | None:
    """The end of the one scale of all layers; never so small that equal shares look like a choice."""
    found = [max(float(shares(g).nan_to_num(0.0).max()), 3 / g.shape[-1]) for g in gates]
    return finite(min(1.0, max(found)))


def _numbers(now_THE: Tensor, then_THE: Tensor | None) -> dict[str, Any]:
    """Numbers of the whole group and of each head, and which experts are dead."""
    of_heads = []
    if now_THE.shape[1] > 1:
        starts = [None] * now_THE.shape[1] if then_THE is None else then_THE.split(1, dim=1)
        of_heads = [
            group_metrics(now, then) for now, then in zip(now_THE.split(1, dim=1), starts, strict=True)
        ]
    largest_E = shares(now_THE).nan_to_num(0.0).amax((0, 1))
    dead = (largest_E < dead_share(len(largest_E))).nonzero().flatten().tolist()
    return {
        "numbers": _rounded(group_metrics(now_THE, then_THE)),
        "of_heads": [_rounded(numbers) for numbers in of_heads],
        "dead": dead,
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: finite(value) for key, value in numbers.items()}


def _pack_shares(gates_THE: Tensor, T: int) -> str:
    """Of ``T`` tasks; those that were added since are unknown."""
    missing_THE = torch.full((T - len(gates_THE), *gates_THE.shape[1:]), torch.nan)
    return pack_bytes(torch.cat([shares(gates_THE), missing_THE]), 0, 1)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The names without what they all begin with, cut at dots.

    >>> short_names(["model.layers.0.up", "model.layers.1.up"])
    {'model.layers.0.up': '0.up', 'model.layers.1.up': '1.up'}
    """
    parts = [name.split(".") for name in names]
    common = 0
    while len(parts) > 1 and len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return {name: ".".join(p[common:]) or name for name, p in zip(names, parts, strict=True)}


def _map(similarity_TT: Tensor) -> list[list[float | None]]:
    return [[finite(x), finite(y)] for x, y in map_2d(similarity_TT).tolist()]


def _conflict(facts: Facts, names: Sequence[str]) -> dict[str, Any] | None:
    """Rows by their tasks' labels; ``tasks``: the ids of rows of one task each, else None."""
    if facts.conflict is None or len(facts.conflict[0]) < 2:
        return None
    rows, cosines = facts.conflict
    ids = {task.slug: i for i, task in enumerate(facts.tasks)}
    single = all(len(row) == 1 and row[0] in ids for row in rows)
    return {
        "labels": [" + ".join(names[ids[slug]] if slug in ids else slug for slug in row) for row in rows],
        "tasks": [ids[row[0]] for row in rows] if single else None,
        "cosines": pack_bytes(np.array(cosines, dtype=float).reshape(len(rows), len(rows)), -1, 1),
    }


def _missing(facts: Facts, found: Mapping[str, Any], seen: bool) -> dict[str, str]:
    """{figure: why it is not there}."""
    T, log = len(facts.tasks), NO_LOG.format(kind=facts.kind) if not facts.log else None
    routing = None
    if facts.snapshot.level == "none":
        routing = "No experts of this model take gates: there is no routing to see."
    elif not seen:
        routing = "No task has been seen yet: layers route tokens here, and none was recorded."
    pairs = routing
    if not routing and found["similarity"] is None:
        few = "It takes two tasks to compare any."
        pairs = few if T < 2 else f"{T:,} tasks are more than are compared pair by pair ({MAX_COMPARED:,})."
    why = dict.fromkeys(("gates", "layers", "expert"), routing) | dict.fromkeys(("similarity", "map"), pairs)
    if not pairs and T < 3:
        why["map"] = "Two tasks make no map; see their similarity."
    if found["histories"]["routing"] is None:
        why["history"] = routing or log or "The run logged no routing yet."
    unknown = "The tasks' gradients were not kept apart in this run; with surgery.method they are."
    if facts.conflict is not None and found["conflict"] is None:
        why["conflict"] = "The last step recorded had the gradient of one task alone."
    elif found["conflict"] is None and found["histories"]["conflict"]:
        why["conflict"] = (
            "The cosines of all pairs were not logged: surgery.matrix_steps says how often they are."
        )
    elif found["conflict"] is None:
        why["conflict"] = log or unknown
    if found["histories"]["conflict"] is None:
        why["conflict_history"] = log or unknown
    if not found["curves"]:
        why["curves"] = log or "The run has logged no step yet."
    return {figure: reason for figure, reason in why.items() if reason}
