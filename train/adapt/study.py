"""``taskmoe adapt``: new tasks by every mode, number of shots and seed that is asked for.

In all modes but ``router+experts`` the new tasks are learned in one model at once, because none moves what
another owns: what each becomes does not depend on the others.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taskmoe.moe import CollapseError, ConfigError
from taskmoe.moe.own_rows import OwnRows
from taskmoe.train.adapt.data import NewTasks, Shots, draw_shots, read_new_tasks
from taskmoe.train.adapt.fit import Fitted, Fitter
from taskmoe.train.adapt.modes import MODES, Mode
from taskmoe.train.adapt.save import save_run
from taskmoe.train.adapt.settings import AdaptError, AdaptSettings
from taskmoe.train.adapt.subjects import Subject
from taskmoe.train.evaluate import evaluate
from taskmoe.train.output import finite
from taskmoe.train.trained_run import ALONE, open_run

RESULT = "adapt.json"


@dataclass(frozen=True)
class Score:
    """One task by one mode, shots and seed.

    shots: 0 where none are read, None: all rows. value: of ``metric``, on ``rows`` rows of the scored split;
    loss: there. steps: that were kept. start: the task that it began as. parameters: numbers that it learned.
    folder: of the run that holds it, if it was saved.
    """

    mode: str
    shots: int | None
    seed: int
    task: str
    metric: str
    value: float
    loss: float
    rows: int
    steps: int
    validation_loss: float | None
    start: str | None
    parameters: int
    folder: str | None = None


@dataclass(frozen=True)
class Study:
    """scores: of all that was asked for; split: which rows; run: whose; remarks: modes that do not fit it."""

    run: str
    split: str
    tasks: list[str]
    scores: list[Score] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def adapt(
    run: str | Path,
    settings: AdaptSettings,
    modes: Sequence[str],
    shots: Sequence[int | None] = (None,),
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    force: bool = False,
) -> Study:
    """Adapt a run to new tasks and score them.

    Args:
        run: a run folder, or one of its checkpoints.
        modes: names of ``MODES``. shots: rows of each task that are read; None: all.
        out: where the results go, each as the folder of a run; None: nowhere.
        force: replace what ``out`` holds.

    Raises:
        AdaptError: what was asked for cannot be done in this run; says why, and what can.
        CollapseError: mode ``mean``, of experts that are no low-rank product.
        ConfigError, CheckpointError, StateError, DataError, TaskError: what was given cannot be used.
    """
    for mode in modes:
        if mode not in MODES:
            raise AdaptError(f"--mode: {mode!r} is not one of {', '.join(MODES)}")
    target = None if out is None else Path(out)
    if target is not None:
        _require_free(target, force)
    opened = open_run(run)
    if target is not None and opened.home.resolve().is_relative_to(target.resolve()):
        raise AdaptError(f"--out: {target} holds the run that is adapted; give another folder")
    new = read_new_tasks(opened, settings)
    drawn = {(n, seed): _draw(new, settings, n, seed) for n in shots for seed in seeds}
    if target is not None and target.is_dir():
        shutil.rmtree(target)  # what is asked for can be read, so that an earlier result may go
    study = Study(str(run), new.eval_split, [new.table.names[t] for t in new.ids])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch, _progress() as progress:
        subject: Subject | None = None
        for name in modes:
            kind = MODES[name].subject
            try:
                if type(subject) is not kind:
                    subject = None  # one model at a time
                    subject = kind(opened, new, settings, Path(scratch), device)
                jobs = _jobs(name, subject, shots, seeds)
            except (AdaptError, CollapseError, ConfigError) as error:
                if len(modes) == 1:
                    raise
                study.remarks.append(f"{name}: {str(error).removeprefix(f'--mode {name}: ')}")
                continue
            several = len(jobs) > 1 or len(modes) > 1
            bar = progress.add_task(name, total=len(jobs) * settings.max_steps)
            for i, (n, seed) in enumerate(jobs):
                of = "all" if n is None else n
                place = target / f"{name}-shots{of}-seed{seed}" if target and several else target
                job = _Job(name, n, seed, subject, drawn[shots[0] if n == 0 else n, seed], place)
                study.scores.extend(job.run(partial(progress.advance, bar)))
                progress.update(bar, completed=(i + 1) * settings.max_steps)
                if target is not None:  # each time: by it the folder is known, should this be interrupted
                    _write(study, target / RESULT)
    return study


def _jobs(
    name: str, subject: Subject, shots: Sequence[int | None], seeds: Sequence[int]
) -> list[tuple[int | None, int]]:
    """Pairs of shots and seed; a mode that reads no row gives one result, whatever these are."""
    mode = MODES[name]
    mode.check(name, subject)
    if mode.reads_shots(subject):
        return [(n, seed) for n in shots for seed in seeds]
    return [(0, seeds[0])]


def _draw(new: NewTasks, settings: AdaptSettings, shots: int | None, seed: int) -> dict[int, Shots]:
    return {
        t: draw_shots(new.train(t), new.table.names[t], shots, seed, settings.validation) for t in new.ids
    }


@dataclass(frozen=True)
class _Job:
    """One mode with one draw of shots; shots of tasks by their ids in the run's table."""

    name: str
    number: int | None
    seed: int
    subject: Subject
    shots: Mapping[int, Shots]
    folder: Path | None

    def run(self, advance: Callable[[], None]) -> Iterator[Score]:
        subject, mode = self.subject, MODES[self.name]
        shift = subject.new.ids[0] - subject.known
        shots = {t - shift: s for t, s in self.shots.items()}
        alone = [[t] for t in subject.ids] if mode.whole else [subject.ids]
        for tasks in alone:
            mine = {t: shots[t] for t in tasks}
            subject.begin(self.seed, mine)
            starts = mode.start(subject, mine)
            owned = OwnRows(subject.model, tasks, mode.groups, subject.axes, mode.whole)
            fitted = self._fit(mode, owned, mine, advance)
            own = subject.split(subject.new.eval_split)
            found = evaluate(
                subject.model, list(own.values()), subject.run.tokenizer, subject.config, subject.collate,
                ALONE, tasks,
            )  # fmt: skip
            place = self._save(tasks, found, fitted)
            for t in tasks:
                name = subject.tasks.names[t]
                scores = found["tasks"][name]
                yield Score(
                    self.name, self.number, self.seed, name, scores["metric"], scores[scores["metric"]],
                    scores["loss"], scores["rows"], fitted[t].steps, fitted[t].after, starts.get(t),
                    owned.count() if owned.parameters else 0, None if place is None else str(place),
                )  # fmt: skip

    def _fit(
        self, mode: Mode, owned: OwnRows, shots: Mapping[int, Shots], advance: Callable[[], None]
    ) -> dict[int, Fitted]:
        if not owned.parameters:
            return {t: Fitted(0, None, None) for t in owned.tasks}
        subject = self.subject
        fitter = Fitter(
            subject.model, subject.split("train"), shots, subject.collate, subject.run.config,
            subject.settings, self.seed,
        )  # fmt: skip
        return fitter.fit(owned, advance)

    def _save(
        self, tasks: Sequence[int], found: Mapping[str, Any], fitted: Mapping[int, Fitted]
    ) -> Path | None:
        if self.folder is None:
            return None
        subject, folder = self.subject, self.folder
        if len(tasks) < len(subject.ids):  # tasks that each have the model for themselves
            folder = folder / subject.tasks[tasks[0]].slug
        about = {
            "mode": self.name,
            "shots": self.number,
            "seed": self.seed,
            "tasks": [subject.tasks.names[t] for t in tasks],
            "run": str(subject.run.checkpoint),
        }
        save_run(subject, folder, self.seed, max(f.steps for f in fitted.values()), found, about)
        return folder


def _write(study: Study, path: Path) -> None:
    try:
        path.write_text(
            json.dumps(finite(asdict(study)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise AdaptError(f"--out: {path} cannot be written ({error.strerror or error})") from error


def _require_free(target: Path, force: bool) -> None:
    """Raises AdaptError unless ``target`` can be made, is empty, or may be replaced (``force``)."""
    if target.exists() and not target.is_dir():
        raise AdaptError(f"--out: {target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise AdaptError(f"--out: {target} is not empty; give another folder, or --force to replace it")
        if not (target / RESULT).is_file():
            raise AdaptError(f"--out: {target} holds other things than results of adapt; give another folder")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
