"""The folder of a run: whether it may be used, and what lies in it from the start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from taskmoe.moe import TaskTable
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import dump

CONFIG, TASKS, TOKENIZER = "config.yaml", "task_map.json", "tokenizer"
OWN_FILES = (
    CONFIG,
    TASKS,
    TOKENIZER,
    "trainable.txt",
    "trainer_log.jsonl",
    "eval_results.json",
    "latest",
    "wandb",
    "routing",
    "report.html",
)


def check(config: Config, resumed: Path | None) -> None:
    """Whether the run may use ``output_dir``; changes nothing.

    Args:
        resumed: the checkpoint the run goes on from.

    Raises:
        ConfigError: it cannot be written, or it holds another run.
    """
    folder = Path(config.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written to" if there.is_dir() else "is not a folder"
        raise ConfigError(f"output_dir: {folder} cannot be used: {there} {what}; choose another")
    goes_on = resumed is not None and resumed.parent.resolve() == folder.resolve()
    if goes_on or config.overwrite_output_dir or not _holds_run(folder):
        return
    if any(folder.glob("checkpoint-*")):
        found, hint = "holds a run", "go on with --resume_from_checkpoint true, choose "
    else:
        found, hint = "holds a run that saved no checkpoint", "choose "
    raise ConfigError(
        f"output_dir: {folder} already {found}; {hint}another output_dir, or set overwrite_output_dir: true"
    )


def prepare(
    config: Config, tasks: TaskTable, tokenizer: PreTrainedTokenizerBase, resumed: Path | None
) -> None:
    """Make the folder, without the run that may be overwritten, and write what does not change.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        if _holds_run(folder) and (resumed is None or resumed.parent.resolve() != folder.resolve()):
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        tasks.save(folder / TASKS)
        tokenizer.save_pretrained(folder / TOKENIZER)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error.strerror or error})") from error


def check_same_shape(state: Mapping[str, Any], world_size: int, rows_per_step: int) -> None:
    """Whether a run can go on from ``trainer_state.json`` with these numbers of ranks and rows.

    Raises:
        ConfigError: it cannot; names both numbers, or the command that made a checkpoint of no training.
    """
    if "rows_per_step" not in state:
        raise ConfigError(
            "resume: the checkpoint was made by taskmoe adapt and has no optimiser to go on with; adapt it "
            "further, or begin a run from its base with model_name_or_path"
        )
    if state["world_size"] != world_size:
        raise ConfigError(
            f"resume: the checkpoint was written by {state['world_size']} rank(s), this run has "
            f"{world_size}; each rank goes on with its own part of the optimiser: start as many"
        )
    if state["rows_per_step"] != rows_per_step:
        raise ConfigError(
            f"resume: the checkpoint took {state['rows_per_step']} rows a step, these settings "
            f"{rows_per_step}; keep ranks x per_device_train_batch_size x gradient_accumulation_steps"
        )


def _holds_run(folder: Path) -> bool:
    return (folder / TASKS).exists() or any(folder.glob("checkpoint-*"))


def _remove_run(folder: Path) -> None:
    """Remove what a run has written and nothing else: other things may lie in ``output_dir``."""
    for path in [folder / name for name in OWN_FILES] + list(folder.glob("checkpoint-*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
