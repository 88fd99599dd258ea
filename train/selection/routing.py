"""Tasks that a run routes alike: cosines of their shares of the experts."""

from __future__ import annotations

from torch import Tensor

from taskmoe.moe.snapshot import FILE, Snapshot
from taskmoe.train.selection.base import SelectError, Subject
from taskmoe.train.track.routing import similarity


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64, in [0, 1]: :func:`taskmoe.train.track.routing.similarity` of the checkpoint's gates.

    Raises:
        SelectError: no run, or one whose experts take no gates. SnapshotError: an unreadable file.
    """
    run = subject.require_run("routing")
    snapshot = Snapshot.load(run.checkpoint / FILE)
    if not snapshot.gates:
        raise SelectError(
            f"--method routing: {run.checkpoint} routes nothing (moe.router {run.config.moe.router!r}, "
            f"moe.bank {run.config.moe.bank!r}); use textemb or gradient"
        )
    ids = [run.tasks.id(name) for name in subject.names]
    return similarity(snapshot)[ids][:, ids]
