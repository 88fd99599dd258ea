"""The regularisers of one model: what ``moe.regularisers`` adds to the loss.

The term of a step is sum_i weight_i value_i, where the value of a term of activations is its mean over
layers,
micro-batches and ranks. In a loop of your own:

    loss = model(**batch, task_ids=ids).loss + penalty(model, ids)

``penalty`` has the terms of routing and parameters; those of activations join in the backward pass by
themselves (with several micro-batches a step set ``model.penalties.scale`` to one over their number).

Legend: S routing groups, Tb tasks of the step, H heads, E experts, M rows, k slots a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError
from taskmoe.moe.penalties import penalise, rows_of
from taskmoe.moe.regularisers.base import OfParameters, OfRouting, OfTokens, Regulariser, Routed
from taskmoe.moe.regularisers.kinds import check_alone, no_place, read_regularisers
from taskmoe.moe.routing import Routing
from taskmoe.moe.task_ids import read_task_ids

if TYPE_CHECKING:
    from taskmoe.kernels.plan import Plan
    from taskmoe.moe.context import Context
    from taskmoe.moe.model import TaskMoEModel


class Penalties:
    """The terms of one model, their weights, and what they have been since the last :meth:`read`.

    Raises:
        ConfigError: a term of something that the model does not have.
    """

    def __init__(self, model: TaskMoEModel) -> None:
        self.scale = 1.0  # of terms of activations: one over the micro-batches of a step
        chosen = read_regularisers(model.moe_config, model.tasks)
        self.weights = {name: weight for name, (weight, _) in chosen.items()}
        self.terms: dict[str, Regulariser] = {name: term for name, (_, term) in chosen.items()}
        self.routing = {n: t for n, t in self.terms.items() if isinstance(t, OfRouting)}
        self.tokens = {n: t for n, t in self.terms.items() if isinstance(t, OfTokens)}
        self.parameters = {n: t for n, t in self.terms.items() if isinstance(t, OfParameters)}
        self._places: dict[str, int] = {}  # of terms of activations: how many layers have it
        self._seen: dict[str, tuple[Tensor, float]] = {}
        for name, term in self.terms.items():
            self._places[name] = term.enter(model, name)
            if not self._places[name]:
                raise ConfigError(no_place(name))

    # -- terms of activations --------------------------------------------------------------------------------

    def add(self, x: Tensor, name: str, value: Tensor) -> Tensor:
        """``x``, with term ``name`` joined in (:func:`taskmoe.moe.penalties.penalise`)."""
        share = self.scale / self._places[name]
        return penalise(x, value, self.weights[name] * share, lambda v: self._note(name, v, share))

    def on_tokens(
        self,
        values: Tensor,
        slots: Tensor | None,
        logits_ME: Tensor,
        context: Context,
        plan: Plan,
        layer: str,
    ) -> Tensor:
        """The gates ``values`` [M, k] of a layer that routes tokens, with all its terms joined in."""
        if not self.tokens or not torch.is_grad_enabled():
            return values
        gates_ME = values if slots is None else torch.zeros_like(logits_ME).scatter(-1, slots, values)
        rows = rows_of(context, plan, layer, logits_ME)
        for name, term in self.tokens.items():
            values = self.add(values, name, term.value(logits_ME, gates_ME, rows))
        return values

    def check_surgery(self, way: str) -> None:
        """Refuse what has no place in a matrix of task gradients.

        Raises:
            ConfigError: names the term.
        """
        check_alone(self.terms, way)

    # -- terms of routing and parameters ---------------------------------------------------------------------

    def read_parameters(self) -> list[nn.Parameter]:
        """Those that the terms of parameters are about, once each."""
        read = [p for term in self.parameters.values() for m in term.modules for p in term.reads(m)]
        return list(dict.fromkeys(read))

    def of_routing(self, routed: Routed) -> Tensor:
        """The weighed sum of the terms of routing: a scalar."""
        # Of the logits, so that its gradient is zero, and no error, where a phase's gate makes it constant.
        total = (routed.logits_STHE * 0).sum()
        for name, term in self.routing.items():
            total = total + self._weighed(name, term.value(routed))
        return total

    def of_parameters(self) -> list[Tensor]:
        """The weighed terms of parameters, a scalar each."""
        return [self._weighed(name, term.value(term.modules)) for name, term in self.parameters.items()]

    def _weighed(self, name: str, value: Tensor) -> Tensor:
        self._note(name, value.detach(), 1.0)
        return self.weights[name] * value

    # -- following along -------------------------------------------------------------------------------------

    def _note(self, name: str, value: Tensor, share: float) -> None:
        before, weight = self._seen.get(name, (torch.zeros_like(value, dtype=torch.float64), 0.0))
        self._seen[name] = before + value.double() * share, weight + share

    def read(self) -> dict[str, tuple[Tensor, float]]:
        """{name: (sum of values, their number)} since the last call, on this rank; the mean is their
        quotient.
        """
        seen, self._seen = self._seen, {}
        return seen


def build_penalties(model: TaskMoEModel) -> Penalties | None:
    """The penalties of an attached model; None where ``moe.regularisers`` is empty."""
    return Penalties(model) if model.moe_config.regularisers else None


def routed(routing: Routing, ids: Sequence[int], tasks: Tensor, noise: Tensor | None) -> Routed:
    """What terms of routing are given of these tasks.

    Args:
        ids: task ids; ``tasks``: the same as [Tb] int64 where the routers are. noise: of
        ``routing.noise(ids)``.
    """
    logits = routing.logits(tasks)
    values, slots = routing.gate(logits, routing.temperature, routing.top_k, noise, routing.gate_options)
    gates = values if slots is None else torch.zeros_like(logits).scatter(-1, slots, values)
    shares = routing.gate.shares(logits, routing.temperature, noise, routing.gate_options)
    return Routed(ids, logits, gates, shares, routing.temperature)


def penalty(model: TaskMoEModel, task_ids: Any) -> Tensor:
    """The terms of routing and of parameters for a step on these tasks (ids or names, as in ``forward``).

    Call it once an optimiser step, with the tasks of all its micro-batches.
    """
    penalties, device = model.penalties, model.device
    if penalties is None:
        return torch.zeros((), device=device)
    total = torch.zeros((), device=device)
    if penalties.routing:
        ids = sorted({int(i) for i in torch.tensor(read_task_ids(task_ids, model.tasks)).flatten().tolist()})
        noise = model.routing.noise(ids)
        found = routed(
            model.routing, ids, torch.tensor(ids, device=device), None if noise is None else noise.to(device)
        )
        total = total + penalties.of_routing(found)
    for value in penalties.of_parameters():
        total = total + value.to(device)
    return total
