"""Tasks with the most training rows: what any method should beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskmoe.train.selection.base import Subject


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: the logarithm of a source's training rows, for every target."""
    sizes_T = torch.tensor([math.log(subject.size(name)) for name in subject.names], dtype=torch.float64)
    return sizes_T.expand(len(sizes_T), -1).clone()
