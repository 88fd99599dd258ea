"""What one forward pass is about: the tasks of its rows, a Plan per row space, the gates.

Legend: B sequences, L positions, M rows (tokens), K d_in, T tasks, Tb tasks in this batch, H heads, E
experts, k slots a task.

A :class:`Context` belongs to one forward pass. It reaches the layers through a context variable and is
*captured* where activation checkpointing will recompute (:func:`bind`), never looked up at recompute: between
a forward and its backward other forwards may have run, with other tasks, and a backward may run on autograd's
own threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan
from taskmoe.moe.gate_bridge import GateBridge
from taskmoe.moe.parts import Split
from taskmoe.moe.tasks import TaskError

if TYPE_CHECKING:
    from taskmoe.moe.regularisation import Penalties
    from taskmoe.moe.snapshot import TokenGates


class RowSpaceError(ValueError):
    """Rows that cannot be assigned to tasks."""


@dataclass(frozen=True)
class Gate:
    """How the experts of one routing group combine.

    values: [Tb, H, k] float, the gates. slots: [Tb, H, k] int64, the expert behind each gate; None: k = E and
    gate j belongs to expert j. split: gives a bank the task axis that keeps the tasks' gradients apart; None:
    they are summed.
    """

    values: Tensor
    slots: Tensor | None = None
    split: Split | None = None


@dataclass(frozen=True)
class TokenGate:
    """How the experts of one layer combine for each of its rows.

    values: [M, k] float. slots: [M, k] int64, the expert behind each gate; None: k = E. split: as in
    :class:`Gate`.
    """

    values: Tensor
    slots: Tensor | None = None
    split: Split | None = None


class Context:
    """Tasks, plans and gates of one forward pass.

    Args:
        task_ids: id of the task of each sequence ([B]) or of each position ([B][L], packed rows).
        gates: one :class:`Gate` a routing group, rows in the order of :attr:`tasks`.
        enabled: False runs the base model alone.
        halves: not None: each task counts as two, of every other of its sequences (of packed rows: every
            other row); this number is added to theirs, so that one sequence alone may be in either half.
    """

    def __init__(
        self,
        task_ids: Sequence[Any],
        gates: Sequence[Gate] = (),
        enabled: bool = True,
        halves: int | None = None,
    ) -> None:
        self.packed = bool(task_ids) and isinstance(task_ids[0], (list, tuple))
        self.num_sequences = len(task_ids)
        self.length = len(task_ids[0]) if self.packed else None
        keys = _with_halves(task_ids, self.packed, halves)
        entries = sorted(set(keys))
        self.tasks = [t for t, _ in entries]  # ids of the tasks in this batch
        self.halves = [h for _, h in entries]
        index = {entry: i for i, entry in enumerate(entries)}
        self._row_index = [index[key] for key in keys]
        self.gates = list(gates)
        self.enabled = enabled
        self.bridge: GateBridge | None = None
        self.checkpointing = False
        self.split: Split | None = None  # for what routes tokens inside the layers
        self.temperature = 1.0
        self.uniform = False  # the control: every expert alike
        self.instances: Tensor | None = None  # [B, D], an embedding of each sequence
        self.penalties: Penalties | None = None  # terms that join the loss inside the layers
        self.recorder: TokenGates | None = None  # what to show the gates of tokens
        self.mask: Tensor | None = None  # [B, L], zero where a position is padding ...
        self.mask_part: str | None = None  # ... of this part of the model; None: of all
        self.vectors: Tensor | None = None  # [Tb, 1, D] of the tasks, for routers inside the layers
        self.shared: dict[int, Any] = {}  # between sibling linears, see moe/siblings.py
        self._plans: dict[int, Plan] = {}

    def enter(self, x: Tensor) -> Tensor:
        """``x`` (floating) as it enters the model: tied to the routers, fit for reentrant checkpointing."""
        if not torch.is_grad_enabled():
            return x
        if self.bridge is not None:
            return self.bridge(x)
        if self.enabled and self.checkpointing and not x.requires_grad:
            return x.detach().requires_grad_()  # reentrant checkpointing needs an input that requires grad
        return x

    def factors(self, *parameters: torch.nn.Parameter) -> tuple[Tensor, ...]:
        """Parameters with the task axis that an op takes, [G, *shape]: G = 1, or one a task for ``split``."""
        if self.split is None:
            return tuple(p.unsqueeze(0) for p in parameters)
        return self.split(*parameters)

    def task_ids(self, device: torch.device) -> Tensor:
        """:attr:`tasks` as int64 [Tb] on ``device``."""
        return torch.tensor(self.tasks).to(device, non_blocking=True)

    def task_vectors(self) -> Tensor:
        """[Tb, D], the vectors of :attr:`tasks` (for token-level routers that use ``representation``)."""
        assert self.vectors is not None
        return self.vectors.squeeze(1)

    def penalise(self, x: Tensor, name: str, value: Tensor) -> Tensor:
        """``x`` unchanged; in the backward pass regulariser ``name``, here ``value``, joins the loss."""
        return x if self.penalties is None else self.penalties.add(x, name, value)

    def record(self, module: torch.nn.Module, values: Tensor, slots: Tensor | None, plan: Plan) -> None:
        """Show the gates that a layer gives its rows (as in :class:`TokenGate`) to whoever follows them."""
        if self.recorder is not None:
            self.recorder.add(module, values, slots, self, plan)

    def text_rows(self, plan: Plan, name: str, like: Tensor) -> Tensor:
        """[M], one for a row of module ``name``, zero for padding; dtype and device of ``like``.

        Padding is known where the model was given an attention mask [B, L] and the rows are its positions;
        in an encoder-decoder that is the encoder.
        """
        inside = self.mask_part is None or self.mask_part in name.split(".")
        if self.mask is not None and inside and self.mask.numel() == plan.rows:
            return self.mask.reshape(-1).to(like.device, like.dtype)
        return torch.ones(plan.rows, dtype=like.dtype, device=like.device)

    def plan(self, lead: torch.Size | Sequence[int], name: str) -> Plan:
        """The Plan of a tensor whose leading shape is ``lead`` (rows are sequence-major).

        A batch of B sequences owns M / B consecutive rows each: M = B, B * L, B * beams * L. Packed batches
        know their positions, so M must be B * L.

        Raises:
            RowSpaceError: the rows cannot be split evenly over the sequences; names the module.
        """
        rows = 1
        for size in lead:
            rows *= size
        plan = self._plans.get(rows)
        if plan is None:
            if self.packed:
                if rows != len(self._row_index):
                    raise RowSpaceError(
                        f"{name}: {rows} rows (leading shape {tuple(lead)}) but task_ids name "
                        f"{len(self._row_index)} positions; packed batches reach only modules that keep "
                        "every position: exclude this one with exclude_modules"
                    )
                plan = Plan.from_rows(self._row_index, len(self.tasks))
            else:
                if rows == 0 or rows % self.num_sequences:
                    raise RowSpaceError(
                        f"{name}: {rows} rows (leading shape {tuple(lead)}) cannot be assigned to the "
                        f"{self.num_sequences} sequences of task_ids; exclude it with exclude_modules"
                    )
                plan = Plan.from_sequences(self._row_index, rows // self.num_sequences, len(self.tasks))
            self._plans[rows] = plan
        return plan


def _with_halves(task_ids: Sequence[Any], packed: bool, halves: int | None) -> list[tuple[Any, int]]:
    """(task, half) of each sequence or position; half 0 where tasks are not cut in two."""
    if packed:
        cut = 0 if halves is None else 1
        return [(t, cut * (b + (halves or 0)) % 2) for b, row in enumerate(task_ids) for t in row]
    if halves is None:
        return [(t, 0) for t in task_ids]
    seen: dict[Any, int] = {}
    keys = []
    for t in task_ids:
        seen[t] = seen.get(t, halves - 1) + 1
        keys.append((t, seen[t] % 2))
    return keys


_current: ContextVar[Context | None] = ContextVar("taskmoe_context", default=None)


def current(name: str) -> Context:
    """The context of the running forward pass, on behalf of module ``name``.

    Raises:
        TaskError: no forward pass of a TaskMoEModel is running.
    """
    context = _current.get()
    if context is None:
        raise TaskError(
            f"{name}: no tasks are known here. Call the model that attach() returned, with task_ids; "
            "inside your own activation checkpointing wrap the function with taskmoe.moe.bind"
        )
    return context


@contextmanager
def use(context: Context) -> Iterator[Context]:
    """Make ``context`` the current one for the body."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def bind(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the present context captured, for code that will run it again in backward."""
    context = _current.get()
    if context is None:
        return function

    @wraps(function, updated=())
    def bound(*args: Any, **kwargs: Any) -> Any:
        with use(context):
            return function(*args, **kwargs)

    return bound


def bind_checkpointing(modules: Sequence[torch.nn.Module]) -> None:
    """Wrap the checkpointing function that transformers put on ``modules``: recomputes keep their context."""
    for module in modules:
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not getattr(checkpoint, "_taskmoe_bound", False):
            module._gradient_checkpointing_func = _bound_checkpoint(checkpoint)  # type: ignore[assignment]


def _bound_checkpoint(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(bind(function), *args, **kwargs)

    run._taskmoe_bound = True  # type: ignore[attr-defined]
    return run
