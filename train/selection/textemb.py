"""TextEmb: tasks whose texts the model itself sees alike (Vu et al. 2020, arXiv 2005.00770)."""

from __future__ import annotations

from torch import Tensor

from taskmoe.train.selection.base import Subject, cosines


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: cosines of the tasks' mean last hidden states, over tokens, then over texts."""
    return cosines([subject.states[name].mean(0) for name in subject.names])
