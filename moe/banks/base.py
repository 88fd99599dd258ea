"""What all kinds of experts have in common.

A kind is a member of ``BANKS`` (``moe/banks/kinds.py``) with ``uses`` (the settings it reads), ``levels``
(which gates it takes: ``task``, ``token``), perhaps ``Options``, and ``place``: where its experts go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel


class Bank(nn.Module):
    """A module that holds parameters of experts or of token-level routers.

    kind: their group for the optimiser. splits: whether they go through ``gate.split``, so that one backward
    pass gives each task's gradient. task_dims: the axis of the tasks of each parameter that has one. Its
    persistent buffers are saved with the adapter. by_expert: the parameters that lie by expert first, which
    terms about pairs of experts read. moving: those that training moves, as no optimiser does: a
    phase that starts the bank's group anew starts them too.
    """

    kind: ClassVar[str] = "experts"  # or router
    splits: ClassVar[bool] = False
    frozen: bool = False  # it never trains, whatever a phase trains
    weighs_all: ClassVar[bool] = False  # a further expert changes the rest, even with a gate of zero
    task_dims: ClassVar[dict[str, int]] = {}
    by_expert: ClassVar[tuple[str, ...]] = ()
    moving: ClassVar[tuple[str, ...]] = ()

    def begin(self, experts: Bank) -> None:
        """Called on a router of tokens once the experts of its layer came with values, or were loaded."""

    def after_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Called once after each optimiser step, on all ranks; add_up: the sum of a tensor over the ranks."""


class Placement(NamedTuple):
    """What goes where.

    replaced: {name of a module of the model: what takes its place}. groups: names of the routing groups in
    the order of the model; a module reads ``context.gates[i]`` of its group i. not_run: targets left out
    because a forward pass never runs them.
    """

    replaced: dict[str, nn.Module]
    groups: list[str]
    not_run: list[str]


class BankKind(Protocol):
    """A member of ``BANKS``."""

    uses: ClassVar[tuple[str, ...]]
    levels: ClassVar[tuple[str, ...]]

    @staticmethod
    def place(
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """Build the experts for ``model`` without changing it.

        Raises:
            ConfigError: settings that do not fit the model; patterns that match nothing.
        """
        ...


def prepare(kind: Any, attached: TaskMoEModel) -> None:
    """Let a kind that needs the wrapped model finish (prompts enter at its inputs)."""
    if hasattr(kind, "prepare"):
        kind.prepare(attached)
