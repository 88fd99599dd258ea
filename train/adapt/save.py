"""What was adapted, as the folder of a run that is evaluated, exported and inspected like any other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from taskmoe.moe.representations.files import FILE
from taskmoe.moe.representations.kinds import with_vectors
from taskmoe.moe.state import save_adapter
from taskmoe.train import checkpoint, run_folder
from taskmoe.train.adapt.subjects import Subject
from taskmoe.train.config import ConfigError
from taskmoe.train.track.facts import RESULTS
from taskmoe.train.trained_run import ALONE
from taskmoe.train.weights import BASE_WEIGHTS


def save_run(
    subject: Subject,
    folder: Path,
    seed: int,
    steps: int,
    results: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Write config.yaml, task_map.json, tokenizer, eval_results.json and one whole checkpoint.

    A base that the run saved is a second name of its file, or a copy where the file system has no such names.

    Args:
        steps: of adaptation; the checkpoint counts them on top of the run's.
        results: what ``evaluate`` returned; about: what was done, for trainer_state.json.

    Raises:
        ConfigError, CheckpointError: it cannot be written.
    """
    step = checkpoint.read_state(subject.run.checkpoint)["step"] + steps
    moe = replace(subject.model.moe_config, new_task_rows=subject.config.moe.new_task_rows)
    if subject.makes_vectors:  # for further tasks too
        moe = replace(moe, representation_options=subject.begun().representation_options)
    elif (moe.representation_options or {}).get("path"):
        moe = with_vectors(moe, str(folder / f"checkpoint-{step}" / FILE))
    config = replace(
        subject.config,
        moe=moe,
        seed=seed,
        output_dir=str(folder),
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
        evaluation=replace(subject.config.evaluation, max_rows=subject.run.config.evaluation.max_rows),
    )
    tasks = subject.tasks
    run_folder.prepare(config, tasks, subject.run.tokenizer, None)

    def write(into: Path) -> None:
        save_adapter(subject.model, into)
        base = subject.base_weights()
        if base is not None:
            _link(base, into / BASE_WEIGHTS)

    state = {"best": None, "adapted": dict(about)}
    checkpoint.save(folder, step, write, state, 0, (), ALONE)
    found = {"step": step, "best": None, "experts": results}
    try:
        (folder / RESULTS).write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written ({error.strerror or error})") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
