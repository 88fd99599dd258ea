from __future__ import annotations

import sys
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
