"""trainer_log.jsonl: one JSON object a line, and the same lines whether or not the run was interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END = "end"  # kind of the line that closes a run; a resumed run takes it back


class JsonlLog:
    """An append-only log of steps.

    Args:
        path: the file; its folder is made when it is missing.
        resume_step: None starts an empty log. An int keeps the lines up to and including that step: those
            after it belong to work that the resumed run does again.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(self.path, resume_step)
        # Replaced as a whole: a run that dies here keeps its old log.
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_bytes(b"".join(kept))
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(
        self, step: int, kind: str, values: Mapping[str, Any], time: Mapping[str, Any] | None = None
    ) -> None:
        """Append one line and flush it.

        ``time`` is what two equal runs differ in (seconds, tokens per second); it stands under a key of its
        own. Numbers that JSON cannot hold are written as ``"nan"`` and ``"inf"``, which ``float`` reads.
        """
        line: dict[str, Any] = {"step": step, "kind": kind, **values}
        if time:
            line["time"] = dict(time)
        self._file.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut short by a crash is left out."""
    return [value for _, value in _parsed(Path(path))]


def _parsed(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value and "kind" in value and line.endswith(b"\n"):
            found.append((line, value))
    return found


def _lines_until(path: Path, step: int) -> list[bytes]:
    return [line for line, value in _parsed(path) if value["kind"] != END and value["step"] <= step]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # numpy's and torch's scalars too
    return number if math.isfinite(number) else str(number)
