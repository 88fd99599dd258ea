"""SEmb: tasks whose sentences are alike (Poth et al. 2021, arXiv 2104.08247)."""

from __future__ import annotations

from torch import Tensor

from taskmoe.train.selection.base import Subject, cosines


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: cosines of the tasks' mean sentence embeddings, by a sentence encoder."""
    return cosines([subject.embeddings[name].mean(0) for name in subject.names])
