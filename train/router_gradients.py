"""The gradient of each task on what the routers share, from the gradient of the gates.

The graph is cut at the gates, and a router is a pure function of its parameters and the task. So the gates'
gradient is added up over the passes of a step and over the ranks, and then goes back through one more, tiny,
forward pass of the routers: one vector-Jacobian product a row.

Legend: R rows of J, T tasks of the step, S routing groups, H heads, k slots a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taskmoe.moe import TaskMoEModel
from taskmoe.moe.routing import Routing


def bare_routing(model: TaskMoEModel) -> Routing:
    """The routing of ``model`` on the meta device, for ``functional_call`` with the weights of the step."""
    kept = vars(model.routing)  # past nn.Module: a child would be moved, saved and trained with the model
    if "_bare" not in kept:
        with torch.device("meta"):  # a module without a random draw, a byte, or an engine's hooks
            kept["_bare"] = Routing(model.moe_config, model.routing.groups, model.tasks)
    routing: Routing = kept["_bare"]
    # The same gate and noise as in the step itself.
    for name in ("temperature", "seed", "step", "training", "gate", "gate_options", "top_k"):
        setattr(routing, name, getattr(model.routing, name))
    return routing


class RouterGradients:
    """Sums of the gates' gradients, [S, H, k] a task.

    Args:
        parameters: the shared parameters of ``model.routing``, by their names in the model.
        add_up: sums a tensor over the ranks.
        gathered: makes partitioned parameters whole inside.
    """

    def __init__(
        self,
        model: TaskMoEModel,
        parameters: Mapping[str, nn.Parameter],
        add_up: Callable[[Tensor], Tensor],
        gathered: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager],
    ) -> None:
        self.model, self.names = model, list(parameters)
        self._add_up, self._gathered = add_up, gathered
        self._gates: dict[int, Tensor] = {}

    def clear(self) -> None:
        self._gates = {}

    def add(self, tasks: Sequence[int], gradient_STHk: Tensor) -> None:
        """Add the gradient of the gates of one backward pass."""
        if not self.names:
            return
        for task, gradient_SHk in zip(tasks, gradient_STHk.detach().unbind(1), strict=True):
            found = self._gates.get(task)
            self._gates[task] = gradient_SHk if found is None else found + gradient_SHk

    def rows(self, rows: Mapping[int, int], num_rows: int) -> dict[str, Tensor]:
        """{name: [R, *shape]}, summed over the ranks and equal on all: a collective.

        Args:
            rows: {task id: row}, equal on all ranks.
        """
        if not self.names:
            return {}
        model, tasks = self.model, sorted(rows)
        prefix = "routing."
        own = {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}
        with self._gathered(own):
            weights = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
        routing = bare_routing(model)
        state = {**dict(model.routing.named_buffers()), **weights}
        ids = torch.tensor(tasks, device=next(iter(weights.values())).device)
        with torch.enable_grad():
            noise = routing.noise(tasks)
            values_STHk, _ = functional_call(
                routing, state, (ids, None if noise is None else noise.to(ids.device))
            )
        absent = values_STHk.new_zeros(values_STHk[:, 0].shape)
        gates_TSHk = self._add_up(torch.stack([self._gates.get(t, absent) for t in tasks]))
        outer = values_STHk.new_zeros(num_rows, *values_STHk.shape)
        for i, task in enumerate(tasks):
            outer[rows[task], :, i] = gates_TSHk[i]
        wanted = [weights[n.removeprefix(prefix)] for n in self.names]
        found = torch.autograd.grad(values_STHk, wanted, outer, is_grads_batched=True)
        return dict(zip(self.names, found, strict=True))
