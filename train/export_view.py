"""What ``taskmoe export`` prints."""

from __future__ import annotations

from typing import Any

from taskmoe.train.export import Exported, export_run
from taskmoe.train.output import page, print_json, print_table
from taskmoe.train.run_eval import stdout_is_stderr

COLUMNS = ["task", "folder", "rank", "largest error", "logits differ by", "loss"]


def export(run: str, task: str, out: str, kind: str, as_json: bool, **settings: Any) -> int:
    """Export, then print a line a task, or one JSON object.

    Returns:
        The exit code, 0.

    Raises:
        ExportError and the others of :func:`taskmoe.train.export.export_run`.
    """
    with stdout_is_stderr():
        found = export_run(run, task, out, kind, **settings)
    if as_json:
        print_json({"run": run, "out": out, "tasks": {e.task: _numbers(e) for e in found}})
        return 0
    console = page()
    print_table(console, f"{run}: exported", COLUMNS, [_row(e) for e in found], names=2)
    cut = [[e.task, name, f"{error:.4f}"] for e in found for name, error in e.errors.items()]
    if cut:
        print_table(console, "cut to --max_rank: |dW - what was written| / |dW|", ["task", "linear", "error"],
                    cut, names=2)  # fmt: skip
    return 0


def _numbers(e: Exported) -> dict[str, Any]:
    found = {"folder": str(e.folder), "rank": e.rank, "errors": e.errors, "difference": e.difference}
    return found if e.losses is None else {**found, "loss_routed": e.losses[0], "loss_exported": e.losses[1]}


def _row(e: Exported) -> list[str]:
    worst = f"{max(e.errors.values()):.4f}" if e.errors else "exact" if e.losses is None else "mean gates"
    losses = "" if e.losses is None else f"{e.losses[0]:.4f} -> {e.losses[1]:.4f}"
    differs = "not checked" if e.difference is None else f"{e.difference:.1e}"
    return [e.task, str(e.folder), str(e.rank) if e.rank else "", worst, differs, losses]
