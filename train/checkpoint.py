"""Checkpoints that appear whole or not at all, and are believed only when every byte is as it was written.

All ranks write into `checkpoint-N.tmp`; rank 0 adds the state and a manifest of sizes and hashes, brings
everything to the disk, renames the folder to `checkpoint-N`, and then points the file `latest` at it.
Whatever a kill, a full disk or a bad copy leaves behind is therefore either an older whole checkpoint or
one that `verify` refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from taskmoe.train import distributed
from taskmoe.train.distributed import Ranks
from taskmoe.train.rng import rng_state, set_rng_state

__all__ = ["CheckpointError", "find", "find_together", "load_rng", "read_state", "rng_state", "save",
           "set_rng_state", "verify"]  # fmt: skip

MANIFEST, STATE, LATEST = "manifest.json", "trainer_state.json", "latest"
FORMAT = 1
FOLDER = re.compile(r"checkpoint-(\d+)")
# A rank that failed waits this long for the others, which may stand in a collective that it will never join.
FAILURE_PATIENCE_S = 30.0


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or there is none to resume from."""


def save(
    run_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    limit: int,
    keep: Collection[int],
    ranks: Ranks,
) -> Path:
    """Writes `run_dir/checkpoint-<step>`; a collective, called by every rank with the same arguments.

    Args:
        write: called on every rank with the temporary folder, writes this rank's files there (sub-folders are
            fine). Engines save with `engine.save_checkpoint(folder, tag=...,
            exclude_frozen_parameters=True)`; those files are pickles, so they are loaded only from a run's
            own checkpoint, after `find`.
        state: JSON; written to trainer_state.json with "step" and "world_size" added.
        limit: so many of the newest checkpoints stay (0: all), and those of the steps in `keep` besides.

    Returns:
        The folder. Each rank's random state lies in it as rng-<rank>.pt (`load_rng`).

    Raises:
        CheckpointError: on every rank, when any of them could not write; what was there before is untouched.
    """
    run_dir = Path(run_dir)
    final, folder = run_dir / f"checkpoint-{step}", run_dir / f"checkpoint-{step}.tmp"

    def begin() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        _recover(run_dir)
        for stale in run_dir.glob("checkpoint-*.tmp"):  # of runs that were killed while writing
            shutil.rmtree(stale)
        folder.mkdir()

    def write_own() -> None:
        write(folder)
        torch.save(rng_state(), folder / f"rng-{ranks.rank}.pt")

    def finish() -> None:
        for rank in range(ranks.world_size):
            if not (folder / f"rng-{rank}.pt").is_file():
                raise CheckpointError(
                    f"the files of rank {rank} are not in {folder}: output_dir must lie on a file system "
                    f"that all machines share"
                )
        (folder / STATE).write_text(_json({**state, "step": step, "world_size": ranks.world_size}))
        (folder / MANIFEST).write_text(_json(_manifest(folder)))
        for path in (*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder):
            _sync(path)
        _publish(folder, final)
        (run_dir / f"{LATEST}.tmp").write_text(final.name + "\n")
        _sync(run_dir / f"{LATEST}.tmp")
        os.replace(run_dir / f"{LATEST}.tmp", run_dir / LATEST)
        _sync(run_dir)

    _together(ranks, folder, begin if ranks.is_main else None)
    _together(ranks, folder, write_own)
    _together(ranks, folder, finish if ranks.is_main else None)
    if ranks.is_main:
        _retire(run_dir, final, limit, keep)
    return final


def verify(folder: str | Path, *, hashes: bool | Collection[str] = True) -> str | None:
    """None when every file of the manifest is there as it was written; else what is wrong, in one phrase.

    Files beside the manifest's do not matter. Without `hashes` only presence and sizes are looked at; with a
    list of names the bytes of these files alone.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    if version != FORMAT:
        return f"{MANIFEST} has format {version!r}, this program reads {FORMAT}"
    if STATE not in files:
        return f"{MANIFEST} does not list {STATE}"
    for name, (size, digest) in sorted(files.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} names {name!r}, which lies outside the checkpoint"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            read = hashes if isinstance(hashes, bool) else name in hashes
            if read and _sha256(path) != digest:
                return f"{name} is not as it was written (sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def find(run_dir: str | Path, resume: str = "true", *, hashes: bool | Collection[str] = True) -> Path:
    """The checkpoint to resume from.

    `resume` as in `resume_from_checkpoint`: "true" takes the newest whole checkpoint of `run_dir`, and says
    on stderr which damaged ones it passed over; a path names a checkpoint, or a run folder to search.
    "Newest" is what `latest` names, then the time of writing. `hashes` as in `verify`.

    Raises:
        CheckpointError: there is no whole checkpoint; names the folder and what is wrong with each one found.
    """
    folder = Path(run_dir if resume.lower() == "true" else resume)
    inside = Path(run_dir) / folder  # "checkpoint-10", said from outside the run
    if not folder.is_dir() and inside.is_dir():
        folder = inside
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint: there is no folder {folder}")
    if FOLDER.fullmatch(folder.name) or (folder / MANIFEST).exists():
        if (reason := verify(folder, hashes=hashes)) is None:
            return folder
        others = [path.name for path in _newest_first(folder.parent) if path != folder]
        hint = f"; other checkpoints there: {', '.join(others)}" if others else ""
        raise CheckpointError(f"resume_from_checkpoint: {folder} is damaged: {reason}{hint}")
    _recover(folder)
    damaged: list[str] = []
    for path in _newest_first(folder):
        if (reason := verify(path, hashes=hashes)) is None:
            for line in damaged:
                print(f"taskmoe: skipped the damaged checkpoint {line}", file=sys.stderr)
            return path
        damaged.append(f"{path}: {reason}")
    if damaged:
        reasons = "; ".join(damaged)
        raise CheckpointError(f"resume_from_checkpoint: no whole checkpoint in {folder}: {reasons}")
    raise CheckpointError(f"resume_from_checkpoint: no checkpoint-N in {folder}")


def find_together(run_dir: str | Path, resume: str, ranks: Ranks) -> Path:
    """`find` for a running group: rank 0 looks (and hashes) alone, all ranks get the answer or the error."""
    found: Path | CheckpointError
    try:
        found = find(run_dir, resume) if ranks.is_main else Path()
    except CheckpointError as error:
        found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def read_state(folder: str | Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint that `find` returned."""
    state: dict[str, Any] = json.loads((Path(folder) / STATE).read_text())
    return state


def load_rng(folder: str | Path, ranks: Ranks) -> None:
    """Sets this rank's random generators to what they were when the checkpoint was written.

    Raises:
        CheckpointError: the checkpoint has no such rank.
    """
    path = Path(folder) / f"rng-{ranks.rank}.pt"
    if not path.is_file():
        written_by = len(list(Path(folder).glob("rng-*.pt")))
        raise CheckpointError(f"{folder} was written by {written_by} ranks, this run has {ranks.world_size}")
    set_rng_state(torch.load(path, map_location="cpu", weights_only=True))


def _together(ranks: Ranks, folder: Path, action: Callable[[], None] | None) -> None:
    """Runs `action` (None: nothing to do here) and raises on all ranks when it failed on one."""
    failure: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as error:  # whatever a writer raises: the half-written folder must go
        failure = error
    try:
        failures = distributed.exchange_failures(_cause(failure) if failure else "", FAILURE_PATIENCE_S)
    except RuntimeError as error:
        failures = {ranks.rank: _cause(failure) if failure else f"another rank has failed ({error})"}
    if not failures:
        return
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    text = "; ".join(f"rank {rank}: {c}" if ranks.world_size > 1 else c for rank, c in failures.items())
    raise CheckpointError(f"cannot write {folder.with_suffix('')}: {text}") from failure


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _publish(folder: Path, final: Path) -> None:
    if final.exists():  # the same step saved again: by a resumed run, or another one in the same folder
        old = final.with_name(f"{final.name}.old")
        final.rename(old)
        folder.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(final)


def _recover(run_dir: Path) -> None:
    """Finishes or undoes a `_publish` that was killed between its steps."""
    for old in run_dir.glob("checkpoint-*.old"):
        with suppress(OSError):  # a folder that may only be read
            if old.with_suffix("").exists():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))


def _retire(run_dir: Path, newest: Path, limit: int, keep: Collection[int]) -> None:
    if limit <= 0:
        return
    # Folders without a manifest are not ours; damaged ones do not count as kept.
    ours = [path for path in _newest_first(run_dir) if (path / MANIFEST).is_file() and path != newest]
    left = limit - 1
    for path in ours:
        whole = verify(path, hashes=False) is None
        if int(path.name.removeprefix("checkpoint-")) in keep and whole:
            continue
        if whole and left > 0:
            left -= 1
            continue
        # Renamed first: a kill in between leaves a .tmp that the next save removes, not a damaged checkpoint.
        doomed = path.with_name(f"{path.name}.tmp")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            print(f"taskmoe: cannot remove the old checkpoint {path}: {error.strerror}", file=sys.stderr)


def _newest_first(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run: the one `latest` names, then by time of writing, then by step."""
    try:
        latest = (run_dir / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        latest = ""

    def age(path: Path) -> tuple[bool, float, int]:
        try:
            written = float(json.loads((path / MANIFEST).read_text())["written"])
        except (OSError, ValueError, KeyError, TypeError):
            written = 0.0
        return path.name == latest, written, int(path.name.removeprefix("checkpoint-"))

    folders = [path for path in run_dir.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name)]
    return sorted(folders, key=age, reverse=True)


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    return {"format": FORMAT, "written": time.time(), "files": files}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
