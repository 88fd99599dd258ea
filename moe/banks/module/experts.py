"""Copies of a module in its place, combined as the gates say: y = sum_e g_e E_e(x).

Legend: B sequences, R rows that are routed (sequences; packed: positions), M tokens, Tb tasks in this batch,
E experts, k slots, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from taskmoe.moe.banks.module.rows import arguments_of, can_be_cut, combine, used_experts
from taskmoe.moe.banks.module.stack import ModuleStack, Run, extend_cache, find_cache
from taskmoe.moe.banks.module.targets import PAIR, attends
from taskmoe.moe.context import Context, Gate, RowSpaceError, TokenGate, current

try:  # what a forward pass has been asked to record; private, so perhaps gone one day
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # pragma: no cover
    _active_collector = None  # type: ignore[assignment]


class ModuleExperts(nn.Module):
    """E copies of ``original`` in its place, combined as the gates say.

    With gates of a task: experts that a task does not use (top-k, one-hot without a gradient) are not run on
    its sequences. A one-hot gate that trains needs every expert's output, for its straight-through gradient.
    With gates of a token: rows are sorted by expert.

    Attention keeps keys and values for each expert: with a cache every expert that any task of the batch uses
    runs on all sequences, and only a cache that grows as it goes will do.
    """

    copies: ClassVar[str] = "experts"  # the group in which copies of ``original`` train

    def __init__(
        self, original: nn.Module, stack: ModuleStack, name: str, group: int, routing: nn.Module | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.original, self.stack, self.name, self.group, self.routing = original, stack, name, group, routing
        self.caches = any(isinstance(getattr(m, "layer_idx", None), int) for m in original.modules())
        self.unseen: set[str] = set()  # what transformers cannot record, because copies run in its place
        if attends(name, original):
            self.unseen |= {"attentions", "cross_attentions"}
        if isinstance(self, GradientCheckpointingLayer):
            self.unseen.add("hidden_states")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``original`` takes and returns; its outputs (tensors of floats) are combined.

        Raises:
            RowSpaceError: packed rows or outputs that cannot be told apart by task.
            CacheError: a cache that has no room for the experts' own entries.
        """
        context = current(self.name)
        if not context.enabled:
            return self.original(*args, **kwargs)
        self._refuse_to_record()
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if self.routing is not None:
            return self._by_token(x, args, kwargs, context)
        return self._by_task(x, args, kwargs, context, context.gates[self.group])

    def refresh(self) -> None:
        """Start the copies again from the original, which a phase without adapters may have trained."""
        self.stack.start(self.original)

    def plain(self, expert: int) -> nn.Module:
        """The original with the weights of one expert; this module is no longer to be used."""
        with torch.no_grad():
            for name, p in self.stack.expert(expert).items():
                self.original.get_parameter(name).copy_(p)
        return self.original

    def _by_task(self, x: Tensor, args: tuple, kwargs: dict, context: Context, gate: Gate) -> Any:
        """Gates of a task: experts run on whole sequences."""
        cache = find_cache(args, kwargs) if self.caches else None
        lead = x.shape[:-1] if context.packed else x.shape[:1]
        plan = context.plan(lead, self.name)
        used = used_experts(context, self.group, gate)
        weights_TE = gate.values.squeeze(1)
        if gate.slots is not None:
            shape = (len(weights_TE), self.stack.num_experts)
            weights_TE = weights_TE.new_zeros(shape).scatter(-1, gate.slots.squeeze(1), weights_TE)
        if gate.split is None:
            jobs = [(0, e) for e in sorted(set().union(*used))]
        else:  # a run for each task, so that its parameters' gradient is the task's own
            jobs = [(t, e) for t, mine in enumerate(used) for e in sorted(mine)]
        if cache is not None:
            extend_cache(cache, self.stack.cache_stride, len(jobs), self.name)
        # Indexing, not index_select: its backward sorts, where the other's adds by atomics.
        tasks = plan.row_tasks(x.device)
        weights = weights_TE[tasks].view(*lead, -1)
        apart = cache is None and not context.packed and can_be_cut(args, kwargs)
        rows: list[Tensor | None] = []
        gates: list[Tensor] = []
        for t, e in jobs:
            own = (t,) if gate.split is not None else [i for i, mine in enumerate(used) if e in mine]
            mine = [i for s, a, b in plan.segments() if s in own for i in range(a, b)]
            whole = not apart or len(mine) == plan.rows
            rows.append(None if whole else torch.tensor(mine).to(x.device, non_blocking=True))
            strangers = whole and gate.split is not None and len(mine) < plan.rows
            gates.append(weights[..., e] * (tasks == t).view(lead) if strangers else weights[..., e])

        def body(run: Run, args: tuple, kwargs: dict) -> Any:
            calls = [arguments_of(args, kwargs, r, len(x)) for r in rows]
            outputs = [run(i, job, *calls[i][:2]) for i, job in enumerate(jobs)]
            return combine(outputs, gates, rows, [h for _, _, h in calls], self.name)

        return self.stack(body, self.original, args, kwargs, cache is not None, gate.split)

    def _by_token(self, x: Tensor, args: tuple, kwargs: dict, context: Context) -> Tensor:
        """Gates of a token: each expert runs on the rows that chose it, all as one sequence."""
        plan = context.plan(x.shape[:-1], self.name)
        assert self.routing is not None
        gate: TokenGate = self.routing(x.reshape(plan.rows, -1), context, plan)
        E, M = self.stack.num_experts, plan.rows
        for a in (*args, *kwargs.values()):
            if isinstance(a, Tensor) and a.shape[:-1] != x.shape[:-1]:
                raise RowSpaceError(
                    f"{self.name}: tokens are routed one by one, but beside rows of leading shape "
                    f"{tuple(x.shape[:-1])} it takes a tensor {tuple(a.shape)}; route by task, or choose "
                    "modules that work token by token (of: ffn)"
                )
        flat_args = tuple(a.reshape(1, M, -1) if isinstance(a, Tensor) else a for a in args)
        flat_kwargs = {n: a.reshape(1, M, -1) if isinstance(a, Tensor) else a for n, a in kwargs.items()}

        def body(run: Run, args: tuple, kwargs: dict) -> Tensor:
            if gate.slots is None and gate.split is None:
                outputs = [run(e, (0, e), args, kwargs) for e in range(E)]
                return torch.stack([self._rows(o, M) for o in outputs], dim=1)
            slots_Mk = gate.slots if gate.slots is not None else torch.arange(E, device=x.device).expand(M, E)
            k, tasks = slots_Mk.shape[-1], 1
            if gate.split is not None:
                tasks = plan.num_tasks
                slots_Mk = slots_Mk + E * plan.row_tasks(x.device).unsqueeze(1)
            order = torch.argsort(slots_Mk.flatten(), stable=True)
            # A device waits here: sizes must be known.
            counts = torch.bincount(slots_Mk.flatten(), minlength=E * tasks).tolist()
            chosen = [i for i, count in enumerate(counts) if count]
            parts = (order // k).split([counts[i] for i in chosen])
            outputs = []
            for place, (i, r) in enumerate(zip(chosen, parts, strict=True)):
                mine = tuple(a[:, r] if isinstance(a, Tensor) else a for a in args)
                named = {n: a[:, r] if isinstance(a, Tensor) else a for n, a in kwargs.items()}
                outputs.append(self._rows(run(place, divmod(i, E), mine, named), len(r)))
            return torch.cat(outputs)[torch.argsort(order)].unflatten(0, (M, k))

        values_MkD = self.stack(body, self.original, flat_args, flat_kwargs, split=gate.split)
        y_MD = torch.einsum("mk,mkd->md", gate.values.to(torch.promote_types(gate.values.dtype, x.dtype)),
                            values_MkD.to(torch.promote_types(gate.values.dtype, x.dtype)))  # fmt: skip
        return y_MD.to(values_MkD.dtype).view(*x.shape[:-1], -1)

    def _rows(self, output: Any, rows: int) -> Tensor:
        if not isinstance(output, Tensor) or output.shape[:-1] != (1, rows):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise RowSpaceError(
                f"{self.name}: tokens are routed one by one, but for {rows} rows it returns {what}; route by "
                "task, or choose modules that work token by token (of: ffn)"
            )
        return output[0]

    def _refuse_to_record(self) -> None:
        recorded = None if _active_collector is None else _active_collector.get()
        lost = self.unseen & set(recorded or ())
        if lost:
            raise ValueError(
                f"{self.name}: {', '.join(sorted(lost))} of experts cannot be recorded; leave out "
                "output_attentions and output_hidden_states, or look at a squeezed model"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(super().__getattr__("original"), name)


class LayerExperts(ModuleExperts, GradientCheckpointingLayer):
    """Experts in the place of a layer that transformers checkpoints: all of them are recomputed together."""


class Deferred(nn.Module):
    """The first part of an FFN in two parts, whose experts run at the place of the second."""

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__()
        self.original, self.name = original, name

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> itself, or what ``original`` makes of it when the experts are disabled."""
        return x if current(self.name).enabled else self.original(x)


class PairExperts(ModuleExperts):
    """Experts of an FFN in two parts, at the place of the second."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x: [..., K] that the first part passed on, residual: [..., K] -> [..., K]."""
        if not current(self.name).enabled:
            return self.original.get_submodule(PAIR[1])(*args, **kwargs)
        return super().forward(*args, **kwargs)
