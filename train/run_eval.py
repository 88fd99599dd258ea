"""``taskmoe eval RUN``: score a trained run, on its own data or on folders it has never seen."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taskmoe.moe import TaskTable, load_adapter
from taskmoe.moe.state import with_saved_gate, with_saved_vectors
from taskmoe.train import checkpoint
from taskmoe.train.adapt.unknown import route_unknown, settings_with, told
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import load
from taskmoe.train.distributed import Ranks, init, shutdown
from taskmoe.train.evaluate import evaluate
from taskmoe.train.output import page, print_json
from taskmoe.train.setup import build_data, build_moe
from taskmoe.train.weights import load_base

TASKS = "task_map.json"


def evaluate_run(
    run: str,
    overrides: Sequence[str],
    split: str | None,
    as_json: bool,
    baseline: str | None = None,
    unknown: str = "error",
) -> int:
    """Score ``run`` and print a table, or with ``as_json`` one JSON object and nothing else, on stdout.

    baseline: a run that is scored with the same overrides on the same split; the comparison is printed too.
    unknown: as for :func:`score_run`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError, DataError, TaskError, StateError, CheckpointError: as :func:`score_run`.
        FactsError: no task that both runs have with the same metric.
    """
    with stdout_is_stderr():
        ranks, found = score_run(run, overrides, split, unknown=unknown)
        other = None
        if baseline is not None:
            other = score_run(baseline, overrides, found["split"], unknown=unknown)[1]
    if not ranks.is_main:
        return 0
    if other is None:
        print_json(found) if as_json else _print_table(found)
        return 0
    from taskmoe.train.baseline import against
    from taskmoe.train.comparison_view import show

    compared = against(found, other)
    if as_json:
        print_json({**found, "baseline": other, "against": compared})
    else:
        _print_table(found)
        show(compared, page())
    return 0


@contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """What libraries print goes to stderr, from native code too: stdout is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def score_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    return_predictions: bool = False,
    unknown: str = "error",
) -> tuple[Ranks, dict[str, Any]]:
    """Score the newest whole checkpoint of a run.

    Ids and labels of tasks are the checkpoint's: with ``--data.root DIR`` among the overrides, each folder of
    DIR is scored as the task of that name, whether or not the folder was there at training.

    Args:
        run: a run folder, or one of its checkpoints.
        overrides: settings as on a command line, on top of the run's own. All rows are scored, unless
            ``evaluation.max_rows`` is among them.
        split: train | validation | test; None: the run's ``eval_split``.
        unknown: what becomes of tasks that are not in the table, a name of
            :data:`taskmoe.train.adapt.unknown.POLICIES`.

    Returns:
        This process among the ranks, and what ``evaluate`` returns with ``run``, ``checkpoint``, ``step``,
        ``split`` and ``data_root`` before it.

    Raises:
        ConfigError: not a run folder, or settings that cannot be used.
        CheckpointError: no whole checkpoint.
        TaskError: a task that is not in the run's table, under ``unknown: error``; names the nearest.
        AdaptError: a run that cannot serve tasks that it does not know.
        DataError: bad rows. StateError: weights that do not fit the settings.
    """
    folder = Path(run)
    home = folder if (folder / "config.yaml").is_file() else folder.parent
    if not (home / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder (it has no config.yaml)")
    # Training's engine plays no part, and its file may be gone.
    config = load(home / "config.yaml", ["--deepspeed=null", *overrides])
    if not any("max_rows=" in o or o.endswith("max_rows") for o in overrides):
        config = replace(config, evaluation=replace(config.evaluation, max_rows=None))
    try:
        path = checkpoint.find(folder)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(str(error).removeprefix("resume_from_checkpoint: ")) from error
    wanted = split or config.eval_split
    ranks = init(config)
    try:
        given = {m[1] for o in overrides if (m := re.match(r"-*moe\.(\w+)", o))}
        moe = with_saved_gate(with_saved_vectors(config.moe, path), path, given)  # a phase may gate otherwise
        found = _score(replace(config, moe=moe), home, path, wanted, ranks, return_predictions, unknown)
    finally:
        shutdown(ranks)
    step = checkpoint.read_state(path)["step"]
    about = {"run": str(home), "checkpoint": path.name, "step": step, "split": wanted}
    return ranks, {**about, "data_root": config.data.root, **found}


def _score(
    config: Config,
    home: Path,
    path: Path,
    split: str,
    ranks: Ranks,
    return_predictions: bool,
    unknown: str,
) -> dict[str, Any]:
    def say(line: str) -> None:
        if ranks.is_main:
            print(f"taskmoe: {line}", file=sys.stderr)

    tasks = TaskTable.load(path / TASKS)
    data = build_data(config, ranks, (split,), tasks, home / "tokenizer", say, append=unknown != "error")
    if not any(len(s.tokens) for s in data.bundle.splits[split]):
        raise ConfigError(f"{config.data.root or home}: none of the tasks has a {split} split")
    added = data.bundle.tasks.names[len(tasks) :]
    moe = settings_with(config, tasks, added, unknown) if added else config.moe
    model = build_moe(replace(config, moe=moe), data.tokenizer, data.bundle.tasks, ranks)
    load_base(model, path)
    load_adapter(model, path)
    if added:
        rows = data.bundle.splits[split][len(tasks) :]
        texts = {name: [row["prompt"] for row in own.raw] for name, own in zip(added, rows, strict=True)}
        texts = {name: own for name, own in texts.items() if own}
        routed = route_unknown(model, tasks, texts, unknown, load(home / "config.yaml", ["--deepspeed=null"]))
        for name in added:
            say(told(name, routed))
    best = checkpoint.read_state(path).get("best")
    if best and f"checkpoint-{best['step']}" != path.name:
        say(f"scoring {path}; the best of the run was checkpoint-{best['step']}")
    return evaluate(
        model,
        data.bundle.splits[split],
        data.tokenizer,
        config,
        data.collator,
        ranks,
        return_predictions=return_predictions,
    )


def _print_table(found: dict[str, Any]) -> None:
    title = f"{found['run']}: {found['checkpoint']}, {found['split']}"
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("value", "loss", "rows"):
        table.add_column(name, justify="right")
    for name, scores in found["tasks"].items():
        metric = scores["metric"]
        table.add_row(name, metric, f"{scores[metric]:.4f}", f"{scores['loss']:.4f}", str(scores["rows"]))
    table.add_section()
    for metric, value in found["macro"].items():
        table.add_row("macro", metric, f"{value:.4f}", "", "")
    for group, value in found["groups"].items():
        if group not in found["tasks"]:
            table.add_row(f"group {group}", "mean", f"{value:.4f}", "", "")
    table.add_row("score", f"mean of {len(found['groups'])}", f"{found['score']:.4f}", "", "")
    Console().print(table)
