"""Gates that weigh each expert by itself: the sigmoid, with or without noise, and the options of Poly's code.

Legend: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError

EPS = 1e-12  # mttl's and peft's


@dataclass(frozen=True)
class SigmoidOptions:
    """Of ``sigmoid``: what happens to the values after the sigmoid."""

    normalise: str = "sum"  # sum: to one | sqrt: times sqrt(1 / E) | l2: the logits themselves to length one
    shared: bool = False  # the last expert is always on: 1 before the values are normalised

    def __post_init__(self) -> None:
        _check_norm(self.normalise, ("sum", "sqrt", "l2"))


def unread_by_l2(options: SigmoidOptions) -> dict[str, str]:
    """What ``normalise: l2`` leaves without effect, see ``GateMethod.idle``."""
    if options.normalise != "l2":
        return {}
    return dict.fromkeys(("router_temperature", "shared"), "normalise: l2 takes no sigmoid")


@dataclass(frozen=True)
class BernoulliOptions:
    """Of ``bernoulli``: the noise, and what happens to the values after it."""

    relaxed: bool = True  # noise of a relaxed Bernoulli variable in training; False: none
    straight_through: bool = False  # values rounded to 0 or 1, with the gradient as if they were not
    dropout: float = 0.0  # share of the experts that each task does without in a training step
    normalise: str = "sum"  # sum: to one | sqrt: times sqrt(1 / E)
    shared: bool = False  # the last expert is always on: 1 before the values are normalised

    def __post_init__(self) -> None:
        _check_norm(self.normalise, ("sum", "sqrt"))
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"moe.gate_options.dropout: {self.dropout} must be in [0, 1)")


def _check_norm(norm: str, known: tuple[str, ...]) -> None:
    if norm not in known:
        raise ConfigError(
            f"moe.gate_options.normalise: {norm!r} is unknown here; known are {', '.join(known)}"
        )


def sigmoid(
    logits: Tensor, temperature: float, top_k: int | None, noise: None, options: SigmoidOptions
) -> tuple[Tensor, None]:
    """sigmoid(logits / temperature), normalised (Poly without noise, Ponti et al. 2022; Caccia et al. 2023).

    l2: z / |z|, without a sigmoid and whatever the temperature, as in mttl.
    """
    if options.normalise == "l2":
        # The constant bounds the gradient at a row of zeros, which has no direction.
        return logits * torch.rsqrt(logits.square().sum(dim=-1, keepdim=True) + EPS), None
    return _normalised(torch.sigmoid(logits / temperature), options.normalise, options.shared), None


def bernoulli(
    logits: Tensor, temperature: float, top_k: int | None, noise: Tensor | None, options: BernoulliOptions
) -> tuple[Tensor, None]:
    """sigmoid((z + log u - log(1 - u)) / temperature), u uniform: a relaxed Bernoulli variable an expert
    (Ponti et al. 2022; Maddison et al. 2017), normalised. Without noise (in evaluation): the sigmoid.
    """
    values = _relaxed(logits, temperature, noise, options)
    if options.straight_through:
        # Where all would round to 0 the largest counts as 1: a task without any expert learns nothing.
        hard = (values > 0.5) | (values == values.amax(dim=-1, keepdim=True))
        values = hard.to(values.dtype) + (values - values.detach())
    if noise is not None and options.dropout > 0:
        # The low bits of a draw, which do not depend on its high ones, are a draw of their own.
        kept = (noise.to(logits.dtype) * 4096).frac() >= options.dropout
        values = values * kept / (1 - options.dropout)
    return _normalised(values, options.normalise, options.shared), None


def bernoulli_odds(
    logits: Tensor, temperature: float, noise: Tensor | None, options: BernoulliOptions
) -> Tensor:
    """The values of :func:`bernoulli` before rounding, dropout and normalising, [..., E]."""
    return _with_shared(_relaxed(logits, temperature, noise, options), options.shared)


def _relaxed(logits: Tensor, temperature: float, noise: Tensor | None, options: BernoulliOptions) -> Tensor:
    if noise is not None and options.relaxed:
        uniform = noise.to(logits.dtype)
        logits = logits + torch.log(uniform) - torch.log1p(-uniform)
    return torch.sigmoid(logits / temperature)


def _with_shared(values: Tensor, shared: bool) -> Tensor:
    if not shared:
        return values
    return torch.cat([values[..., :-1], torch.ones_like(values[..., -1:])], dim=-1)


def _normalised(values: Tensor, norm: str, shared: bool) -> Tensor:
    values = _with_shared(values, shared)
    if norm == "sqrt":
        return values / values.shape[-1] ** 0.5
    return values / (values.sum(dim=-1, keepdim=True) + EPS)
