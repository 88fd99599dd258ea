"""Gates: logits of a router -> how much of each expert. Pure functions, one a method.

Legend: E experts, k slots. Each function takes ``(logits [..., E], temperature, top_k, noise, options)`` and
returns ``(values [..., k], slots)``; ``slots`` ([..., k] int64) names the expert behind each value, or is
None where k = E and value j belongs to expert j. ``noise``: uniform draws from (0, 1) in the shape of the
logits for a method that is ``noisy``, while it trains; None: none, as in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.sigmoid_gates import (
    BernoulliOptions,
    SigmoidOptions,
    bernoulli,
    bernoulli_odds,
    sigmoid,
    unread_by_l2,
)

Gated = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class GateMethod:
    """One way to gate.

    uses: the settings it reads; idle: options -> {those of them, or options, that it leaves unread: why}.
    noisy: whether it takes noise in training. Options: a dataclass of settings of its own. soft: what its
    values are before they are rounded or cut to k experts, ``(logits, temperature, noise, options)`` ->
    [..., E] of 0 or more; None: the values, which say that themselves. chooses: whether, with these
    options, its values are zero at the experts that a task or a token does not use. blind: does not look at
    the logits.
    """

    function: Callable[..., Gated]
    uses: tuple[str, ...] = ("router_temperature",)
    idle: Callable[[Any], Mapping[str, str]] = lambda options: {}
    noisy: bool = False
    Options: type | None = None
    soft: Callable[..., Tensor] | None = None
    chooses: Callable[[Any], bool] = lambda options: False
    blind: bool = False

    def __call__(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        noise: Tensor | None = None,
        options: Any = None,
    ) -> Gated:
        """logits [..., E] float -> (values [..., k], slots [..., k] int64 or None)."""
        if options is None and self.Options is not None:
            options = self.Options()
        return self.function(logits, temperature, top_k, noise, options)

    def shares(
        self, logits: Tensor, temperature: float = 1.0, noise: Tensor | None = None, options: Any = None
    ) -> Tensor:
        """How the gate divides over the experts, [..., E], summing to one, with a gradient at every expert.

        Of a rounded gate the values will not do: |0| has no slope, and v / sum(v) of the one that is left
        is 1 whatever v is.
        """
        if options is None and self.Options is not None:
            options = self.Options()
        if self.soft is None:
            soft = self.function(logits, temperature, None, noise, options)[0].abs()
        else:
            soft = self.soft(logits, temperature, noise, options)
        return soft / soft.sum(-1, keepdim=True).clamp_min(1e-12)


def softmax(logits: Tensor, temperature: float, top_k: int | None, noise: None, options: None) -> Gated:
    """softmax(logits / temperature): every expert, summing to one."""
    return torch.softmax(logits / temperature, dim=-1), None


def top_k(logits: Tensor, temperature: float, top_k: int | None, noise: None, options: None) -> Gated:
    """softmax over the ``top_k`` largest logits, nothing for the rest (Shazeer et al. 2017, no noise)."""
    assert top_k is not None
    largest, slots = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(largest / temperature, dim=-1), slots


def one_hot(logits: Tensor, temperature: float, top_k: int | None, noise: None, options: None) -> Gated:
    """One on the largest logit, with the gradient of the softmax (straight-through, Bengio et al. 2013)."""
    soft = torch.softmax(logits / temperature, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach()), None


def gumbel(
    logits: Tensor, temperature: float, top_k: int | None, noise: Tensor | None, options: None
) -> Gated:
    """softmax((logits + G) / temperature), G standard Gumbel noise, one draw a task and step (Jang et al.
    2017; Ye, Zha, Ren 2022, who draw it for each example). Without noise (in evaluation): the softmax."""
    return torch.softmax(_with_gumbel(logits, noise) / temperature, dim=-1), None


def gumbel_one_hot(
    logits: Tensor, temperature: float, top_k: int | None, noise: Tensor | None, options: None
) -> Gated:
    """One on the largest of logits + G, with the gradient of ``gumbel`` (straight-through, Jang et al. 2017).

    Each expert is drawn with its probability under the softmax of the logits; without noise the likeliest is.
    """
    return one_hot(_with_gumbel(logits, noise), temperature, top_k, None, None)


def _with_gumbel(logits: Tensor, noise: Tensor | None) -> Tensor:
    return logits if noise is None else logits - torch.log(-torch.log(noise.to(logits.dtype)))


def _soft(logits: Tensor, temperature: float, noise: Tensor | None, options: None) -> Tensor:
    return torch.softmax(_with_gumbel(logits, noise) / temperature, dim=-1)


def _always(options: Any) -> bool:
    return True


def raw(logits: Tensor, temperature: float, top_k: int | None, noise: None, options: None) -> Gated:
    """The logits themselves: for routers that give gates (``fixed``, ``random``)."""
    return logits, None


def uniform(logits: Tensor, temperature: float, top_k: int | None, noise: None, options: None) -> Gated:
    """1 / E for every expert: the average-routing control."""
    return torch.full_like(logits, 1.0 / logits.shape[-1]), None


def with_gate(config: TaskMoEConfig, name: str) -> TaskMoEConfig:
    """``config`` with another gate and its default options."""
    reads = GATES[name].uses if name in GATES else ()
    return replace(config, gate=name, gate_options=None, top_k=config.top_k if "top_k" in reads else None)


GATES: dict[str, GateMethod] = {
    "softmax": GateMethod(softmax),
    "sigmoid": GateMethod(sigmoid, idle=unread_by_l2, Options=SigmoidOptions),
    "bernoulli": GateMethod(
        bernoulli,
        noisy=True,
        Options=BernoulliOptions,
        soft=bernoulli_odds,
        chooses=lambda options: options.straight_through,
    ),
    "gumbel": GateMethod(gumbel, noisy=True),
    "gumbel_one_hot": GateMethod(gumbel_one_hot, noisy=True, soft=_soft, chooses=_always),
    "top_k": GateMethod(top_k, uses=("router_temperature", "top_k"), soft=_soft, chooses=_always),
    "one_hot": GateMethod(one_hot, soft=_soft, chooses=_always),
    "raw": GateMethod(raw, uses=()),
    "uniform": GateMethod(uniform, uses=(), blind=True),
}
