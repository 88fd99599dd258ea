"""What ``taskmoe adapt`` prints: means over tasks, intervals over seeds, gains over another mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
from rich.text import Text

from taskmoe.train.adapt.settings import AdaptSettings
from taskmoe.train.adapt.study import Study, adapt
from taskmoe.train.comparison import SMALLEST_BASELINE, Arm, beside, interval
from taskmoe.train.output import page, print_json, print_table
from taskmoe.train.run_eval import stdout_is_stderr


def show(
    run: str,
    settings: AdaptSettings,
    modes: Sequence[str],
    shots: Sequence[int | None],
    seeds: Sequence[int],
    out: str | None,
    baseline: str | None,
    force: bool,
    as_json: bool,
) -> int:
    """Adapt, then print a line for each mode and number of shots, or one JSON object.

    Returns:
        The exit code, 0.

    Raises:
        AdaptError and the others of :func:`taskmoe.train.adapt.study.adapt`.
    """
    with stdout_is_stderr():
        study = adapt(run, settings, modes, shots, seeds, out, force)
    lines = summary(study, baseline)
    if as_json:
        print_json({**asdict(study), "baseline": baseline, "summary": lines})
        return 0
    console = page()
    columns = ["mode", "shots", "seeds", "score", "steps", "numbers learned"]
    columns += [f"minus {baseline}", "relative gain"] if baseline else []
    rows = [_row(line, bool(baseline)) for line in lines]
    print_table(console, f"{run}: {len(study.tasks)} new task(s), {study.split} rows", columns, rows)
    if len(study.tasks) > 1:
        cells = [
            [line["mode"], _shots(line), *(f"{v:.4f}" for v in line["tasks"].values())] for line in lines
        ]
        print_table(console, "task by task", ["mode", "shots", *study.tasks], cells, names=2)
    reading = "Score: the mean of the tasks' own metrics"
    if len(seeds) > 1:
        reading += ", with a 95 % interval of Student's t over the seeds"
    if baseline:
        reading += f"; tasks with a score under {SMALLEST_BASELINE} there are not in the relative gain"
    console.print(Text(f"{reading}."))
    for remark in study.remarks:
        console.print(Text(f"note: {remark}"))
    if out is not None:
        console.print(Text(f"saved in {out}; taskmoe eval, export and inspect take its run folders"))
    return 0


def summary(study: Study, baseline: str | None) -> list[dict[str, Any]]:
    """One line for each mode and number of shots: means over the tasks, with intervals over the seeds.

    Args:
        baseline: a mode; gains are against it with as many shots, on the seeds that both have. Tasks where it
            is under ``SMALLEST_BASELINE`` are not in the relative gain.
    """
    arms: dict[tuple[str, int | None], Arm] = {}
    for s in study.scores:
        arm = arms.setdefault((s.mode, s.shots), Arm({}, s.mode))
        arm.scores.setdefault(s.seed, {})[s.task] = s.value
        arm.metrics[s.task] = s.metric
    lines = []
    for (mode, shots), arm in arms.items():
        mine = [s for s in study.scores if (s.mode, s.shots) == (mode, shots)]
        base = None if mode == baseline else _baseline(arms, baseline, shots)
        found: dict[str, Any] = {} if base is None else beside(arm, base, study.tasks, [])
        line: dict[str, Any] = {
            "mode": mode,
            "shots": shots,
            "seeds": list(arm.scores),
            "score": interval(np.array([fmean(scores.values()) for scores in arm.scores.values()])),
            "difference": found.get("difference"),
            "relative_gain": found.get("relative_gain"),
            "steps": fmean(s.steps for s in mine),
            "parameters": max(s.parameters for s in mine),
            "tasks": dict(zip(study.tasks, arm.means(study.tasks).tolist(), strict=True)),
        }
        lines.append(line)
    return lines


def _baseline(arms: Mapping[tuple[str, int | None], Arm], mode: str | None, shots: int | None) -> Arm | None:
    """With as many shots; a mode that reads none is the same with any."""
    if mode is None:
        return None
    return arms.get((mode, shots)) or arms.get((mode, 0))


def _row(line: Mapping[str, Any], gains: bool) -> list[str]:
    cells = [
        line["mode"], _shots(line), str(len(line["seeds"])), _with_interval(line["score"]),
        f"{line['steps']:.0f}", f"{line['parameters']:,}",
    ]  # fmt: skip
    if gains:
        relative = line["relative_gain"]
        share = relative and relative["value"]
        cells += [
            _with_interval(line["difference"], signed=True),
            "" if share is None else f"{100 * share:+.1f} %",
        ]
    return cells


def _shots(line: Mapping[str, Any]) -> str:
    return "all" if line["shots"] is None else str(line["shots"])


def _with_interval(found: Mapping[str, Any] | None, signed: bool = False) -> str:
    if found is None:
        return ""
    value = f"{found['value']:{'+' if signed else ''}.4f}"
    if found["low"] is None:
        return value
    return f"{value} ± {(found['high'] - found['low']) / 2:.4f}"
