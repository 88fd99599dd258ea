"""Surgery inside an engine's step: which rows there are, which weights hold, and what is told about it.

Between two refreshes the weights of the last one are used again, by one backward pass. What is exact then:
``fused`` weighs each task's part inside the banks' backward, so every parameter gets what a full step with
these weights would give. ``separate`` weighs the losses, which also weighs what belongs to one task alone;
that is divided out again, so weights near zero need a full step, and every shared parameter must be in scope.
A step that holds a task without a weight is a full one.

Legend: T tasks, R rows of J.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe import TaskMoEModel
from taskmoe.train.choices import check_same
from taskmoe.train.config import ConfigError, SurgeryConfig
from taskmoe.train.distributed import Ranks, all_max
from taskmoe.train.objectives import Counts
from taskmoe.train.surgery.choose import choose
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.direct import DirectSurgery
from taskmoe.train.surgery.rows import check_tasks, fold
from taskmoe.train.surgery_log import Seen
from taskmoe.train.task_gradients import TaskGradients
from taskmoe.train.task_scope import find_scope

STATE = "surgery.pt"
SMALLEST_WEIGHT = 1e-3  # that a private gradient may be divided by


class StepSurgery:
    """One phase's surgery. Its methods are collectives where there are ranks.

    Raises:
        ConfigError: as :class:`~taskmoe.train.task_gradients.TaskGradients`, or ``refresh_every`` where the
            weights of a step cannot be used again exactly, or a method that does not fit the tasks.
    """

    def __init__(
        self,
        config: SurgeryConfig,
        model: TaskMoEModel,
        ranks: Ranks,
        seed: int,
        gathered: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager],
        stage: int = 0,
    ) -> None:
        assert config.method is not None
        self.config, self.seed, self.tasks = config, seed, model.tasks
        self.method = choose(config.method, config.options, seed)
        check_tasks(self.method, len(model.tasks), config.max_tasks)
        self.gradients = TaskGradients(
            model, way=config.way, scope=config.scope, seed=seed, ranks=ranks, gathered=gathered
        )
        # ZeRO-3 lets a graph's weights go in its first backward pass; a retained one cannot run again.
        self.way = "slices" if stage == 3 and self.gradients.way == "separate" else self.gradients.way
        self.turns: list[list[int]] = []  # the tasks of each micro-batch's passes; as many on all ranks
        self.step = 0
        self.present: list[int] = []  # tasks with a target in the step, over all ranks
        self._kept: dict[str, dict[int, float]] = {}
        self._kept_at = self._reported = 0
        self._reuse = False
        self._due = False  # cosines of halves of tasks, at the next step that can give them
        self.seen = Seen(self.tasks)
        self._check_refresh()

    def _check_refresh(self) -> None:
        if self.config.refresh_every == 1:
            return
        where = f"surgery.refresh_every: {self.config.refresh_every}"
        if isinstance(self.method, DirectSurgery):
            raise ConfigError(f"{where}: {self.method.name!r} has no weights to use again; set it to 1")
        if self.way != "fused" and (self.gradients.scope.rest or self.config.scope == "layer"):
            raise ConfigError(
                f"{where}: with one backward pass a task, weights are used again by weighing the losses, "
                "which reaches every parameter alike; set it to 1, or scope to all"
            )

    def begin(self, step: int, counts: Counts, parts: Sequence[Counts]) -> None:
        """A step begins.

        Args:
            step: of the optimiser.
            counts: of the whole step; parts: of this rank's micro-batches.
        """
        self.step = step
        self.present = present = (counts.tokens_T > 0).nonzero().squeeze(1).tolist()
        fresh = step - self._kept_at < self.config.refresh_every
        known = [kept.get(t) for kept in self._kept.values() for t in present]
        usable = all(w is not None for w in known)
        if usable and self.way != "fused":
            usable = all(abs(w) >= SMALLEST_WEIGHT for w in known if w is not None)
        self._reuse = bool(self._kept and present) and fresh and usable
        # Kept weights are each task's own: rows that tasks share now are not those that they shared then.
        most = None if self._reuse else self.config.max_tasks
        rows = fold(present, most, self.seed, step)
        self.seen.folded = self.seen.folded or len(rows) > len(set(rows.values()))
        fused, every = self.way == "fused", self.config.matrix_steps
        self._due = self._due or (every is not None and (step + 1) % every == 0)
        halves = self._due and fused and not self._reuse and bool(present)
        self._due = self._due and not halves
        self.gradients.begin(rows, self._kept if self._reuse and fused else None, halves)
        here = [(part.tokens_T > 0).nonzero().squeeze(1).tolist() for part in parts]
        # Under ZeRO-3 ranks meet in every pass, so all make as many as the one with the most tasks.
        passes = all_max(torch.tensor([max(1, len(tasks)) for tasks in here])).tolist()
        padded = [[*tasks, *(t for t in present if t not in tasks)] for tasks in here]
        self.turns = [tasks[:n] for tasks, n in zip(padded, passes, strict=True)]

    def enter(self, index: int) -> None:
        """A micro-batch begins, the ``index``-th of the step."""
        if self.gradients.halves is not None:
            self.gradients.halves = self.gradients.matrix.rank + index

    @property
    def one_pass(self) -> bool:
        """Whether one backward pass a micro-batch will do."""
        return self.way == "fused" or self._reuse or not self.present

    @property
    def weighs(self) -> bool:
        """Whether each task has a weight; some methods combine entry by entry, or layer by layer."""
        return isinstance(self.method, Surgery)

    def loss_weights(self, weights_T: Tensor) -> Tensor:
        """The losses' weights [T] in this step."""
        if not (self._reuse and self.way != "fused"):
            return weights_T
        (kept,) = self._kept.values()
        return weights_T * torch.tensor([kept.get(t, 1.0) for t in range(len(weights_T))]).to(weights_T)

    def finish(self) -> None:
        """After the last backward pass, before the engine reduces: hand the combination in."""
        if not self.present:
            return  # nothing to combine: the zeros of one plain pass stay
        if not self._reuse:
            combination = self.gradients.combine(self.method, self.step)
            self.seen.add(combination)
            if combination.weights is not None:
                rows = combination.rows
                self._kept = {
                    g: {t: float(w) for w, tasks in zip(w_R, rows, strict=True) for t in tasks}
                    for g, w_R in combination.weights.items()
                }
                self._kept_at = self.step
            return
        self.seen.add_weights(self._kept, self.present)
        if self.way == "fused":
            self.gradients.finish_weighted()
        else:
            self._divide_private()

    def _divide_private(self) -> None:
        (kept,) = self._kept.values()
        for p, axis in self.gradients.scope.private.values():
            for task, weight in kept.items():
                if p.grad is not None and abs(weight) >= SMALLEST_WEIGHT:
                    p.grad.select(axis, task).div_(weight)

    # -- following along -------------------------------------------------------------------------------------

    def report(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """Metrics since the last report, and lines to print; ``step`` optimiser steps are done."""
        every = self.config.matrix_steps
        whole = every is not None and step // every > self._reported // every
        self._reported = step
        return self.seen.read(whole)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        torch.save(self.state_dict(), folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; one without the file was written without surgery.

        Raises:
            ConfigError: of another method, seed, scope or other options.
        """
        if (folder / STATE).is_file():
            self.load_state_dict(torch.load(folder / STATE, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, equal on all ranks."""
        return {
            "method": self.method.state_dict(),
            "scope": self.config.scope,
            "options": self.method.options,
            "kept": {g: {str(t): w for t, w in kept.items()} for g, kept in self._kept.items()},
            "kept_at": self._kept_at,
            "reported": self._reported,
            "due": self._due,
            "seen": self.seen.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ConfigError: of another method, seed, scope or other options.
        """
        check_same("surgery.scope", state.get("scope", self.config.scope), self.config.scope)
        own = self.method.options
        check_same("surgery.options", _grown(state.get("options", own), own), own)
        self.method.load_state_dict(state["method"])
        self._kept = {g: {int(t): w for t, w in kept.items()} for g, kept in state["kept"].items()}
        self._kept_at, self._reported = int(state["kept_at"]), int(state["reported"])
        self._due = bool(state["due"])
        self.seen.load_state_dict(state["seen"])


def _grown(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the weights that this run has for tasks appended since."""
    if "weights" not in options or "weights" not in own:
        return dict(options)
    weights = list(options["weights"])
    return {**options, "weights": [*weights, *own["weights"][len(weights) :]]}


def surgery_line(config: SurgeryConfig, surgery: StepSurgery | None) -> str | None:
    """What a phase is told about its surgery; None where none was asked for."""
    if config.method is None:
        return None
    if surgery is None:
        return f"surgery: nothing that tasks share trains in scope {config.scope!r}; gradients are summed"
    columns = sum(shape.numel() for shape in surgery.gradients.matrix.shapes.values())
    return f"surgery: {config.method}, {surgery.way}, of {columns:,} parameters that tasks share"


def build_surgery(
    config: SurgeryConfig,
    model: TaskMoEModel,
    ranks: Ranks,
    seed: int,
    gathered: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager],
    stage: int = 0,
) -> StepSurgery | None:
    """The surgery of a phase; None where there is no method, or nothing shared in scope trains."""
    if config.method is None or not find_scope(model, config.scope).shared:
        return None
    return StepSurgery(config, model, ranks, seed, gathered, stage)
