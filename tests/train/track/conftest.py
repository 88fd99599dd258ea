from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


class FakeRun:
    def __init__(self, **init: Any) -> None:
        self.init = init
        self.offline = init["mode"] == "offline"
        self.url = "https://example.org/run"
        self.metrics: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb:
    """Stands in for the module: remembers its runs, and fails where it is told to."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.broken: set[str] = set()
        self.torn_down = 0

    def Settings(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(**options)

    def init(self, **options: Any) -> FakeRun:
        if "init" in self.broken:
            raise RuntimeError("no route\nto host")
        run = FakeRun(**options)
        for name in self.broken:
            setattr(run, name, self._fail)
        self.runs.append(run)
        return run

    def teardown(self) -> None:
        self.torn_down += 1
        raise ConnectionResetError("Connection lost")  # as when its process is gone

    @staticmethod
    def _fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> FakeWandb:
    """A fake wandb for a user who is not logged in and says nothing about the mode."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    return fake


@dataclass
class OfflineRun:
    """What an offline run holds: {key: value} of each call of log, what was defined, its artifacts."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """[(step, value)]."""
        return [(line["step"], line[key]) for line in self.history if key in line]

    def file(self, key: str) -> Path:
        """The last file of a table or an image."""
        (value,) = [line[key] for line in self.history if key in line][-1:]
        return self.folder / "files" / value["path"]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows)."""
        found = json.loads(self.file(key).read_text())
        return found["columns"], found["data"]


@pytest.fixture(scope="session")
def read_offline() -> Callable[[Path], OfflineRun]:
    """Reads the only offline run under a run folder."""
    return _read_offline


def _read_offline(run_dir: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    found = OfflineRun(path.parent)
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "summary":
            _take_in(found.summary, record.summary.update)
        elif kind == "run":
            _take_in(found.config, record.run.config.update)
        elif kind == "config":
            _take_in(found.config, record.config.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format after seven bytes of wandb's own: blocks of 32 KiB, records in parts."""
    block, header, place, record = 32768, struct.Struct("<IHB"), 7, b""
    while place + header.size <= len(data):
        left = block - place % block
        if left < header.size:
            place += left
            continue
        _, length, part = header.unpack_from(data, place)
        place += header.size
        record += data[place : place + length]
        place += length
        if part in (1, 4):  # whole, or the last part
            yield record
            record = b""


def _values(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _take_in(found, items)
    return found


def _take_in(found: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
