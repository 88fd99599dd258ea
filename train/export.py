"""What a task of a run uses, as files that other programs read, and whether they say the same.

Everything is written into a folder beside the one that is asked for, loaded again, compared with the run, and
only then put in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from taskmoe.moe import collapse, save_lora
from taskmoe.moe.banks.prompt.entry import Prompts
from taskmoe.moe.banks.prompt.export import save_prompt
from taskmoe.moe.tasks import slugify
from taskmoe.moe.truncate import truncate
from taskmoe.train.export_check import Checker
from taskmoe.train.trained_run import TrainedRun, load_run

ALL = "all"


class ExportError(ValueError):
    """What was asked for cannot be written."""


@dataclass(frozen=True)
class Exported:
    """What was written for one task.

    rank: the largest of its linears', 0 for prompts. errors: {linear: |dW - what was written| / |dW|}, of
    linears that were cut. difference: the largest between logits of the result and of the run, over the
    largest logit of the run; None: not checked.
    """

    task: str
    folder: Path
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    difference: float | None = None


def export_run(
    run: str | Path,
    task: str,
    out: str | Path,
    max_rank: int | None = None,
    *,
    force: bool = False,
    check: bool = True,
) -> list[Exported]:
    """Write the adapter of a task, or with ``all`` of every task, for peft.

    Args:
        run: a run folder, or one of its checkpoints.
        out: where to; with ``all``, each task has a folder of its slug in it.
        force: replace what is in ``out``.
        check: load each adapter with peft, and compare.

    Raises:
        ExportError: ``out`` is in use, or the result differs from the run: nothing is written then.
        CollapseError: the run has no such adapter; says why.
        TaskError: an unknown task; names the nearest.
        ConfigError, CheckpointError, StateError: as :func:`taskmoe.train.trained_run.load_run`.
    """
    target = Path(out)
    _require_free(target, force)
    checker = Checker() if check else None
    trained = load_run(run)
    tasks = trained.model.tasks
    chosen = tasks.names if task == ALL else [tasks[tasks.id(task)].name]
    with _in_place(target) as folder:
        base = _save_base(trained, folder, target)
        if checker is not None:
            checker.begin(trained, base)
        found = []
        for name in track(chosen, "exporting", console=Console(stderr=True), disable=len(chosen) < 2):
            slug = tasks[tasks.id(name)].slug if task == ALL else ""
            found.append(_export(trained, name, folder / slug, target / slug, max_rank, checker))
    return found


def _export(
    trained: TrainedRun, task: str, folder: Path, target: Path, max_rank: int | None, checker: Checker | None
) -> Exported:
    model, rank = trained.model, 0
    errors: dict[str, float] = {}
    if isinstance(getattr(model, "prompts", None), Prompts):
        save_prompt(model, task, folder)
    else:
        pairs = collapse(model, task)
        if max_rank is not None:
            pairs, errors = truncate(pairs, max_rank)
        save_lora(model, task, folder, pairs=pairs)
        rank = max(len(pair.A_RK) for pair in pairs.values())
    errors = {name: error for name, error in errors.items() if error}
    difference = None if checker is None else checker.difference(task, folder, exact=not errors)
    return Exported(task, target, rank, errors, difference)


def _save_base(trained: TrainedRun, folder: Path, target: Path) -> Path | None:
    """Save the base of the run where it is no model of the hub; adapters will name the place it goes to."""
    if not trained.has_own_base:
        return None
    slug = slugify("base", (t.slug for t in trained.model.tasks))
    trained.plain_base().save_pretrained(folder / slug)
    trained.tokenizer.save_pretrained(folder / slug)
    trained.model.base_model.config._name_or_path = str((target / slug).resolve())  # type: ignore[union-attr]
    return folder / slug


def _require_free(target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ExportError(f"--out: {target} is a file; give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise ExportError(
            f"--out: {target} is not empty; give another folder, or --force to replace its files"
        )


@contextmanager
def _in_place(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` whose files take their place there when the block ends without an error."""
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        target.mkdir(exist_ok=True)
        for path in partial.iterdir():
            _remove(target / path.name)
            path.rename(target / path.name)
    except OSError as error:
        raise ExportError(f"--out: {target} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
