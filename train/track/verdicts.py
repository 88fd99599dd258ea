"""What there is to say about a run's routing, in plain sentences: terminal, wandb and report print the same.

Each verdict gives the number that it rests on and the threshold, so that a reader may judge otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from taskmoe.moe import TaskTable
from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track.routing import against_groups, by_group, dead_share, metrics, similarity

UNIFORM = 0.01  # of a task's weight: nearer to equal shares than this is uniform
ALIKE = 0.01  # of ``between_tasks``: under this, tasks are routed alike
UNMOVED = 0.01  # of a task's weight: a smaller drift is no change
RECOVERED = 0.65  # adjusted Rand index: moderate agreement or better (Steinley 2004)
CHANCE = 0.05  # p value: agreement with groups that is as likely as this may be chance
OPPOSED = -0.05  # cosine of two tasks' gradients: nearer to zero is no conflict
_NAMED = 3  # groups, or pairs of tasks, that a sentence names


def verdicts(
    snapshot: Snapshot,
    tasks: TaskTable,
    first: Snapshot | None = None,
    conflict: tuple[Sequence[Sequence[str]], Sequence[Sequence[float | None]]] | None = None,
    similarity_TT: Tensor | None = None,
) -> list[str]:
    """Whether the router learned anything, dead experts, given groups, fighting tasks, and what changed.

    Args:
        tasks: of the snapshot; their groups are what the clusters are compared with.
        first: the routing at the start.
        conflict: (slugs of the tasks of each row, cosines of the rows' gradients), as ``grad/rows`` and
            ``grad/cosine_matrix`` of the log.
        similarity_TT: of the snapshot, where it is known already.
    """
    found = metrics(snapshot, first)
    if snapshot.level == "none":
        lines = ["No experts take gates: there is no routing to see."]
    elif not found:
        lines = ["No task has been seen yet: its routing is not known."]
    else:
        if similarity_TT is None:
            similarity_TT = similarity(snapshot)
        lines = [
            *_unseen(similarity_TT),
            *_learned(snapshot, found),
            *_dead(snapshot),
            *_groups(similarity_TT, tasks),
            *_changed(snapshot, first, found),
        ]
    return [*lines, _conflict(tasks, conflict)]


def _unseen(similarity_TT: Tensor) -> list[str]:
    unknown = int(similarity_TT.diagonal().isnan().sum())
    if not unknown:
        return []
    return [f"{unknown} of {len(similarity_TT)} tasks have not been seen: their routing is not known."]


def _learned(snapshot: Snapshot, found: dict[str, float]) -> list[str]:
    subject = {"task": "Routing", "token": "Token routing, averaged over each task's tokens,"}[snapshot.level]
    most = max(gates.shape[-1] for gates in snapshot.gates.values())
    over, between = found["routing/over_uniform"], found["routing/between_tasks"]
    state = "uniform" if over < UNIFORM else "not uniform"
    lines = [
        f"{subject} is {state}: {_percent(over)} of a task's weight lies elsewhere than in equal shares "
        f"(uniform: under {_percent(UNIFORM)}); a task uses {found['routing/effective_experts']:.1f} of "
        f"{most} experts in effect."
    ]
    if max(len(gates) for gates in snapshot.gates.values()) > 1:
        state = "alike" if between < ALIKE else "differently"
        lines.append(
            f"Tasks are routed {state}: the experts tell {_percent(between)} of what they could about the "
            f"task (alike: under {_percent(ALIKE)})."
        )
    return lines


def _dead(snapshot: Snapshot) -> list[str]:
    dead = {group: int(n["dead_experts"]) for group, n in by_group(snapshot).items()}
    counts = {group: snapshot.gates[group].shape[-1] for group in dead}
    total, of, limits = sum(dead.values()), sum(counts.values()), [dead_share(E) for E in counts.values()]
    if not total:
        return [
            f"No expert is dead: each of the {of} has {_percent(min(limits))} of some task's weight or more."
        ]
    worst = sorted((g for g, n in dead.items() if n), key=lambda g: -dead[g])
    named = ", ".join(f"{group} ({dead[group]})" for group in worst[:_NAMED])
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return [f"{total} of {of} experts are dead, under {_percent(max(limits))} for every task: {named}{more}."]


def _groups(similarity_TT: Tensor, tasks: TaskTable) -> list[str]:
    found = against_groups(similarity_TT, [task.group for task in tasks])
    if found is None:
        return []
    k, n = int(found["num_groups"]), int(found["num_tasks"])
    rand, p = found["adjusted_rand_index"], found["p_value"]
    state = "does not recover" if p > CHANCE else "recovers" if rand >= RECOVERED else "recovers in part"
    return [
        f"Clustering by routing {state} the {k} given groups of {n} tasks: adjusted Rand index {rand:.2f} "
        f"(1: the same, 0: chance), p = {p:.3f}."
    ]


def _changed(snapshot: Snapshot, first: Snapshot | None, found: dict[str, float]) -> list[str]:
    drift = found.get("routing/drift")
    if first is None or drift is None:
        return ["What was learned is not known: there is no routing of the start to compare with."]
    if drift < UNMOVED:
        given = "; what differs between tasks was there then" * (found["routing/between_tasks"] >= ALIKE)
        return [
            f"Routing has not changed since the start{given}: {_percent(drift)} of a task's weight moved "
            f"(no change: under {_percent(UNMOVED)})."
        ]
    moved = {group: n["drift"] for group, n in by_group(snapshot, first).items() if "drift" in n}
    most = max(moved, key=lambda group: moved[group])
    place = f", most in {most} ({_percent(moved[most])})" * (len(moved) > 1)
    before = metrics(first)
    changes = (
        f"effective experts went from {before['routing/effective_experts']:.1f} to "
        f"{found['routing/effective_experts']:.1f}, what experts tell about the task from "
        f"{_percent(before['routing/between_tasks'])} to {_percent(found['routing/between_tasks'])}"
    )
    return [f"Since the start {_percent(drift)} of a task's weight moved{place}; {changes}."]


def _conflict(
    tasks: TaskTable, conflict: tuple[Sequence[Sequence[str]], Sequence[Sequence[float | None]]] | None
) -> str:
    known = "Which tasks fight is not known: "
    if conflict is None:
        return known + "no cosines of gradients are here (surgery.method and surgery.matrix_steps log them)."
    rows, matrix = conflict
    C_RR = np.array(matrix, dtype=float)  # null, or "nan" of the log, is a row without a gradient
    first_P, second_P = np.triu_indices(len(rows), 1)
    cosines_P = C_RR[first_P, second_P]
    order = np.argsort(cosines_P, kind="stable")
    order = order[~np.isnan(cosines_P[order])]
    if not len(order):
        return known + "no two of them had gradients in the last step recorded."
    names = {task.slug: task.name for task in tasks}
    labels = [" + ".join(names.get(slug, slug) for slug in row) for row in rows]
    count = int((cosines_P < OPPOSED).sum())
    if not count:
        return (
            f"No tasks fight: the lowest cosine of two gradients in the last step recorded is "
            f"{cosines_P[order[0]]:.2f} (conflict: under {OPPOSED})."
        )
    worst = [
        f"{labels[first_P[i]]} and {labels[second_P[i]]} ({cosines_P[i]:.2f})"
        for i in order[: min(count, _NAMED)]
    ]
    return (
        f"{count} of {len(order)} pairs of tasks fight, with gradients of a cosine under {OPPOSED} in the "
        f"last step recorded; most of all {', '.join(worst)}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
