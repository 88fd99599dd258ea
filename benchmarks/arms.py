"""Arms of a comparison: the same settings except for what an arm says, trained by the same loop."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskmoe.train.config import Config
from taskmoe.train.config_io import dump, load
from taskmoe.train.distributed import init, shutdown
from taskmoe.train.loop import train
from taskmoe.train.run_eval import score_run
from taskmoe.train.setup import Data, build_data, build_moe

BANKS = ("experts", "router", "task_embedding")  # what must be of equal size; heads are the same in all arms
RESULT = "quality.json"


@dataclass(frozen=True)
class Arm:
    """One way to train: settings on top of the suite's file, {dotted key: value}.

    With several ``choices`` (settings on top of ``settings``) all are trained on the first seed, and the one
    with the best score on the others too. ``fit_r`` names the arm whose banks and routers this one matches in
    size: ``moe.r`` is chosen so.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Mapping[str, Any], ...] = ({},)
    fit_r: str | None = None


@dataclass(frozen=True)
class Bench:
    """Where settings come from and where runs go."""

    config: Path
    common: Mapping[str, Any]  # for all arms, from the command line
    out: Path
    split: str = "validation"

    def load(self, settings: Mapping[str, Any]) -> Config:
        """The suite's file with ``common`` and then ``settings`` on top."""
        return load(self.config, [f"--{k}={as_text(v)}" for k, v in {**self.common, **settings}.items()])

    def data(self, config: Config) -> Data:
        """Rows of training and of the split that is scored."""
        ranks = init(config)
        try:
            return build_data(config, ranks, ("train", self.split), None, None, lambda line: None)
        finally:
            shutdown(ranks)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def trainable(bench: Bench, settings: Mapping[str, Any], data: Data) -> dict[str, int]:
    """Parameters that train in the last phase, by group."""
    config = bench.load(settings)
    ranks = init(config)
    try:
        model = build_moe(config, data.tokenizer, data.bundle.tasks, ranks)
    finally:
        shutdown(ranks)
    model.set_trainable(config.phases[-1].train)
    groups = model.trainable_groups()
    return {group: sum(p.numel() for _, p in members) for group, members in groups.items() if members}


def bank_size(sizes: Mapping[str, int]) -> int:
    return sum(sizes.get(group, 0) for group in BANKS)


def fitted(bench: Bench, arms: Mapping[str, Arm], name: str, data: Data) -> dict[str, Any]:
    """The settings of an arm, with the rank that makes its banks as large as those of its model arm.

    Raises:
        RuntimeError: no rank comes within 2 %.
    """
    arm = arms[name]
    settings = dict(arm.settings)
    if arm.fit_r is None:
        return settings
    wanted = bank_size(trainable(bench, arms[arm.fit_r].settings, data))
    one, two = (bank_size(trainable(bench, {**settings, "moe.r": r}, data)) for r in (1, 2))
    settings["moe.r"] = max(1, round(1 + (wanted - one) / (two - one)))
    got = bank_size(trainable(bench, settings, data))
    if abs(got - wanted) > 0.02 * wanted:
        raise RuntimeError(f"{name}: {got:,} parameters at r {settings['moe.r']}, {arm.fit_r} has {wanted:,}")
    return settings


def run(bench: Bench, label: str, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train and score one run, or read the result of one with the same settings.

    Returns:
        ``{"score", "predictions": {task: [text]}, "seconds", "steps", "rows", "settings"}``.
    """
    folder = bench.out / f"{label}-seed{seed}"
    # The loop scores at its end, on a row a task: the whole split is scored once, below.
    quiet = {"evaluation.max_rows": 1, "evaluation.controls": False, "eval_steps": None, "report_to": []}
    config = bench.load(
        {**settings, **quiet, "seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
    )
    about = dump(dataclasses.replace(config, output_dir="-"))
    done = folder / RESULT
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["settings"] == about:
            return found
    start = time.monotonic()
    code = train(config)
    if code:
        raise SystemExit(code)
    seconds = time.monotonic() - start
    _, scores = score_run(folder, (), bench.split, return_predictions=True)
    accumulate = config.per_device_train_batch_size * config.gradient_accumulation_steps
    found = {
        "score": scores["score"],
        "predictions": scores["predictions"],
        "seconds": seconds,
        "steps": config.max_steps,
        "rows": config.max_steps * accumulate,
        "settings": about,
    }
    part = done.with_suffix(".part")
    part.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    part.replace(done)
    return found


def run_arm(
    bench: Bench, name: str, arm: Arm, settings: Mapping[str, Any], seeds: list[int]
) -> dict[str, Any]:
    """All runs of an arm.

    Returns:
        ``{"runs": one a seed, "chosen": the choice's settings, "tried": [{"choice", "score"}]}``.
    """
    first = []
    for choice in arm.choices:
        label = "-".join([name, *(f"{k.rpartition('.')[2]}={as_text(v)}" for k, v in choice.items())])
        first.append((run(bench, label, {**settings, **choice}, seeds[0]), label, choice))
    best, label, choice = max(first, key=lambda found: found[0]["score"])
    runs = [best, *(run(bench, label, {**settings, **choice}, seed) for seed in seeds[1:])]
    tried = [{"choice": dict(c), "score": found["score"]} for found, _, c in first]
    return {"runs": runs, "chosen": dict(choice), "tried": tried}
