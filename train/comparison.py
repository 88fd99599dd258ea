"""What ``taskmoe compare`` says of several runs: arms, differences a task, gains, intervals over seeds.

docs/TRACKING.md describes the object. Legend: T tasks that all runs have, S seeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from taskmoe.train.run_folder import CONFIG
from taskmoe.train.track.facts import RESULTS, FactsError, check_folder, read_results, read_settings

CONFIDENCE = 0.95
# A baseline nearer to zero makes a relative gain of any size: its task does not count in the mean of them.
SMALLEST_BASELINE = 0.01
EQUAL = 1e-9  # scores are means of rows and seeds, in floating point
# Keys that say where a run lies and who watches it: runs may differ in them and be the same experiment.
ASIDE = ("seed", "output_dir", "overwrite_output_dir", "run_name", "resume_from_checkpoint", "report_to",
         "track", "save_steps", "save_total_limit", "logging_steps")  # fmt: skip
SAME_ROWS = ("eval_split", "evaluation.max_rows", "data", "datasets")  # else scores are of other rows
ABSENT = "(not set)"
SEED = re.compile(r"([-_.]s?|[-_.]?seed)[-_.]?\d+$")


@dataclass
class Arm:
    """Runs whose settings differ in the seed alone.

    scores: {seed: {task: the value of its own metric}}; metrics: {task: name of that metric}.
    """

    settings: dict[str, Any]
    name: str = ""
    runs: list[str] = field(default_factory=list)
    scores: dict[Any, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)

    def means(self, tasks: Sequence[str]) -> np.ndarray:
        """[T]: means over the seeds."""
        return np.mean([[scores[task] for task in tasks] for scores in self.scores.values()], axis=0)

    def of_seeds(self, seeds: Sequence[Any], tasks: Sequence[str]) -> np.ndarray:
        """[S, T]"""
        return np.array([[self.scores[seed][task] for task in tasks] for seed in seeds]).reshape(
            -1, len(tasks)
        )


def compare_runs(runs: Sequence[str]) -> dict[str, Any]:
    """The object; the arm of the first run is the baseline.

    Raises:
        FactsError: not a run folder, one given twice, a run without results, or no task that all runs have.
        ConfigError: settings that cannot be read.
    """
    return compare_arms(_arms(runs))


def compare_arms(arms: Sequence[Arm]) -> dict[str, Any]:
    """The object; the first arm is the baseline.

    Raises:
        FactsError: no task that all arms have.
    """
    tasks, remarks = _shared_tasks(arms)
    base = arms[0]
    remarks += _other_rows(arms)
    found = [beside(arm, base, tasks, remarks) for arm in arms]
    rows = []
    for t, task in enumerate(tasks):
        cells = [{"mean": arm["means"][t], "values": arm["values"][t], **arm["gains"][t]} for arm in found]
        rows.append({"name": task, "metric": base.metrics[task], "arms": cells})
    hidden = ("means", "values", "gains")
    return {
        "baseline": base.name,
        "confidence": CONFIDENCE,
        "smallest_baseline": SMALLEST_BASELINE,
        "arms": [{key: value for key, value in arm.items() if key not in hidden} for arm in found],
        "tasks": rows,
        "remarks": list(dict.fromkeys(remarks)),
    }


def _arms(runs: Sequence[str]) -> list[Arm]:
    """Runs put together; a seed that comes twice under the same settings begins another arm."""
    arms: list[Arm] = []
    seen: dict[Path, str] = {}
    for run in runs:
        home = Path(run)
        check_folder(home)
        if home.resolve() in seen:
            raise FactsError(f"{run}: the same run as {seen[home.resolve()]}; give each run once")
        seen[home.resolve()] = run
        if not (home / CONFIG).is_file():
            raise FactsError(f"{run}: not a run folder (it has no {CONFIG}); only whole runs are compared")
        results = read_results(home)
        if results is None:
            raise FactsError(
                f"{run}: no {RESULTS}: the run has not finished (go on with --resume_from_checkpoint true), "
                "or it had no rows to evaluate"
            )
        settings = read_settings(home)
        seed = settings.get("seed")
        same = {key: value for key, value in settings.items() if key not in ASIDE}
        arm = next((a for a in arms if a.settings == same and seed not in a.scores), None)
        if arm is None:
            arm = Arm(same)
            arms.append(arm)
        arm.runs.append(str(run))
        arm.scores[seed], metrics = _scores(home, results)
        arm.metrics |= metrics
    _name(arms)
    return arms


def _name(arms: Sequence[Arm]) -> None:
    """After the folders of the runs, without an end like ``-seed3`` where that makes them one."""
    taken: dict[str, int] = {}
    for arm in arms:
        folders = [Path(run).resolve().name for run in arm.runs]
        short = {SEED.sub("", folder) for folder in folders}
        name = short.pop() if len(folders) > 1 and len(short) == 1 else folders[0]
        taken[name] = taken.get(name, 0) + 1
        arm.name = f"{name} ({taken[name]})" if taken[name] > 1 else name


def _scores(home: Path, results: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    try:
        tasks = results["experts"]["tasks"]
        metrics = {str(name): str(scores["metric"]) for name, scores in tasks.items()}
        return {name: float(tasks[name][metric]) for name, metric in metrics.items()}, metrics
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FactsError(f"{home / RESULTS}: not the results of an evaluation ({error!r})") from error


def _shared_tasks(arms: Sequence[Arm]) -> tuple[list[str], list[str]]:
    """Tasks of all runs that have one metric everywhere, and what is to be said of the others."""
    every = list(dict.fromkeys(task for arm in arms for scores in arm.scores.values() for task in scores))
    lacking = {
        arm.name: [task for task in every if any(task not in scores for scores in arm.scores.values())]
        for arm in arms
    }
    remarks = [f"{name} has no task {_few(tasks)}: left out" for name, tasks in lacking.items() if tasks]
    shared = [task for task in every if all(task not in tasks for tasks in lacking.values())]
    if not shared:
        raise FactsError(f"no task is in all of {', '.join(arm.name for arm in arms)}: nothing to compare")
    kept = []
    for task in shared:
        metrics = dict.fromkeys(arm.metrics[task] for arm in arms)
        if len(metrics) == 1:
            kept.append(task)
        else:
            remarks.append(f"{task}: left out, its metric is {' here and '.join(metrics)} there")
    if not kept:
        raise FactsError("every task has another metric in another run; set evaluation.metrics alike")
    return kept, remarks


def _other_rows(arms: Sequence[Arm]) -> list[str]:
    changed = {key for arm in arms[1:] for key in _differences(arms[0].settings, arm.settings)}
    found = [key for key in sorted(changed) if any(f"{key}.".startswith(f"{same}.") for same in SAME_ROWS)]
    return [f"{key} differs between the arms: their scores may be of other rows" for key in found]


def beside(arm: Arm, base: Arm, tasks: Sequence[str], remarks: list[str]) -> dict[str, Any]:
    """An arm beside the baseline: over the seeds that both have, where there are two or more.

    Returns:
        What docs/TRACKING.md says of ``arms[]``, and in the order of ``tasks``: ``means``, ``values`` of each
        seed, ``gains``. ``remarks`` grows by what was left out.
    """
    means, base_means = arm.means(tasks), base.means(tasks)
    shared = [seed for seed in base.scores if seed in arm.scores]
    paired = len(shared) > 1 and arm is not base
    if paired:
        before, after = base.of_seeds(shared, tasks), arm.of_seeds(shared, tasks)
        if len(shared) < max(len(base.scores), len(arm.scores)):
            remarks.append(
                f"{arm.name}: differences are over the {len(shared)} seeds that {base.name} has too"
            )
    else:  # one row: the difference of the means, without an interval
        before, after = base_means[None], means[None]
        if arm is not base:
            remarks.append(
                f"{arm.name}: no interval, it has {len(shared)} seed(s) in common with {base.name}; two or "
                "more are needed"
            )
    moved_ST, level_T = after - before, np.abs(before.mean(0))
    counts = level_T >= SMALLEST_BASELINE
    left_out = [task for task, kept in zip(tasks, counts, strict=True) if not kept]
    if left_out and arm is not base:
        remarks.append(
            f"{arm.name}: {_few(left_out)} not in the average relative gain: the baseline is under "
            f"{SMALLEST_BASELINE}"
        )
    # Divided by the mean over seeds: the gain of the means is then the mean of the gains.
    relative_ST = moved_ST[:, counts] / level_T[counts]
    gain: dict[str, Any] = dict.fromkeys(("value", "low", "high", "median"))
    if counts.any():
        gain = {**interval(relative_ST.mean(1)), "median": float(np.median(relative_ST.mean(0)))}
    values = [fmean(scores[task] for task in tasks) for scores in arm.scores.values()]
    nothing = dict.fromkeys(("difference", "low", "high", "relative"))
    gains: list[dict[str, Any]] = [dict(nothing) for _ in tasks]
    for t in range(len(tasks) if arm is not base else 0):
        span = interval(moved_ST[:, t])
        share = float(moved_ST[:, t].mean() / level_T[t]) if counts[t] else None
        gains[t] = {"difference": span.pop("value"), **span, "relative": share}
    return {
        "name": arm.name,
        "runs": arm.runs,
        "seeds": list(arm.scores),
        "shared_seeds": shared if arm is not base else [],
        "differs": _differences(base.settings, arm.settings),
        "mean": {"value": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": values},
        "median": float(np.median(means)),
        "wins": None if arm is base else _wins(moved_ST.mean(0)),
        "difference": None if arm is base else interval(moved_ST.mean(1)),
        "relative_gain": None if arm is base else {**gain, "tasks": int(counts.sum()), "left_out": left_out},
        "means": means.tolist(),
        "values": [[scores[task] for scores in arm.scores.values()] for task in tasks],
        "gains": gains,
    }


def _wins(moved_T: np.ndarray) -> dict[str, int]:
    """Tasks on which an arm is better, the same and worse."""
    same_T = np.isclose(moved_T, 0.0, atol=EQUAL)
    better = int((~same_T & (moved_T > 0)).sum())
    same = int(same_T.sum())
    return {"better": better, "same": same, "worse": len(moved_T) - better - same}


def interval(values_S: np.ndarray) -> dict[str, float | None]:
    """Mean and Student's interval of paired differences; without one for a single seed."""
    S, mean = len(values_S), float(values_S.mean())
    if S < 2:
        return {"value": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, S - 1) * values_S.std(ddof=1) / S**0.5)
    return {"value": mean, "low": mean - half, "high": mean + half}


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{dotted key: [the baseline's value, the other's]} of settings that differ."""
    left, right = dict(_leaves(base)), dict(_leaves(other))
    pairs = {key: [left.get(key, ABSENT), right.get(key, ABSENT)] for key in {**left, **right}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
