"""What each task's loss weighs in a step: ``task_weights`` times what ``balancing`` makes of the losses.

A step is :meth:`~StepBalancing.begin`, the backward passes with :meth:`~StepBalancing.add` after each,
:meth:`~StepBalancing.update`, the optimiser, :meth:`~StepBalancing.after_step`. A method sees only sums over
all ranks, taken in one reduction, so its weights are equal on all of them.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskmoe.moe import TaskError, TaskMoEModel, TaskTable
from taskmoe.train.balancing.balancer import BALANCERS, Balancer
from taskmoe.train.balancing.base import padded
from taskmoe.train.balancing.effective import corrected_twice, effective_weights
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Batch, Collator
from taskmoe.train.distributed import Ranks, all_sum
from taskmoe.train.meter import Meter
from taskmoe.train.objectives import IGNORE, Counts, count, model_inputs, task_sums, token_losses
from taskmoe.train.rng import rng_state, set_rng_state
from taskmoe.train.setup import Data

STATE = "balancing.pt"
_ROWS = 11  # keeps the draw of validation rows apart from other draws under the same seed


class StepBalancing:
    """The weights of a run's losses, over all its phases. Where there are ranks its methods are collectives.

    Args:
        validation: the rows for a method that learns from them.

    Raises:
        ConfigError: ``task_weights`` names no task, or the method's options do not fit the tasks.
    """

    def __init__(
        self, config: Config, tasks: TaskTable, ranks: Ranks, validation: ValidationRows | None = None
    ) -> None:
        self.config, self.tasks, self.ranks, self.validation = config, tasks, ranks, validation
        self.given_T = torch.ones(len(tasks), dtype=torch.float64)
        try:
            for name, weight in (config.task_weights or {}).items():
                self.given_T[tasks.id(name)] = weight
        except TaskError as error:
            raise ConfigError(f"task_weights: {error}") from error
        chosen = config.balancing
        self.balancer: Balancer | None = None
        if chosen.method is not None:
            self.balancer = Balancer(chosen.method, len(tasks), chosen.options, config.seed)
        self._sums_T = torch.zeros_like(self.given_T)  # of this rank, in this step
        self._weights_T = torch.zeros_like(self.given_T)  # since the last report
        self._steps = 0
        self._rng: dict[str, Any] | None = None

    # -- a step ----------------------------------------------------------------------------------------------

    def begin(self, step: int, model: TaskMoEModel) -> Tensor:
        """The weight of each task's loss in an optimiser step, fp64 [T] on the CPU."""
        if self.balancer is None:
            return self.given_T
        if self.validation is not None:
            self.balancer.on_validation(self.validation.losses(model, step))
        weights_T = self.given_T * self.balancer.weights(step)
        self._sums_T.zero_()
        self._weights_T += weights_T
        self._steps += 1
        self._rng = rng_state() if self.balancer.needs_second_forward else None
        return weights_T

    def add(self, sums_T: Tensor) -> None:
        """A micro-batch's loss sums without weights, [T], this rank's."""
        self._sums_T += sums_T.cpu()

    def update(self, counts: Counts) -> None:
        """Learn from the step's losses, before the weights move.

        Args:
            counts: of the whole step, over all ranks and micro-batches.

        Raises:
            BalancingError: a loss that is not finite, or that the method cannot use.
        """
        if self.balancer is not None:
            self.balancer.update(all_sum(self._sums_T), counts.tokens_T)

    def after_step(self, model: TaskMoEModel, batches: Sequence[Batch], counts: Counts) -> None:
        """After the optimiser's step: one more forward pass of the same rows, for a method that compares.

        Dropout falls as in the passes of the step (not where surgery gave each task a pass of its own).

        Raises:
            BalancingError: a loss that is not finite.
        """
        if self.balancer is None or self._rng is None:
            return
        now = rng_state()
        set_rng_state(self._rng)
        sums_T = torch.zeros_like(self.given_T)
        for batch in batches:
            sums_T += _sums(model, batch, self.config, self.ranks.device, len(self.tasks))
        set_rng_state(now)
        self.balancer.after_step(all_sum(sums_T), counts.tokens_T)

    # -- following along -------------------------------------------------------------------------------------

    def remarks(self, mixtures: Sequence[str]) -> list[str]:
        """What should be known before a run starts.

        Args:
            mixtures: ``mixing.strategy`` of each phase.
        """
        lines = []
        for mixing in dict.fromkeys(mixtures):
            twice = corrected_twice(
                mixing=mixing,
                reduction=self.config.loss_reduction,
                task_weights=self.config.task_weights,
                balancing=self.config.balancing.method,
                surgery=self.config.surgery.method,
            )
            if twice is not None:
                lines.append(twice)
                break
        if self.validation is not None and self.config.eval_split == "validation":
            lines.append(
                f"balancing.method: {self.config.balancing.method} learns from validation rows; "
                "report the test split"
            )
        return lines

    def report(
        self,
        rates: Sequence[float],
        meter: Meter,
        combined: Mapping[str, Any] | None = None,
        *,
        weighed: bool = True,
    ) -> dict[str, float]:
        """``weight/<slug>`` of each task: rate x weight x combination; weights are means since the last call.

        Args:
            rates: [T], shares of the tasks in the sequences drawn.
            meter: what has been seen, for the targets of a sequence.
            combined: metrics of surgery, of which ``train/weight/<slug>`` are used.
            weighed: False where surgery combines without a weight for each task: there is nothing to tell.
        """
        weights_T = self._weights_T / self._steps if self._steps else self.given_T
        tokens_T, samples_T = meter.all_tokens_T, meter.all_samples_T
        usual = tokens_T.sum() / samples_T.sum().clamp(min=1)
        lengths_T = torch.where(samples_T > 0, tokens_T / samples_T.clamp(min=1), usual)
        keys = [f"train/weight/{task.slug}" for task in self.tasks]
        combination_T = torch.tensor([float((combined or {}).get(key, 1.0)) for key in keys])
        effective_T = effective_weights(
            torch.tensor(rates, dtype=torch.float64),
            weights_T,
            combination_T,
            reduction=self.config.loss_reduction,
            tokens_T=lengths_T,
        )
        self._weights_T.zero_()
        self._steps = 0
        if not weighed:
            return {}
        return {f"weight/{t.slug}": float(w) for t, w in zip(self.tasks, effective_T, strict=True)}

    # -- saving and resuming ---------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint; nothing where there is no method."""
        if self.balancer is not None:
            state = {"balancer": self.balancer.state_dict(), "weights_T": self._weights_T.clone()}
            torch.save({**state, "steps": self._steps}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; tasks appended since begin as at the start of a run, and so does a method
        that the checkpoint was written without.

        Raises:
            ConfigError: the checkpoint has another method or seed, or fewer tasks are here.
        """
        path = folder / STATE
        if self.balancer is None or not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.balancer.load_state_dict(state["balancer"])
        self._weights_T = padded(state["weights_T"], torch.zeros_like(self.given_T))
        self._steps = int(state["steps"])


class ValidationRows:
    """A few validation rows of each task for each step, and their losses.

    Which rows is a function of (seed, step): the same for any number of ranks, and after a resume.

    Args:
        splits: the validation split of each task; those without rows have no loss.
        collate: rows -> batch, unpacked.

    Raises:
        ConfigError: no task has validation rows.
    """

    def __init__(self, splits: Sequence[TaskSplit], collate: Collator, config: Config, ranks: Ranks) -> None:
        self.splits, self.collate, self.config, self.ranks = splits, collate, config, ranks
        if not any(len(s.tokens) for s in splits):
            method = config.balancing.method
            raise ConfigError(
                f"balancing.method: {method!r} learns from validation rows, and no task has any; "
                "give a validation split, or choose another method"
            )

    def rows(self, step: int) -> list[tuple[int, int]]:
        """[(task, row)], ``balancing.validation_rows`` of each task."""
        draw = np.random.default_rng([self.config.seed, step, _ROWS])
        wanted = self.config.balancing.validation_rows
        sizes = [(split.task, len(split.tokens)) for split in self.splits if len(split.tokens)]
        return [(t, r) for t, size in sizes for r in draw.integers(0, size, wanted).tolist()]

    def losses(self, model: TaskMoEModel, step: int) -> Tensor:
        """Mean loss over a task's targets, fp64 [T] on the CPU; nan for a task without any. A collective."""
        config, T = self.config, len(self.splits)
        rows, W, size = self.rows(step), self.ranks.world_size, self.config.per_device_eval_batch_size
        mine = rows[self.ranks.rank :: W]
        found_2T = torch.zeros(2, T, dtype=torch.float64)
        training = model.training
        model.eval()
        # Under ZeRO-3 ranks meet in every pass, so all make as many.
        for start in range(0, -(-len(rows) // W), size):
            part = mine[start : start + size]
            batch = self.collate([{**self.splits[t].tokens[r], "task": t} for t, r in part or rows[:1]])
            if not part:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE)
            found_2T[0] += _sums(model, batch, config, self.ranks.device, T)
            found_2T[1] += count(batch, config.task_type, T).tokens_T
        model.train(training)
        sums_T, tokens_T = all_sum(found_2T)
        return sums_T / tokens_T  # 0 / 0 is the nan of a task without targets


def build_balancing(config: Config, data: Data, ranks: Ranks) -> StepBalancing:
    """The weights of a run's losses.

    Raises:
        ConfigError: as :class:`StepBalancing` and :class:`ValidationRows`.
    """
    bundle, packed = data.bundle, data.collator
    validation = None
    if learns_from_validation(config):
        # Rows are few, and their number is what counts: they are padded where training packs them.
        collate = Collator(data.tokenizer, config.task_type, packed.n_tasks, packed.label_counts)
        validation = ValidationRows(bundle.splits["validation"], collate, config, ranks)
    return StepBalancing(config, bundle.tasks, ranks, validation)


def learns_from_validation(config: Config) -> bool:
    """Whether the validation split is needed for training."""
    method = config.balancing.method
    return method is not None and BALANCERS[method].needs_validation


def _sums(model: TaskMoEModel, batch: Batch, config: Config, device: torch.device, n_tasks: int) -> Tensor:
    """Loss sums of a batch without weights, fp64 [T] on the CPU; no graph is built."""
    with torch.no_grad():
        logits = model(**model_inputs(batch, config.task_type, model.config, device)).logits
        losses_n, tasks_n, _ = token_losses(logits, batch, config.task_type, config.label_smoothing_factor)
    return task_sums(losses_n, tasks_n, n_tasks).cpu()
