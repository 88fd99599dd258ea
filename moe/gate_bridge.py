"""The graph is cut between routers and layers; how the gradient of the gates comes back over the cut.

Legend: S routing groups, Tb tasks in this batch, H heads, k slots a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class GateBridge:
    """Brings the gradient of the gates back to the routers in the one ordinary backward pass.

    The graph between routers and layers is cut: layers see leaves. (Uncut, a reentrant recompute would walk
    through the routers once a layer: "backward through the graph a second time".) Every path from a layer
    back to the start passes through an input embedding or a floating input, so an identity there runs after
    all layers have left their gradient on the leaves, and can hand it to the real gates. Models with several
    of them (encoder, decoder, towers) chain the identities by a scalar, so that the one that holds the gates
    runs last.

    ``torch.autograd.grad`` and ``backward(inputs=)`` leave nothing on leaves that they are not asked for:
    where they ask for the routers, the backward pass raises a RuntimeError.
    """

    def __init__(self, values: Tensor, keep: Callable[[Tensor], None] | None = None) -> None:
        """values: [S, Tb, H, k], the real gates of S routing groups, with their graph. keep: is shown their
        gradient in every backward pass."""
        self.keep = keep
        self.leaves = [v.detach().requires_grad_() for v in values.unbind(0)]
        self._carrier = values
        # In the graph, and asked for by every plain backward, by no other.
        self._sentinel = torch.zeros((), requires_grad=True)
        self._routers: Any = values.grad_fn
        self.calls = 0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Identity on ``embeddings`` (any shape, floating point)."""
        out, self._carrier = _Bridge.apply(
            self if self.calls == 0 else None, embeddings, self._carrier, self._sentinel
        )
        self.calls += 1
        return out

    def before(self, values: Tensor) -> Tensor:
        """``values`` of a leaf, for what joins the embeddings (a prompt) instead of coming from them.

        After the first call: this bridge then takes its gradients after that part of the graph has run, too.
        """
        if not torch.is_grad_enabled():
            return values
        assert self.calls, "the embeddings come first"
        return values + self._carrier

    def take_gradients(self) -> list[Tensor]:
        """The gradients on the leaves (zeros where a group was not used), which are cleared."""
        will_run = torch._C._will_engine_execute_node
        if will_run(self._routers) and not will_run(get_gradient_edge(self._sentinel).node):
            raise RuntimeError(
                "routers get their gradient from a plain backward() only: torch.autograd.grad(...) and "
                "backward(inputs=...) would give them zeros"
            )
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return gradients


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bridge: GateBridge | None, embeddings: Tensor, carrier: Tensor, sentinel: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.bridge = bridge  # a Python object: its leaves must not become inputs of this node
        return embeddings.clone(), carrier.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_embeddings: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The carrier between two bridges only orders them: its edge counts, its gradient is nothing.
        gates = None
        if ctx.bridge is not None:
            gates = torch.stack(ctx.bridge.take_gradients())
            if ctx.bridge.keep is not None:
                ctx.bridge.keep(gates)
        return None, grad_embeddings, gates, None
