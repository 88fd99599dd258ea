"""Tasks that pull the base in the same direction (cosines of task gradients, as in Yu et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.train.fisher import fisher_of_rows, gradient_vectors
from taskmoe.train.selection.base import Subject, cosines
from taskmoe.train.selection.taskemb import CELLS
from taskmoe.train.trained_run import ALONE


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64, in [-1, 1]: cosines of the tasks' gradients, means over rows of each row's loss, with
    respect to all weights of the base; of a run: of its own base, the experts switched off.

    Raises:
        SelectError: rows alone have no loss.
    """
    subject.require_rows_with_losses("gradient")
    found = fisher_of_rows(
        subject.config,
        subject.data,
        ALONE,
        FisherVectors.Options(rows=subject.options.rows, dim=CELLS),
        subject.names,
        make=gradient_vectors,
        advance=subject.advance,
    )
    return cosines([found[name] for name in subject.names])
