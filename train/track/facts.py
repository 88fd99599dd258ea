"""What a run or a saved adapter tells about itself, gathered once for the terminal, JSON and the report.

Neither the data nor the base model is read, and no GPU is needed. Legend: R rows of the Gramian.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskmoe.moe.snapshot import FILE as ROUTING
from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.state import CONFIG as ADAPTER
from taskmoe.moe.tasks import TaskTable
from taskmoe.train import checkpoint, config_yaml
from taskmoe.train.folders import nearest_folder
from taskmoe.train.run_folder import CONFIG, TASKS
from taskmoe.train.track.log import read_log
from taskmoe.train.track.tracker import LOG_NAME
from taskmoe.train.track.wandb_log import without_secrets

RESULTS = "eval_results.json"
FIRST = "routing/step-0.safetensors"  # what the routing was before it learned
READ = (ROUTING, TASKS, ADAPTER, checkpoint.STATE)  # what is read of a checkpoint
HALF_WRITTEN = re.compile(r"checkpoint-\d+\.tmp")
UNFINITE = ("nan", "inf", "-inf")  # how the log writes numbers that JSON lacks


class FactsError(ValueError):
    """A folder of which nothing can be told."""


@dataclass(frozen=True)
class Facts:
    """One routing, and how the run came to it.

    source: the folder that was asked about. kind: ``run`` (its newest whole checkpoint is told of),
    ``checkpoint``, or ``adapter`` (of save_pretrained). step: of the checkpoint; None for an adapter.
    config: the run's settings without secrets; of a folder outside a run ``{"moe": the adapter's}``.
    first: the routing before the first step. log: the lines of trainer_log.jsonl, of a checkpoint those up to
    its step; numbers that are not finite are floats. results: eval_results.json, where it is of this step.
    conflict: the slugs of the tasks that share each row, and the last cosines of the rows, R lists of R, NaN
    where they are not known.
    """

    source: Path
    kind: str
    step: int | None
    config: dict[str, Any]
    tasks: TaskTable
    snapshot: Snapshot
    first: Snapshot | None
    log: list[dict[str, Any]]
    results: dict[str, Any] | None
    conflict: tuple[list[list[str]], list[list[float]]] | None


def gather(path: str | Path) -> Facts:
    """The facts of a run folder, a checkpoint (inside a run or copied from it), or a saved adapter.

    Raises:
        FactsError: no such folder, or not one of these; a checkpoint that is not whole, or without routing.
        SnapshotError, TaskError, ConfigError: a file in it that cannot be read; names the file.
    """
    source = Path(path)
    kind, folder = _locate(source)
    if not (folder / ROUTING).is_file():
        raise FactsError(
            f"{folder}: it has no {ROUTING}: an older version saved it; train on, or save it again"
        )
    home = source if kind == "run" else folder.parent
    inside = kind != "adapter" and (home / CONFIG).is_file()
    step = None if kind == "adapter" else int(checkpoint.read_state(folder)["step"])
    log = read_run_log(home) if inside else []
    if kind == "checkpoint":
        log = [line for line in log if line["step"] <= (step or 0)]
    results = read_results(home) if inside else None
    first = home / FIRST
    return Facts(
        source=source,
        kind=kind,
        step=step,
        config=read_settings(home) if inside else {"moe": _read_json(folder / ADAPTER)},
        tasks=TaskTable.load(folder / TASKS),
        snapshot=Snapshot.load(folder / ROUTING),
        first=Snapshot.load(first) if inside and first.is_file() else None,
        log=log,
        results=results if results is not None and results.get("step") == step else None,
        conflict=last_conflict(log),
    )


def latest(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of every key of a log."""
    found: dict[str, Any] = {}
    for line in log:
        found.update(line)
    return found


def read_settings(home: Path) -> dict[str, Any]:
    """The settings of a run folder as they are written, without secrets.

    Raises:
        ConfigError: not readable.
    """
    settings: dict[str, Any] = without_secrets(config_yaml.read(home / CONFIG)[0])
    return settings


def read_results(home: Path) -> dict[str, Any] | None:
    """``eval_results.json`` of a run folder; None where it has none.

    Raises:
        FactsError: not readable.
    """
    path = home / RESULTS
    return _read_json(path) if path.is_file() else None


def read_run_log(home: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, with floats for numbers that are not finite."""
    lines = read_log(home / LOG_NAME)
    return [{key: float(v) if v in UNFINITE else v for key, v in line.items()} for line in lines]


def check_folder(source: Path) -> None:
    """Whether there is a folder.

    Raises:
        FactsError: it is a file, or there is nothing; names the nearest folder.
    """
    if source.is_file():
        raise FactsError(f"{source}: a file; give the folder of a run")
    if not source.is_dir():
        raise FactsError(f"{source}: no such folder{nearest_folder(source)}")


def _locate(source: Path) -> tuple[str, Path]:
    """What a folder is, and where its routing lies."""
    check_folder(source)
    if HALF_WRITTEN.fullmatch(source.name):
        raise FactsError(f"{source}: a checkpoint that was not written to its end{_others(source.parent)}")
    if (source / CONFIG).is_file():
        return "run", _whole(source)
    if checkpoint.FOLDER.fullmatch(source.name) or (source / checkpoint.MANIFEST).exists():
        return "checkpoint", _whole(source)
    if (source / ADAPTER).is_file() and (source / TASKS).is_file():
        return "adapter", source
    raise FactsError(
        f"{source}: neither a run folder ({CONFIG}), a checkpoint ({checkpoint.MANIFEST}) nor a saved "
        f"adapter ({ADAPTER}, {TASKS}){_others(source)}"
    )


def _whole(source: Path) -> Path:
    """The checkpoint that is meant, once it has proved whole: of weights and optimiser, which nobody reads
    here, the sizes alone."""
    try:
        return checkpoint.find(source, hashes=READ)
    except checkpoint.CheckpointError as error:
        reason = str(error).removeprefix("resume_from_checkpoint: ")
        if "no checkpoint-N" in reason:
            half = sorted(p.name for p in source.iterdir() if HALF_WRITTEN.fullmatch(p.name))
            what = f"; {half[-1]} was not written to its end" if half else ""
            reason = f"{source}: the run has not saved a checkpoint yet{what}"
        raise FactsError(reason) from error


def _others(folder: Path) -> str:
    """The end of an error's line: the checkpoints and runs in a folder, if any."""
    found = [p for p in folder.iterdir() if checkpoint.FOLDER.fullmatch(p.name) or (p / CONFIG).is_file()]
    return f"; there are {', '.join(sorted(p.name for p in found)[:5])}" if found else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FactsError(f"{path}: not a readable JSON object ({error})") from error
    return found


def last_conflict(log: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[list[float]]] | None:
    """``grad/rows`` and ``grad/cosine_matrix`` of the last line that has them."""
    for line in reversed(log):
        if "grad/cosine_matrix" in line:
            cosines = [
                [math.nan if c is None else float(c) for c in row] for row in line["grad/cosine_matrix"]
            ]
            return line["grad/rows"], cosines
    return None
