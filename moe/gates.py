"""Gates: logits of a router -> how much of each expert. Pure functions, one a method.

Legend: E experts, k slots. Each takes ``logits`` [..., E] float and returns ``(values [..., k], slots)``;
``slots`` ([..., k] int64) names the expert behind each value, or is None where k = E and value j belongs to
expert j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GateFunction = Callable[[Tensor, float, int | None], tuple[Tensor, Tensor | None]]


def softmax(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
    """softmax(logits / temperature): every expert, summing to one."""
    return torch.softmax(logits / temperature, dim=-1), None


def sigmoid(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
    """sigmoid(logits / temperature), normalised to sum to one (Poly, Ponti et al. 2022, no noise)."""
    values = torch.sigmoid(logits / temperature)
    return values / (values.sum(dim=-1, keepdim=True) + 1e-12), None


def top_k(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """softmax over the ``top_k`` largest logits, nothing for the rest (Shazeer et al. 2017, no noise)."""
    assert top_k is not None
    largest, slots = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(largest / temperature, dim=-1), slots


def one_hot(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
    """One on the largest logit, with the gradient of the softmax (straight-through, Bengio et al. 2013)."""
    soft = torch.softmax(logits / temperature, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach()), None


def uniform(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
    """1 / E for every expert: the average-routing control."""
    return torch.full_like(logits, 1.0 / logits.shape[-1]), None


GATES: dict[str, GateFunction] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "top_k": top_k,
    "one_hot": one_hot,
    "uniform": uniform,
}
