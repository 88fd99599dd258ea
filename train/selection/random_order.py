"""Tasks in any order: what every method should beat."""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.train.choices import generator
from taskmoe.train.selection.base import Subject


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64, uniform in [0, 1), drawn by the settings' ``seed``."""
    T = len(subject.names)
    return torch.rand(T, T, generator=generator(subject.config.seed, 0), dtype=torch.float64)
