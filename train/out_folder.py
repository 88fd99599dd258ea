"""The folder that a command writes its result into: files appear whole, and replace nothing unasked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskmoe.moe.tasks import slugify
from taskmoe.train.trained_run import TrainedRun

# By these a folder is known to hold an adapter or a model: one that an earlier result left behind would be
# read together with the new files. transformers, for one, puts an adapter on top of the model beside it.
SIGNS = ("adapter_config.json", "config.json", "model.safetensors")
OURS = (*SIGNS, "manifest.json", "tokenizer_config.json")  # one of them is in every folder that is written


class ExportError(ValueError):
    """What was asked for cannot be written."""


def save_base(trained: TrainedRun, folder: Path, target: Path) -> Path | None:
    """Save the base of the run where no hub has it; adapters will name the place that it goes to."""
    if not trained.has_own_base:
        return None
    slug = slugify("base", (t.slug for t in trained.model.tasks))
    trained.plain_base().save_pretrained(folder / slug)
    trained.tokenizer.save_pretrained(folder / slug)
    trained.model.base_model.config._name_or_path = str((target / slug).resolve())  # type: ignore[union-attr]
    return folder / slug


def require_free(target: Path, force: bool) -> None:
    """Raises ExportError unless ``target`` can be made, is empty, or may be written into (``force``).

    A run that has made steps is never written into.
    """
    if target.exists() and not target.is_dir():
        raise ExportError(f"--out: {target} is a file; give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise ExportError(
            f"--out: {target} is not empty; give another folder, or --force to replace its files"
        )
    steps = [path for path in target.glob("checkpoint-*") if path.name != "checkpoint-0"]
    if steps or (target / "manifest.json").is_file():
        raise ExportError(f"--out: {target} holds a run; give another folder")


@contextmanager
def in_place(target: Path) -> Iterator[Path]:
    """A folder whose files take their place in ``target`` when the block ends without an error.

    What an earlier result left in ``target`` gives way, folders as a whole.

    Raises:
        ExportError: nothing can be written there, or a folder that holds other things is in the way.
    """
    target = target.absolute()
    # On one file system with it: a folder that is there may be the root of one, beside which nothing is.
    partial = target / ".partial" if target.is_dir() else target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        new = list(partial.iterdir())
        for path in new:
            _require_ours(target / path.name)
        target.mkdir(exist_ok=True)
        if any(path.is_file() for path in new):
            for name in SIGNS:
                _remove(target / name)
        for path in new:
            _remove(target / path.name)
            path.rename(target / path.name)
    except OSError as error:
        if error.errno is None:  # a loader's own words: there is no such model
            raise ExportError(f"{target} is not written: {error}") from error
        raise ExportError(f"--out: {target} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_ours(path: Path) -> None:
    """Raises ExportError for a folder, say of a task's name, in which no command of ours has written."""
    ours = path.is_symlink() or any((path / name).is_file() for name in OURS)
    if path.is_dir() and not ours and any(path.iterdir()):
        raise ExportError(f"--out: {path} is in the way and holds other things; give another folder")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
