"""The weight of each task's loss in a step: the methods, and one object to call.

The methods were written for a loss sum_t w_t l_t of task means (``loss_reduction: task``). With ``token`` the
task's share of the tokens multiplies w_t.

Shapes: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.base import Balancing, task_losses
from taskmoe.train.balancing.coba import CoBa
from taskmoe.train.balancing.learned import FAMO, Uncertainty
from taskmoe.train.balancing.static import DWA, Fixed, Random
from taskmoe.train.choices import build, check_same_run


class Balancer:
    """One way to weigh losses, equal on all ranks and after a resume: it sees reduced values only.

    A step is: ``weights``, forward and backward, ``update``, and ``after_step`` where
    ``needs_second_forward``; ``on_validation`` whenever validation losses are known.

    Args:
        name: a key of :data:`BALANCERS`.
        n_tasks: T.
        options: the method's keyword arguments.
        seed: integer >= 0; with the step it fixes all random choices.

    Raises:
        ConfigError: an unknown method or option, or an unusable value.
    """

    def __init__(
        self, name: str, n_tasks: int, options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        self.name, self.n_tasks, self.seed = name, n_tasks, int(seed)
        self.options = dict(options or {})
        self._method: Balancing = build("balancing", BALANCERS, name, self.options, n_tasks, self.seed)

    @property
    def needs_validation(self) -> bool:
        """Whether the method learns from ``on_validation``."""
        return self._method.needs_validation

    @property
    def needs_second_forward(self) -> bool:
        """Whether ``after_step`` must follow each ``update``, with the same rows."""
        return self._method.needs_second_forward

    def weights(self, step: int, sums_T: Tensor | None = None, counts_T: Tensor | None = None) -> Tensor:
        """The weight of each task's loss in a step, fp64 [T] on the CPU.

        Args:
            step: of the optimiser, >= 0.
            sums_T, counts_T: the step's own loss sums and targets [T], where they are known before the
                weights are needed (``famo`` uses them; absent tasks then get 0).
        """
        if sums_T is None or counts_T is None:
            return self._method.weights(step, None)
        return self._method.weights(step, task_losses(sums_T, counts_T))

    def update(self, sums_T: Tensor, counts_T: Tensor) -> None:
        """Learn from a step.

        Args:
            sums_T: [T], loss sums without weights, over all ranks and micro-batches.
            counts_T: [T], the targets they are sums over; 0 for an absent task.

        Raises:
            BalancingError: a loss that is not finite, or that the method cannot use.
        """
        self._method.update(task_losses(sums_T, counts_T))

    def after_step(self, sums_T: Tensor, counts_T: Tensor) -> None:
        """The same rows' losses after the optimiser's step; arguments and errors as for ``update``."""
        self._method.after_step(task_losses(sums_T, counts_T))

    def on_validation(self, losses_T: Tensor) -> None:
        """Learn from mean validation losses [T]; nan for a task without one."""
        self._method.on_validation(losses_T.detach().to("cpu", torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, fit for ``torch.load(weights_only=True)``."""
        known = {"name": self.name, "seed": self.seed, "n_tasks": self.n_tasks}
        return {**known, "method": self._method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run; tasks appended since begin as at the start of one.

        Raises:
            ConfigError: another method, another seed, or fewer tasks than the state holds.
        """
        check_same_run("balancing", state, self.name, self.seed)
        if state["n_tasks"] > self.n_tasks:
            raise ConfigError(
                f"balancing: the checkpoint balances {state['n_tasks']} tasks, this run has {self.n_tasks}; "
                "tasks may be appended, not removed"
            )
        self._method.load_state_dict(state["method"])


BALANCERS: dict[str, type[Balancing]] = {
    "fixed": Fixed,
    "random": Random,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "coba": CoBa,
    "famo": FAMO,
}
