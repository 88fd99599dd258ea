"""What ``taskmoe merge`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from taskmoe.train.merging.merge import merge
from taskmoe.train.output import page, print_json, print_table
from taskmoe.train.run_eval import stdout_is_stderr

SHOWN = 8  # so many names of tasks stand in a title


def show(paths: Sequence[str], method: str, out: str, kind: str, as_json: bool, **settings: Any) -> int:
    """Merge, then print what was done, or one JSON object.

    Returns:
        The exit code, 0.

    Raises:
        MergeError and the others of :func:`taskmoe.train.merging.merge.merge`.
    """
    with stdout_is_stderr():
        result = merge(paths, method, out, kind, **settings)
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
        return 0
    console = page()
    worst = f", largest error {max(result.errors.values()):.4f}" if result.errors else ""
    about = f"{len(result.loras)} LoRAs by {result.method}, coefficient {result.coefficient:g}"
    console.print(Text(f"{result.out}: {about}, rank {result.rank}{worst}"))
    if result.choices:
        tasks = ", ".join(result.held_in) if len(result.held_in) <= SHOWN else f"{len(result.held_in)} tasks"
        rows = [[f"{c.coefficient:g}", f"{c.score:.4f}", f"{c.loss:.4f}"] for c in result.choices]
        columns = ["coefficient", "score", "loss"]  # --json has each task's
        print_table(console, f"coefficients, on the {result.split} rows of {tasks}", columns, rows)
    if result.errors:
        rows = [[name, f"{error:.4f}"] for name, error in result.errors.items()]
        print_table(console, "cut to --max_rank: |dW - what was written| / |dW|", ["linear", "error"], rows)
    return 0
