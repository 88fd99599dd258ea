"""Curves in wandb: the only file that imports it, and only when a run reports there."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from taskmoe.train.config import Config

AXIS = "step"
SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "pwd", "apikey", "credential", "credentials"}


class WandbLog:
    """One wandb run. Its trouble never reaches the training loop: one line through ``say``, then silence.

    Offline unless the user is logged in; ``WANDB_MODE`` has the last word.

    Args:
        run_id: the id of a run to go on with (:attr:`run_id` of the interrupted one), or None for a new run.
        say: prints one line.
    """

    def __init__(
        self, config: Config, run_dir: str | Path, run_id: str | None, say: Callable[[str], None]
    ) -> None:
        self.run_id = run_id
        self._say = say
        self._run: Any = None
        if not disabled(os.environ):
            self._guarded("start", lambda: self._start(config, Path(run_dir)))

    def _start(self, config: Config, run_dir: Path) -> None:
        wandb = _import_wandb()
        offline = "WANDB_MODE" not in os.environ and not logged_in(os.environ)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_id = self.run_id or secrets.token_hex(4)
        self._run = wandb.init(
            project=config.track.wandb_project,
            entity=config.track.wandb_entity,
            name=config.run_name,
            id=self.run_id,
            resume="allow",
            dir=str(run_dir),
            config=without_secrets(asdict(config)),
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Our own axis: wandb's step may only grow, and a resumed run begins before the last one logged.
        self._run.define_metric(AXIS)
        for keys in ("train/*", "grad/*", "learning_rate/*", "eval/*", "time/*"):
            self._run.define_metric(keys, step_metric=AXIS)
        self._run.define_metric("eval/score", step_metric=AXIS, summary="max")
        local = f"offline in {run_dir / 'wandb'}; upload with `wandb sync`"
        self._say(f"wandb: {local if self._run.offline else self._run.url}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by metric key; anything else is left out."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if numbers:
            self._guarded("log", lambda: self._run.log({**numbers, AXIS: step}))

    def close(self, failed: bool = False) -> None:
        run = self._run
        self._guarded("finish", lambda: run.finish(exit_code=int(failed)))
        if run is not None and self._run is None:
            # A launcher that ends its ranks ends wandb's process too, and its exit hook would fail aloud.
            with suppress(Exception):
                _import_wandb().teardown()
        self._run = None

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        if self._run is None and what != "start":
            return
        try:
            call()
        except Exception as error:  # whatever wandb raises: the training run is worth more than its curves
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            goes_on = "what it had received is kept" if what == "finish" else "the run goes on without it"
            self._say(f"warning: wandb could not {what} ({reason}); {goes_on}")


def _import_wandb() -> ModuleType:
    import wandb

    return wandb


def disabled(environ: Mapping[str, str]) -> bool:
    """Whether the user switched wandb off."""
    return environ.get("WANDB_MODE") == "disabled" or environ.get("WANDB_DISABLED", "").lower() in (
        "true",
        "1",
    )


def logged_in(environ: Mapping[str, str]) -> bool:
    """Whether wandb would find credentials: in the environment, or for its host in the netrc file."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    home = Path(environ.get("HOME", str(Path.home())))
    for path in [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            if host in netrc.netrc(str(path)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def without_secrets(values: Any) -> Any:
    """``values`` without the keys that look like a secret's name (``hf_token``, ``apiKey``), at any depth.

    Numbers stay: ``pad_token_id`` is no secret.
    """
    if isinstance(values, Mapping):
        return {k: without_secrets(v) for k, v in values.items() if not _is_secret(str(k), v)}
    if isinstance(values, list | tuple):
        return [without_secrets(v) for v in values]
    return values


def _is_secret(key: str, value: Any) -> bool:
    words = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", key)
    return any(w.lower() in SECRET_WORDS for w in words) and not isinstance(value, int | float | None)
