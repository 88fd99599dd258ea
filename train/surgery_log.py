"""What surgery did to a phase's updates, as the log tells it.

Legend: R rows of J.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe import TaskTable
from taskmoe.train.combination import Combination
from taskmoe.train.surgery.gramian import conflict_fraction, cosines, inactive, update_change


class Seen:
    """What combinations did since the last :meth:`read`: means over the steps that made one."""

    def __init__(self, tasks: TaskTable) -> None:
        self.tasks = tasks
        self.folded = False  # some step so far had rows that tasks share
        self._told_folded = self._told_inactive = False
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, list[float]] = {}  # {metric: [sum, number]}
        self._last: dict[str, Any] = {}

    def add(self, combination: Combination) -> None:
        """Count a step in; with one Gramian a layer, fractions are means over layers."""
        for group, G_RR in combination.gramians.items():
            self._mean("grad/conflict_frac", conflict_fraction(G_RR))
            C_RR = cosines(G_RR)
            self._mean("grad/cosine", float(C_RR[torch.triu(torch.ones_like(C_RR), 1) > 0].nanmean()))
            if combination.weights is None:
                continue
            w_R = combination.weights[group].tolist()
            own = {t: w for w, tasks in zip(w_R, combination.rows, strict=True) for t in tasks}
            self.add_weights({group: own}, own)
        total = torch.stack(list(combination.gramians.values()))
        self._last = {
            "grad/rows": [[self.tasks[t].slug for t in tasks] for tasks in combination.rows],
            "grad/cosine_matrix": cosines(total.sum(0)).tolist(),
        }
        if combination.same_task is not None:
            self._mean("grad/same_task_cosine", float(combination.same_task.nanmean()))
        if combination.weights is not None:
            self._mean("grad/update_change", _change(combination.gramians, combination.weights))

    def add_weights(self, weights: Mapping[str, Mapping[int, float]], tasks: Iterable[int]) -> None:
        """Count in what a step gave to these tasks: {group of parameters: {task id: weight}}."""
        for own in weights.values():
            for task in tasks:
                self._mean(f"train/weight/{self.tasks[task].slug}", own[task])

    def _mean(self, key: str, value: float) -> None:
        if math.isfinite(value):
            total = self._sums.setdefault(key, [0.0, 0])
            total[0] += value
            total[1] += 1

    def read(self, whole: bool) -> tuple[dict[str, Any], list[str]]:
        """(metrics, lines to print, each once a phase or when it changes).

        ``whole``: with the cosine of every pair of rows, of the last step.
        """
        metrics: dict[str, Any] = {k: total / n for k, (total, n) in self._sums.items()}
        if whole:
            metrics.update(self._last)
        lines = []
        change = metrics.get("grad/update_change")
        if change is not None and inactive(change) != self._told_inactive:
            self._told_inactive = inactive(change)
            state = "inactive" if self._told_inactive else "active again"
            lines.append(f"surgery is {state}: it changes the update by {100 * change:.2g} %")
        if self.folded and not self._told_folded:
            self._told_folded = True
            lines.append("surgery.max_tasks: tasks share rows, drawn anew each step")
        self._clear()
        return metrics, lines

    def state_dict(self) -> dict[str, Any]:
        told = [self.folded, self._told_folded, self._told_inactive]
        return {"sums": self._sums, "last": self._last, "told": told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {k: list(v) for k, v in state["sums"].items()}
        self._last = dict(state["last"])
        self.folded, self._told_folded, self._told_inactive = state.get("told", [False] * 3)


def _change(gramians: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """The change of the whole update: squares add up over the groups of parameters."""
    moved = plain = 0.0
    for group, G_RR in gramians.items():
        whole = float(G_RR.sum().clamp(min=0))
        change = update_change(G_RR, weights[group])
        moved += change**2 * whole if whole > 0 else 0.0
        plain += whole
    return math.sqrt(moved / plain) if plain > 0 else 0.0
