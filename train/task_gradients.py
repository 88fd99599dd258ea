"""The gradient of each task, exactly, and their combination; in any torch training loop.

    grads = TaskGradients(model)
    with grads:
        model(**batch, task_ids=ids).loss.backward()
    grads.combine("pcgrad", step=step)  # p.grad is now the combination; clip and step as ever

The gradient of a task is what the batch's rows of that task contribute to the loss. That holds where each row
of the loss depends on rows of its own task alone; terms that couple tasks (in-batch negatives, balance) are
back-propagated after ``combine``, outside the ``with``.

Legend: R rows of J (a task each, or a group of tasks), T tasks of the step, S routing groups, H heads, k
slots a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe import TaskError, TaskMoEModel
from taskmoe.moe.task_ids import read_task_ids
from taskmoe.train.combination import (
    Combination,
    combine_directly,
    group_gramians,
    half_cosines,
    hand_in,
)
from taskmoe.train.config import ConfigError
from taskmoe.train.distributed import Ranks, all_sum, world_size
from taskmoe.train.router_gradients import RouterGradients
from taskmoe.train.surgery.base import check_finite
from taskmoe.train.surgery.choose import choose
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.direct import DirectSurgery
from taskmoe.train.surgery.rows import check_rows, fold
from taskmoe.train.task_matrix import TaskMatrix
from taskmoe.train.task_scope import choose_way, find_scope

Weights = Mapping[str, Mapping[int, float]]  # {group of parameters: {task id: weight}}
Gathered = Callable[[Mapping[str, nn.Parameter]], AbstractContextManager]


class TaskGradients:
    """Collects the gradients of tasks over any number of backward passes, then combines them into ``p.grad``.

    ``way``: ``fused`` takes them from one ordinary backward pass whose forward pass also stands inside the
    ``with``; ``separate`` asks for one loss a task (:meth:`backward`), and serves any parameter; ``auto`` is
    fused where all that is shared are banks and routers. Parameters of one task alone (its head, its row of
    the router's table) and those out of ``scope`` keep their plain gradient.

    Gradients of shared parameters must be cleared before the first pass. Works with both kinds of activation
    checkpointing.

    Args:
        task_ids: the tasks of the step (ids or names, repeats do not matter); None: tasks get a row as they
            come.
        scope: ``all``, ``experts``, ``routers``, or ``layer`` (all, combined layer by layer).
        max_tasks: above so many ``task_ids``, tasks share rows (:func:`~taskmoe.train.surgery.rows.fold`).
        seed: of random choices: groups of tasks, a method's order.
        ranks: where the passes of other ranks belong to the same step; rows are then set by :meth:`begin`,
            equal on all ranks, tasks without a row have no target, and every method is a collective.
        gathered: makes partitioned parameters whole inside (ZeRO-3).

    Raises:
        ConfigError: an unknown way or scope, nothing shared in scope, or ``fused`` where other parameters
            than banks and routers are in scope.
        TaskError: an unknown task.
    """

    def __init__(
        self,
        model: TaskMoEModel,
        task_ids: Any = None,
        *,
        way: str = "auto",
        scope: str = "all",
        max_tasks: int | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        gathered: Gathered | None = None,
    ) -> None:
        self.model, self.seed = model, seed
        self.scope = find_scope(model, scope)
        if not self.scope.shared:
            raise ConfigError(f"surgery.scope: {scope!r} holds no trainable parameter that tasks share")
        self.way = choose_way(way, self.scope)
        if model.penalties is not None:
            model.penalties.check_surgery(self.way)
        if ranks is None and world_size() > 1:
            raise RuntimeError("several ranks run: give ranks, or each combines what it sees alone")
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in self.scope.shared.items()}
        place = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        self.matrix = TaskMatrix(shapes, *place, eager=self.way == "fused", like=self.scope.shared)
        self._names = {id(p): n for n, p in self.scope.shared.items()}
        self._group = {n: g for g, names in self.scope.groups.items() for n in names}
        whole = gathered or (lambda _: nullcontext())
        self._routers = RouterGradients(model, self.scope.routers, self._sum, whole)
        self._in_engine = ranks is not None
        self._combines = 0
        self._methods: dict[str, Surgery | DirectSurgery] = {}  # chosen by name: their state lives on
        ids = None if task_ids is None else _flat(read_task_ids(task_ids, model.tasks))
        if max_tasks is not None and ids is None:
            raise ConfigError("surgery.max_tasks: folding needs the tasks of the step; give task_ids")
        self.begin(None if ids is None else fold(ids, max_tasks, seed, 0))

    def begin(
        self, rows: Mapping[int, int] | None, weights: Weights | None = None, halves: bool = False
    ) -> None:
        """Forget what was collected. A step with these rows follows ({task id: row}; None: as they come).

        With ``weights`` nothing is collected: the one backward pass combines with them as it goes (fused).
        With ``halves`` each task is collected in two (fused, with rows): :attr:`Combination.same_task`.
        """
        self._open, self.halves = False, 0 if halves else None
        self._fixed, self._weights = rows is not None, weights
        self.rows: dict[int, int] = dict(rows or {})
        self.matrix.clear(len(set(self.rows.values())) * (2 if halves else 1))
        self._routers.clear()

    # -- collecting ------------------------------------------------------------------------------------------

    def __enter__(self) -> TaskGradients:
        if not self._open and (stale := self._with_gradient()):
            raise RuntimeError(f"{stale[0]} has a gradient already; clear them first (optimizer.zero_grad())")
        self._open = True
        if self.way == "fused":
            self.model.parts = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.model.parts = None
        if kind is not None:
            self._start_anew()

    def _start_anew(self) -> None:
        self.begin(self.rows if self._fixed else None)

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether its gradient is taken from the one backward pass (:class:`taskmoe.moe.parts.Parts`)."""
        return id(parameter) in self._names

    def keep(
        self, parameter: nn.Parameter, tasks: Sequence[int], halves: Sequence[int], parts: Tensor
    ) -> Tensor | None:
        """Add [Tb, *shape], or weigh it (:class:`taskmoe.moe.parts.Parts`)."""
        name = self._names[id(parameter)]
        if self._weights is not None:
            kept = self._weights[self._group[name]]
            weights = torch.tensor([kept.get(t, 1.0) for t in tasks], dtype=parts.dtype, device=parts.device)
            return parts * weights.view(-1, *[1] * (parts.dim() - 1))
        known = [i for i, t in enumerate(tasks) if self._row(t) is not None]
        if not self.matrix.num_rows:
            return None
        second = self.matrix.num_rows // 2  # the first row of second halves
        rows = [self.rows[tasks[i]] + halves[i] * second for i in known]
        self.matrix.add(name, rows, parts if len(known) == len(tasks) else parts[known])
        return None

    def keep_gates(self, tasks: Sequence[int], gradient_STHk: Tensor) -> None:
        """Add the gates' gradient (:class:`taskmoe.moe.parts.Parts`)."""
        for task in tasks:
            self._row(task)
        self._routers.add(tasks, gradient_STHk)

    def backward(self, losses: Mapping[Any, Tensor]) -> None:
        """One backward pass a task on the retained graph (way ``separate``): {task id or name: its loss}.

        Raises:
            RuntimeError: the way is ``fused``.
            TaskError: an unknown task.
        """
        self._check_not_fused()
        shared = self.scope.shared
        before = {n: p.grad for n, p in shared.items()}
        for p in shared.values():
            p.grad = None
        for i, (task, loss) in enumerate(losses.items()):
            loss.backward(retain_graph=i + 1 < len(losses))
            self.harvest(_flat(read_task_ids([task], self.model.tasks))[0])
        for n, p in shared.items():
            p.grad = before[n]

    def harvest(self, task: int) -> None:
        """Move what a backward pass of this task's loss alone left on the shared parameters to its row.

        Raises:
            RuntimeError: the way is ``fused``.
        """
        self._check_not_fused()
        row = self._row(task)
        for name, p in self.scope.shared.items():
            if p.grad is not None:
                if row is not None:
                    self.matrix.add(name, [row], p.grad.unsqueeze(0).clone())
                p.grad.zero_()

    def _check_not_fused(self) -> None:
        if self.way == "fused":  # the pass itself has been kept: what it left would count twice
            raise RuntimeError(
                "way is fused: one loss.backward() inside the with; for a loss a task give way='separate'"
            )

    def _row(self, task: int) -> int | None:
        if task not in self.rows:
            if self._in_engine:
                return None  # no target of this task in the whole step: its gradient is zero
            if self._fixed:
                name = self.model.tasks.names[task]
                raise TaskError(f"task {name!r} is in the batch but not among the task_ids of TaskGradients")
            self.rows[task] = self.matrix.num_rows
            self.matrix.num_rows += 1
        return self.rows[task]

    # -- combining -------------------------------------------------------------------------------------------

    def combine(
        self, method: str | Surgery | DirectSurgery = "pcgrad", step: int | None = None, **options: Any
    ) -> Combination:
        """Combine what was collected into ``p.grad`` of the shared parameters, and forget it.

        Args:
            method: a name of ``surgery.METHODS`` or ``DIRECT`` with its ``options``, or an object. Either way
                its state lives on from step to step (one for each name and options).
            step: of the optimiser; fixes random choices. Default: the number of calls before this one.

        Raises:
            RuntimeError: nothing was collected.
            SurgeryError: gradients that are not finite.
            ConfigError: an unknown method or option, or tasks share rows and the method goes by task.
        """
        step = self._combines if step is None else step
        self._combines += 1
        try:
            return self._combine(self._chosen(method, options) if isinstance(method, str) else method, step)
        finally:
            self._start_anew()

    def _chosen(self, name: str, options: Mapping[str, Any]) -> Surgery | DirectSurgery:
        key = f"{name} {sorted(options.items())}"
        if key not in self._methods:
            self._methods[key] = choose(name, options, self.seed)
        return self._methods[key]

    def _combine(self, method: Surgery | DirectSurgery, step: int) -> Combination:
        self._check_collected(bool(self.rows))
        self.matrix.reduce()
        same_task = None
        if self.halves is not None:
            same_task = half_cosines(self.matrix, self.scope, self._sum)
            self.matrix.merge_halves()
        self._route()
        rows = self.row_tasks()
        check_rows(method, rows)
        gramians = group_gramians(self.matrix, self.scope, self._sum)
        # An engine's passes are all inside; there the ranks' gradients may also cancel.
        if self.way == "fused" and not self._in_engine and not any(G.any() for G in gramians.values()):
            self._check_collected(not self._with_gradient())
        firsts = [tasks[0] for tasks in rows]
        weights: dict[str, Tensor] | None = None
        if isinstance(method, DirectSurgery):
            for G_RR in gramians.values():
                check_finite(G_RR, step, firsts)  # on all ranks alike
            combined = combine_directly(self.matrix, self.scope, self._sum, method, step, firsts)
            hand_in(self.matrix, self.scope, combined)
        else:
            weights = {g: method.weights(G_RR, step, firsts) for g, G_RR in gramians.items()}
            self._weigh(weights)
        return Combination(rows, gramians, weights, same_task)

    def _with_gradient(self) -> list[str]:
        return [n for n, p in self.scope.shared.items() if p.grad is not None and p.grad.any()]

    def _check_collected(self, found: bool) -> None:
        if not found:
            raise RuntimeError(
                "no task's gradient was collected: the forward pass must stand inside the `with` as well"
                if self.way == "fused"
                else "no task's gradient was collected: call grads.backward({task: loss, ...})"
            )

    def finish_weighted(self) -> None:
        """The end of a step that :meth:`begin` was given weights for: the routers' shared parameters."""
        assert self._weights is not None
        if self._routers.names:
            self._route()
            order = [tasks[0] for tasks in self.row_tasks()]
            for group, kept in self._weights.items():
                w_R = torch.tensor([kept.get(t, 1.0) for t in order], dtype=torch.float64)
                names = [n for n in self.scope.groups[group] if n in self.scope.routers]
                hand_in(self.matrix, self.scope, {n: self.matrix.weighted(n, w_R) for n in names})
        self._start_anew()

    def row_tasks(self) -> list[list[int]]:
        """The task ids of each row."""
        found: list[list[int]] = [[] for _ in range(self.matrix.num_rows)]
        for task, row in self.rows.items():
            found[row].append(task)
        return found

    def _route(self) -> None:
        if self.way == "fused":
            for name, parts in self._routers.rows(self.rows, self.matrix.num_rows).items():
                self.matrix.add_whole(name, parts)

    def _weigh(self, weights: Mapping[str, Tensor]) -> None:
        for group, w_R in weights.items():
            # The one backward pass has left the sum in p.grad.
            if self.way != "fused" or not bool((w_R == 1).all()):
                names = self.scope.groups[group]
                hand_in(self.matrix, self.scope, {n: self.matrix.weighted(n, w_R) for n in names})

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.matrix.world_size == 1 else all_sum(tensor)


def _flat(ids: Sequence[Any]) -> list[int]:
    return [t for row in ids for t in (row if isinstance(row, (list, tuple)) else [row])]
