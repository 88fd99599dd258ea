"""Regularisers inside an engine's step.

Terms of routing and of parameters are functions of the weights and of which tasks the step holds: every rank
computes the same, once, after the tasks' gradients have been combined, and adds its gradient to ``p.grad``;
the engine's average over equal gradients changes nothing. Terms of activations have joined the backward
passes by then (:mod:`taskmoe.moe.penalties`).

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taskmoe.moe import TaskMoEModel
from taskmoe.moe.regularisation import Penalties, routed
from taskmoe.moe.regularisers.base import Routed
from taskmoe.moe.routing import Routing
from taskmoe.train.distributed import all_sum
from taskmoe.train.objectives import Counts
from taskmoe.train.router_gradients import bare_routing

STATE = "regularisers.pt"


class StepRegularisers:
    """One phase's regularisers. Its methods are collectives where there are ranks.

    Args:
        trained: what trains in the phase, by name.
        gathered: makes partitioned parameters whole inside (ZeRO-3).
        accumulation: micro-batches of a step and rank.
    """

    def __init__(
        self,
        model: TaskMoEModel,
        penalties: Penalties,
        trained: Mapping[str, nn.Parameter],
        gathered: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager],
        accumulation: int,
    ) -> None:
        self.model, self.penalties, self._gathered = model, penalties, gathered
        penalties.scale = 1 / accumulation
        self._trained = {id(p) for p in trained.values()}
        self._tasks: list[int] = []

    def begin(self, counts: Counts) -> None:
        """A step begins; counts are over all ranks and micro-batches."""
        self._tasks = (counts.tokens_T > 0).nonzero().squeeze(1).tolist()

    def finish(self) -> None:
        """After the last backward pass and surgery, before the engine reduces: add the gradient."""
        if self.penalties.routing and self._tasks:
            self._finish_routing()
        if self.penalties.parameters:
            self._finish_parameters()

    def _finish_routing(self) -> None:
        prefix = "routing."
        own = {n: p for n, p in self.model.named_parameters() if n.startswith(prefix)}
        wanted = {n: p for n, p in own.items() if id(p) in self._trained}
        if not wanted:
            return
        with self._gathered(own):
            weights = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
        buffers = {prefix + n: b for n, b in self.model.routing.named_buffers()}
        device = next(iter(weights.values())).device
        routing = bare_routing(self.model)
        noise = routing.noise(self._tasks)
        given = torch.tensor(self._tasks, device=device), None if noise is None else noise.to(device)
        with torch.enable_grad():
            found = functional_call(_Routed(routing, self._tasks), {**buffers, **weights}, given)
            total = self.penalties.of_routing(found)
        _add(wanted, total, [weights[n] for n in wanted])

    def _finish_parameters(self) -> None:
        parameters = self.penalties.read_parameters()
        wanted = {str(i): p for i, p in enumerate(parameters) if id(p) in self._trained}
        if not wanted:
            return
        with self._gathered({str(i): p for i, p in enumerate(parameters)}), torch.enable_grad():
            total = torch.stack([v.to(parameters[0].device) for v in self.penalties.of_parameters()]).sum()
            _add(wanted, total, list(wanted.values()))

    # -- following along -------------------------------------------------------------------------------------

    def report(self) -> dict[str, float]:
        """``regulariser/<name>``: the mean value (without its weight) since the last report, over ranks."""
        seen = self.penalties.read()
        names, device = list(self.penalties.terms), self.model.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.stack([seen[n][0].to(device) if n in seen else zero for n in names])
        numbers = torch.tensor([seen[n][1] if n in seen else 0.0 for n in names]).to(sums)
        both = all_sum(torch.stack([sums, numbers])).cpu()
        return {f"regulariser/{n}": float(s / k) for n, s, k in zip(names, *both, strict=True) if k > 0}

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        torch.save(self.state_dict(), folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; a term that it does not know begins anew."""
        if (folder / STATE).is_file():
            self.load_state_dict(torch.load(folder / STATE, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """{term: {task id as text: tensor}}, equal on all ranks."""
        terms = self.penalties.routing.items()
        return {name: {str(t): v for t, v in term.state().items()} for name, term in terms}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from :meth:`state_dict`."""
        for name, term in self.penalties.routing.items():
            term.load_state({int(t): v for t, v in state.get(name, {}).items()})


class _Routed(nn.Module):
    """:func:`taskmoe.moe.regularisation.routed` as a module, for ``functional_call``."""

    def __init__(self, routing: Routing, tasks: list[int]) -> None:
        super().__init__()
        self.routing, self.tasks = routing, tasks

    def forward(self, tasks: Tensor, noise: Tensor | None) -> Routed:
        return routed(self.routing, self.tasks, tasks, noise)


def _add(parameters: Mapping[str, nn.Parameter], total: Tensor, leaves: list[Tensor]) -> None:
    """Add the gradient of ``total`` with respect to ``leaves`` to ``p.grad``.

    With ``autograd.grad``: an engine's hooks on the parameters must not take it for another micro-batch.
    """
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    for p, gradient in zip(parameters.values(), found, strict=True):
        if gradient is not None:
            if p.grad is None:
                p.grad = gradient.to(p.dtype)
            else:
                p.grad.add_(gradient)


def build_regularisers(
    model: TaskMoEModel,
    trained: Mapping[str, nn.Parameter],
    gathered: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager],
    accumulation: int,
) -> StepRegularisers | None:
    """The regularisers of a phase; None where ``moe.regularisers`` names none."""
    if model.penalties is None:
        return None
    return StepRegularisers(model, model.penalties, trained, gathered, accumulation)
