"""The folder that a command writes its result into: files appear whole, and replace nothing unasked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskmoe.moe.tasks import slugify
from taskmoe.train.trained_run import TrainedRun


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
    """Raises ExportError unless ``target`` can be made, is empty, or may be written into (``force``)."""
    if target.exists() and not target.is_dir():
        raise ExportError(f"--out: {target} is a file; give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise ExportError(
            f"--out: {target} is not empty; give another folder, or --force to replace its files"
        )


@contextmanager
def in_place(target: Path) -> Iterator[Path]:
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
