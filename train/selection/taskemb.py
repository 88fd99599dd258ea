"""TaskEmb: tasks for which the same weights of the base matter (Vu et al. 2020, arXiv 2005.00770)."""

from __future__ import annotations

from torch import Tensor

from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.train.fisher import fisher_of_rows
from taskmoe.train.selection.base import Subject, cosines
from taskmoe.train.trained_run import ALONE

CELLS = 16384  # of a sketch: cosines are good to about 1 / 128


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: cosines of the diagonals of the Fisher information of the base (of a run: its own).

    The papers fine-tune the model on each task first; here all tasks share one, untuned for any.

    Raises:
        SelectError: rows alone have no loss.
    """
    subject.require_rows_with_losses("taskemb")
    options = FisherVectors.Options(rows=subject.options.rows, dim=CELLS)
    found = fisher_of_rows(
        subject.config, subject.data, ALONE, options, subject.names, advance=subject.advance
    )
    return cosines([found[name] for name in subject.names])
