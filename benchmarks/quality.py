"""How good are the experts? Arms trained by the same loop on the same rows, compared by a paired bootstrap.

    python benchmarks/quality.py tweeteval --data.root DIR --model_name_or_path FOLDER
    python benchmarks/quality.py tweeteval --data.root DIR --json --out FOLDER   # again: goes on where it was

Any setting of a run may follow (``--max_steps 100``): it holds for all arms. A run whose folder holds a
result for the same settings is not trained again. With ``--json`` the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from arms import Arm, Bench, bank_size, fitted, run_arm, trainable
from bootstrap import Scored, compare

from taskmoe.train.config import Config
from taskmoe.train.config_overrides import split as split_overrides
from taskmoe.train.evaluate import group_of, primary_metrics
from taskmoe.train.setup import Data

CONFIGS = Path(__file__).parents[1] / "configs"
# Plain LoRA: one bank for all tasks, always on, as a bank with one expert. None takes a setting back.
PLAIN_LORA = {
    "moe.num_experts": 1,
    "moe.router": "none",
    "moe.gate": "uniform",
    "moe.router_init_std": None,
    "router_learning_rate": None,
}


FROZEN = "logistic"  # the baseline that trains no encoder


@dataclass(frozen=True)
class Suite:
    """A config and the arms that are compared on it; the first arm is the config as it is."""

    config: str
    arms: Mapping[str, Arm]
    frozen: bool = False  # compare with logistic regression on the frozen encoder, too
    common: Mapping[str, Any] = field(default_factory=dict)


_INDUCTION_RATES = tuple({"learning_rate": rate} for rate in (1e-3, 2e-3, 5e-3))

SUITES: dict[str, Suite] = {
    "tweeteval": Suite(
        config="tweeteval_minilm.yaml",
        arms={
            "experts": Arm("experts, a mixture per task"),
            "lora": Arm(
                "one LoRA for all tasks",
                {**PLAIN_LORA, "moe.lora_alpha": None},
                choices=tuple({"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)),
                fit_r="experts",
            ),
        },
        frozen=True,
    ),
    "instruction_induction": Suite(
        config="instruction_induction.yaml",
        arms={
            "experts": Arm("experts, a mixture per task", choices=_INDUCTION_RATES),
            "lora": Arm(
                "one LoRA for all tasks, as large as all experts",
                {**PLAIN_LORA, "phases": [{"name": "joint", "train": ["base", "experts"]}]},
                choices=_INDUCTION_RATES,
                fit_r="experts",
            ),
            # As many parameters as the base, the experts and the router together.
            "dense": Arm(
                "a wider model without experts",
                {
                    "model.intermediate_size": 440,
                    "phases": [{"name": "dense", "train": ["base"], "adapters": False}],
                },
                choices=_INDUCTION_RATES,
            ),
        },
    ),
}


def scored_tasks(config: Config, data: Data, split: str) -> dict[str, Scored]:
    """What the bootstrap needs of every task that has rows in the split."""
    tasks = data.bundle.tasks
    specs = primary_metrics(config, tasks)
    found = {}
    for task, spec, part in zip(tasks, specs, data.bundle.splits[split], strict=True):
        if len(part.tokens):
            found[task.name] = Scored(list(part.raw), spec, task.labels, group_of(config, task.name))
    return found


def measure(
    suite: Suite, bench: Bench, seeds: list[int], resamples: int, wanted: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train what is missing and compare (all arms, or those wanted); the object that ``--json`` prints."""
    config = bench.load({})
    data = bench.data(config)
    tasks = scored_tasks(config, data, bench.split)
    predictions: dict[str, list[Mapping[str, Sequence[str]]]] = {}
    about: dict[str, Any] = {}
    for name, arm in suite.arms.items():
        if wanted is not None and name not in wanted:
            continue
        settings = fitted(bench, suite.arms, name, data)
        sizes = trainable(bench, {**settings, **arm.choices[0]}, data)
        done = run_arm(bench, name, arm, settings, seeds)
        predictions[name] = [run["predictions"] for run in done["runs"]]
        about[name] = {
            "title": arm.title,
            "settings": {**settings, **done["chosen"]},
            "tried": done["tried"],
            "trainable": {**sizes, "banks and routers": bank_size(sizes)},
            "seconds": [run["seconds"] for run in done["runs"]],
            "rows": done["runs"][0]["rows"],
            "steps": done["runs"][0]["steps"],
        }
    if suite.frozen and (wanted is None or FROZEN in wanted):
        from frozen import logistic

        found = logistic(config, data, bench.split, bench.out / "embeddings")
        predictions[FROZEN] = [found.pop("predictions")]
        about[FROZEN] = {"title": "logistic regression, frozen encoder", **found}
    result = compare(tasks, predictions, resamples)
    for name, extra in about.items():
        result["arms"][name].update(extra)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")},
            **({"scikit-learn": version("scikit-learn")} if FROZEN in about else {}),
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in bench.common.items() if k not in ("data.root", "model_name_or_path")},
        "split": bench.split,
        "seeds": seeds,
        "metrics": {name: task.metric for name, task in tasks.items()},
        "examples": {name: len(task.rows) for name, task in tasks.items()},
        **result,
    }


def print_table(result: Mapping[str, Any]) -> None:
    """Per task the mean over seeds and its sd, in %; the scores with their intervals; the differences."""
    arms = result["arms"]
    width = max(len(name) for name in result["metrics"]) + 2
    print(f"\n{'task':{width}}{'metric':20}{'rows':>6}" + "".join(f"{arm:>18}" for arm in arms))
    for task, metric in result["metrics"].items():
        cells = (_mean_sd(arms[arm]["tasks"][task]["mean"], arms[arm]["tasks"][task]["sd"]) for arm in arms)
        text = "".join(f"{cell:>18}" for cell in cells)
        print(f"{task:{width}}{metric:20}{result['examples'][task]:6}{text}")
    scores = "".join(f"{_mean_sd(a['score'], a['score_sd']):>18}" for a in arms.values())
    print(f"{'score':{width}}{'mean of groups':26}{scores}")
    spans = "".join(f"{_span(a['interval']):>18}" for a in arms.values())
    print(f"{'':{width}}{'95 % interval':26}{spans}\n")
    for pair, found in result["differences"].items():
        print(f"{pair}: {100 * found['score']:+.1f} {_span(found['interval'])}, {verdict(found['interval'])}")


def verdict(span: Sequence[float]) -> str:
    """What a difference's interval allows to say."""
    if span[0] > 0:
        return "higher"
    return "lower" if span[1] < 0 else "no difference shown"


def _mean_sd(mean: float, sd: float) -> str:
    return f"{100 * mean:.1f} +- {100 * sd:.1f}"


def _span(span: Sequence[float]) -> str:
    return f"[{100 * span[0]:.1f}, {100 * span[1]:.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Settings of a run may follow: they hold for all arms.",
    )
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="validation")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options, rest = parser.parse_known_args(arguments)
    suite = SUITES[options.suite]
    known = [*suite.arms, *([FROZEN] if suite.frozen else [])]
    for arm in options.arms or ():
        if arm not in known:
            parser.error(f"no arm {arm!r} in {options.suite}; there are {', '.join(known)}")
    pairs, unknown = split_overrides(rest)
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}")
    common = {**suite.common, **dict(pairs)}
    bench = Bench(CONFIGS / suite.config, common, options.out / options.suite, options.split)
    with redirect_stdout(sys.stderr):  # the loop prints; standard output belongs to the result
        result = measure(suite, bench, options.seeds, options.resamples, options.arms)
    print_table(result)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
