"""Does combining the gradients of tasks help where they conflict? Surgery against sums, on planted conflict.

    python benchmarks/conflict.py                    # about fifteen CPU minutes; goes on where it was
    python benchmarks/conflict.py --json             # the same, and one JSON object as the last line

Every arm gets the same grid of learning rates, tried on seed 0 and chosen on validation rows; static weights
are the best of a few random draws, on seed 0 and at the rate of ``sum``. The comparison is on other seeds and
on test rows, paired by seed, after as many steps and after as much time. ``longer`` is ``sum`` with 5/3 of
the steps (and a schedule as long), about the time that surgery takes. Time is the process's CPU time in
training steps, on one thread: other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conflict_bed import LEVELS, METHODS, Bed, Size, build_base, build_bed, train
from conflict_look import gradients

from taskmoe.train.surgery.gramian import inactive

ARMS = ("sum", "longer", "static", "random", *METHODS)
ROUTED = ("opposed", ("sum", "pcgrad"))  # the level and the arms that are tried with a routed bank, too
# Student's 97.5 % quantile by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Run = dict[str, Any]


class Store:
    """Finished runs in one JSON file, written after each; those of other settings are forgotten."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.runs: dict[str, Run] = {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == self.settings:
                self.runs = found["runs"]

    def run(self, key: str, make: Callable[[], Run]) -> Run:
        """The run of this name; made and kept if there is none."""
        if key not in self.runs:
            self.runs[key] = make()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"settings": self.settings, "runs": self.runs}), encoding="utf-8")
            part.replace(self.path)
            print(f"{key}: {final(self.runs[key], 'validation')['mean']:.4f} on validation", flush=True)
        return self.runs[key]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What all runs share."""

    size: Size
    beds: Mapping[str, Bed]
    base: Mapping[str, torch.Tensor]
    store: Store
    rates: Sequence[float]
    draws: int
    looked_at: Sequence[int]  # seeds whose runs of ``sum`` tell about gradients

    def run(self, level: str, kind: str, arm: str, rate: float, seed: int, weights: Any = None) -> Run:
        name = f"{arm} {[round(w, 2) for w in weights]}" if weights else arm
        how = {"kind": kind, "method": arm, "weights": weights, "rate": rate, "seed": seed}
        size = self.size
        if arm == "longer":
            size, how["method"] = dataclasses.replace(size, steps=size.steps * 5 // 3), "sum"
        how["look"] = gradients if arm == "sum" and kind == "lora" and seed in self.looked_at else None
        return self.store.run(
            f"{level}/{kind}/{name}/rate {rate:g}/seed {seed}",
            lambda: train(self.beds[level], self.base, size, **how),
        )

    def tune(self, level: str, kind: str, arms: Sequence[str]) -> dict[str, Run]:
        """{arm: {"rate", "weights", "tried"}}, on seed 0 and validation rows."""
        found: dict[str, Run] = {}
        for arm in arms:
            if arm == "longer":
                found[arm] = {"rate": found["sum"]["rate"], "weights": None, "tried": []}
                continue
            if arm == "static":
                tasks = len(self.beds[level].tasks)
                drawn = np.random.default_rng(0).dirichlet(np.full(tasks, 2.0), self.draws) * tasks
                choices = [(found["sum"]["rate"], [round(w, 4) for w in row]) for row in drawn.tolist()]
            else:
                choices = [(rate, None) for rate in self.rates]
            tried = []
            for rate, weights in choices:
                run = self.run(level, kind, arm, rate, 0, weights)
                tried.append({"rate": rate, "weights": weights, "score": final(run, "validation")["mean"]})
            best = max(tried, key=lambda one: one["score"])
            found[arm] = {"rate": best["rate"], "weights": best["weights"], "tried": tried}
        return found


def summary(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means over tasks, and the worst task: of right letters (``mean``, ``worst``), answers, and the loss."""
    return {
        "mean": statistics.fmean(scores["letters"]),
        "worst": min(scores["letters"]),
        "exact": statistics.fmean(scores["exact"]),
        "loss": statistics.fmean(scores["loss"]),
        "worst_loss": max(scores["loss"]),
    }


def final(run: Run, split: str = "test") -> dict[str, float]:
    return summary(run["curve"][-1][split])


def at_time(run: Run, seconds: float) -> dict[str, float]:
    """The summary at a time within the run, between the evaluations before and after it; ``step`` likewise.

    Before the first evaluation it is that of the first.
    """
    times = [point["cpu_seconds"] for point in run["curve"]]
    points = [{**summary(point["test"]), "step": point["step"]} for point in run["curve"]]
    return {name: float(np.interp(seconds, times, [p[name] for p in points])) for name in points[0]}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "interval": Student's 95 % for the mean over seeds (none for one seed)}."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "interval": None}
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval": [mean - half, mean + half]}


def change(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """{score: its change in %, paired by seed}."""
    return {
        name: interval([
            100 * (a[name] / b[name] - 1) if b[name] else 0.0 for a, b in zip(ours, theirs, strict=True)
        ])
        for name in ("mean", "worst", "loss", "worst_loss")
    }  # fmt: skip


def compare(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """{arm: scores, and their change against ``sum`` in %, at equal steps and equal time}; a run a seed."""
    ends = {arm: [run["curve"][-1]["cpu_seconds"] for run in some] for arm, some in runs.items()}
    limits = [min(times) for times in zip(*ends.values(), strict=True)]
    views = {
        "equal_steps": {arm: [final(run) for run in some] for arm, some in runs.items()},
        "equal_time": {
            arm: [at_time(run, limit) for run, limit in zip(some, limits, strict=True)]
            for arm, some in runs.items()
        },
    }
    found: dict[str, Any] = {}
    for arm in runs:
        found[arm] = {"cpu_seconds": ends[arm]}
        for view, scores in views.items():
            mine = {name: [s[name] for s in scores[arm]] for name in scores[arm][0]}
            found[arm][view] = {"scores": mine, "against_sum": change(scores[arm], scores["sum"])}
        if "longer" in runs:
            ends_of = views["equal_steps"]
            found[arm]["against_longer"] = change(ends_of[arm], ends_of["longer"])
        found[arm]["curve"] = [
            {
                "step": points[0]["step"],
                "cpu_seconds": statistics.fmean(p["cpu_seconds"] for p in points),
                **{k: statistics.fmean(summary(p["test"])[k] for p in points) for k in ("mean", "loss")},
            }
            for points in zip(*(run["curve"] for run in runs[arm]), strict=True)
        ]
    return found


def seen(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """{rows a task: what was measured along runs of ``sum``, means over evaluations and seeds}.

    ``METHOD_inactive`` is the share of evaluations at which the method left the update as it was.
    """
    looks = [look for run in runs for look in run.get("gradients", ())]
    found = {}
    for rows in dict.fromkeys(look["rows"] for look in looks):
        here = [look for look in looks if look["rows"] == rows]
        names = [name for name in here[0] if name not in ("step", "rows")]
        found[str(rows)] = {name: statistics.fmean(look[name] for look in here) for name in names}
        for name in METHODS:
            idle = [inactive(look[f"{name}_change"]) for look in here]
            found[str(rows)][f"{name}_inactive"] = sum(idle) / len(idle)
    return found


def measure(suite: Suite, seeds: Sequence[int]) -> dict[str, Any]:
    """All runs. Arms and levels take turns within a seed, so that what a stop leaves out is seeds."""
    plans = [{(level, "lora"): ARMS for level in suite.beds}]
    if ROUTED[0] in suite.beds:
        plans.append({(ROUTED[0], "bank"): ROUTED[1]})
    chosen: dict[tuple[str, str], dict[str, Run]] = {}
    runs: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for plan in plans:
        for place, arms in plan.items():
            chosen[place] = suite.tune(*place, arms)
            runs[place] = {arm: [] for arm in arms}
        for seed in seeds:
            for place, arms in plan.items():
                for arm in arms:
                    how = chosen[place][arm]
                    run = suite.run(*place, arm, how["rate"], seed, how["weights"])
                    runs[place][arm].append(run)
    levels: dict[str, Any] = {}
    for (level, kind), arms in runs.items():
        about = levels.setdefault(level, {
            "title": LEVELS[level].title,
            "visibility": LEVELS[level].visibility,
            "skill_gym": dict(LEVELS[level].gym),
            "tasks": [task.name for task in suite.beds[level].tasks],
        })  # fmt: skip
        compared = compare(arms)
        about[kind] = {arm: {**chosen[level, kind][arm], **compared[arm]} for arm in arms}
        if kind == "lora":
            about["gradients"] = seen(arms["sum"])
    return levels


def print_tables(levels: Mapping[str, Any]) -> None:
    for level, about in levels.items():
        print(f"\n{level}: {about['title']}")
        head = ("rows", "cosine", "rivals", "null", "conflicts", "null", *METHODS)
        print("".join(f"{name:>10}" for name in head) + "   change of the update")
        for rows, g in about["gradients"].items():
            names = ("cosine", "rivals_cosine", "null_cosine", "conflict_fraction", "null_conflict_fraction")
            cells = [f"{g[n]:10.2f}" if n in g else f"{'':10}" for n in names]
            changes = [changed(g[f"{name}_change"]) for name in METHODS]
            print(f"{rows:>10}" + "".join(cells) + "".join(f"{cell:>10}" for cell in changes))
        for kind in ("lora", "bank"):
            if kind not in about:
                continue
            print(f"{kind:10}{'rate':>8}{'seconds':>9}{'letters':>9}{'worst':>8}{'loss':>8}  against sum, %")
            for arm, one in about[kind].items():
                steps, time = one["equal_steps"], one["equal_time"]
                s = {name: statistics.fmean(values) for name, values in steps["scores"].items()}
                seconds = statistics.fmean(one["cpu_seconds"])
                print(f"{arm:10}{one['rate']:8g}{seconds:9.1f}{s['mean']:9.3f}{s['worst']:8.3f}{s['loss']:8.3f}"
                      + "".join(f"  {name} {span(view['against_sum'][key])}"
                                for name, view in (("steps:", steps), ("time:", time))
                                for key in ("mean", "worst")))  # fmt: skip


def changed(change: float) -> str:
    return "inactive" if inactive(change) else f"{change:.2f}"


def span(one: Mapping[str, Any]) -> str:
    if one["interval"] is None:
        return f"{one['mean']:+.1f}"
    return f"{one['mean']:+.1f} [{one['interval'][0]:+.1f}, {one['interval'][1]:+.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="not 0: it tunes")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--draws", type=int, default=8, help="random static weights that are tried")
    for setting in dataclasses.fields(Size):
        option = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(option, dest=setting.name, type=int, default=setting.default)
    parser.add_argument("--out", type=Path, default=Path("runs/conflict"), help="folder of finished runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(arguments)
    if 0 in options.seeds or len(options.seeds) > len(STUDENT) + 1:
        parser.error(f"--seeds: from 1 to {len(STUDENT) + 1} seeds, without 0, which tunes")
    torch.set_num_threads(1)
    size = Size(**{setting.name: getattr(options, setting.name) for setting in dataclasses.fields(Size)})
    options.out.mkdir(parents=True, exist_ok=True)
    base = build_base(size, options.out / f"base-{size.width}-{size.rows}-{size.base_steps}.pt").state_dict()
    beds = {level: build_bed(LEVELS[level]) for level in options.levels}
    settings = {**dataclasses.asdict(size), "levels": {k: str(v) for k, v in LEVELS.items()}}
    store = Store(options.out / "runs.json", settings)
    suite = Suite(size, beds, base, store, options.rates, options.draws, looked_at=options.seeds[:2])
    levels = measure(suite, options.seeds)
    print_tables(levels)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "torchjd")},
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "settings": {**dataclasses.asdict(size), "rates": options.rates, "draws": options.draws},
        "seeds": options.seeds,
        "levels": levels,
    }
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
