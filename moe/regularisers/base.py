"""What a regulariser is, in three sorts, and how ``moe.regularisers`` is read.

``routing``: of the logits and gates of the tasks of an optimiser step. ``parameters``: of experts' (or token
routers') parameters alone. Both are functions of the weights, so they are back-propagated once a step, after
the tasks' gradients have been combined, outside the Gramian. ``activations``: of what passes through a layer;
its gradient arises in the backward pass of each micro-batch (:mod:`taskmoe.moe.penalties`).

Legend: S routing groups, Tb tasks of the step, H heads, E experts, M rows, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS
from taskmoe.moe.token_routing import TokenRouting

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel


@dataclass(frozen=True)
class Routed:
    """The task-level routing of one optimiser step.

    tasks: ids of the tasks with a target in the step, over all ranks and micro-batches. logits_STHE: [S, Tb,
    H, E]. gates_STHE: the same, zeros for experts that a top-k gate leaves out. shares_STHE: how a task's
    routing divides over the experts, summing to one and differentiable: the gates, or what they were before
    they were rounded or cut to k experts (``GateMethod.shares``).
    """

    tasks: Sequence[int]
    logits_STHE: Tensor
    gates_STHE: Tensor
    shares_STHE: Tensor
    temperature: float


@dataclass(frozen=True)
class Rows:
    """The rows of a layer that routes tokens.

    tasks_M: [M] int64, position of each row's task in ``tasks``. sequences_M: [M] int64, its sequence, out of
    ``sequences``; of packed rows: its run of rows of one task. weights_M: [M], one for a row, zero for
    padding.
    """

    tasks: Sequence[int]
    tasks_M: Tensor
    sequences: int
    sequences_M: Tensor
    weights_M: Tensor


class Regulariser:
    """A member of ``REGULARISERS``, built from ``(options, config, tasks)``.

    sort: routing | parameters | activations. absent: what a model lacks that has no place for it. couples:
    whether its gradient at a row of one task depends on rows of others in a way that is no constant of the
    batch. signed: whether a weight below zero makes sense.
    """

    sort: ClassVar[str]
    absent: ClassVar[str]
    couples: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def __init__(self, options: Any, config: TaskMoEConfig, tasks: TaskTable) -> None:
        self.options, self.config = options, config

    @classmethod
    def fits(cls, options: Any, config: TaskMoEConfig) -> bool:
        """Whether a model has a place for it, as far as settings tell; :meth:`enter` has the last word."""
        return True

    def enter(self, model: TaskMoEModel, name: str) -> int:
        """Find its place in an attached model, under its name; returns in how many places it is."""
        raise NotImplementedError


class OfRouting(Regulariser):
    """Of the task-level routing. State that it keeps goes through ``state``, {task id: tensor}."""

    sort: ClassVar[str] = "routing"
    absent: ClassVar[str] = "no router by task has parameters here"

    @classmethod
    def fits(cls, options: Any, config: TaskMoEConfig) -> bool:
        """A router by task is in use, and has parameters."""
        router = choices_in_use(config).get("router")
        return router in ROUTERS.values() and getattr(router, "trains", True)

    def enter(self, model: TaskMoEModel, name: str) -> int:
        router = model.routing.router
        return 0 if router is None else len(list(router.parameters()))

    def value(self, routed: Routed) -> Tensor:
        """A scalar, in the dtype of the logits."""
        raise NotImplementedError

    def state(self) -> dict[int, Tensor]:
        """What it remembers of each task."""
        return {}

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Go on from :meth:`state`."""


class OfParameters(Regulariser):
    """Of parameters of banks: ``reads`` says of which."""

    sort: ClassVar[str] = "parameters"
    absent: ClassVar[str] = "no experts here have what it is about, or there is only one"

    def __init__(self, options: Any, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        self.modules: list[nn.Module] = []

    def enter(self, model: TaskMoEModel, name: str) -> int:
        self.modules = [m for m in model.modules() if self.reads(m)]
        return len(self.modules)

    def reads(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of ``module`` that count; empty: none of its business."""
        raise NotImplementedError

    def value(self, modules: Sequence[nn.Module]) -> Tensor:
        """A scalar of the modules that it reads, at least one."""
        raise NotImplementedError


class OfTokens(Regulariser):
    """Of the routing of tokens in a layer; the term is the mean over layers."""

    sort: ClassVar[str] = "activations"
    absent: ClassVar[str] = "no layer routes tokens here; it needs a router by token"

    @classmethod
    def fits(cls, options: Any, config: TaskMoEConfig) -> bool:
        """A router by token is in use."""
        return choices_in_use(config).get("router") in TOKEN_ROUTERS.values()

    def enter(self, model: TaskMoEModel, name: str) -> int:
        return sum(isinstance(m, TokenRouting) for m in model.modules())

    def value(self, logits_ME: Tensor, gates_ME: Tensor, rows: Rows) -> Tensor:
        """logits_ME, gates_ME: [M, E] (zeros where an expert is left out) -> a scalar."""
        raise NotImplementedError


def pair_mean(values_EE: Tensor) -> Tensor:
    """Mean over e < f of the last two axes of [..., E, E], E at least 2: [...]."""
    E = values_EE.shape[-1]
    above_EE = torch.ones(E, E, dtype=torch.bool, device=values_EE.device).triu(1)
    return values_EE[..., above_EE].mean(-1)


def on_one_device(values: Sequence[Tensor]) -> Tensor:
    """Scalars of layers that may lie on several devices, as one tensor on the first."""
    return torch.stack([v.to(values[0].device) for v in values])


def read_weight(name: str, given: Any, signed: bool) -> tuple[float, dict[str, Any]]:
    """(weight, other options) of ``moe.regularisers.<name>``, a number or a mapping with ``weight``.

    Raises:
        ConfigError: neither, or a weight that is no finite number of the right sign.
    """
    key = f"moe.regularisers.{name}"
    options = dict(given) if isinstance(given, Mapping) else {"weight": given}
    if "weight" not in options:
        raise ConfigError(f"{key}.weight: is missing; say what the term is multiplied by")
    weight = options.pop("weight")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError(f"{key}: {weight!r} is no weight; give a number, or a mapping with weight")
    if weight == 0 or (weight < 0 and not signed):
        wanted = "other than 0" if signed else "above 0"
        raise ConfigError(f"{key}: a weight of {weight}; give a number {wanted}, or leave the term out")
    return float(weight), options
