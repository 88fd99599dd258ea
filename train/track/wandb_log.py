"""Curves in wandb: the only file that imports it, and only when a run reports there."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from taskmoe.moe import snapshot, state
from taskmoe.moe.representations.files import FILE as VECTORS
from taskmoe.train.config import Config
from taskmoe.train.track.keys import AXIS, FAMILIES, KEYS, Curves
from taskmoe.train.track.media import Media
from taskmoe.train.track.verdicts import verdicts
from taskmoe.train.track.wandb_media import items

# Of a checkpoint, what is the adapter: neither the optimiser's state nor the base model.
ADAPTER_FILES = (state.CONFIG, state.WEIGHTS, state.TASKS, VECTORS, snapshot.FILE, snapshot.SUMS)
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
        self._say, self._track = say, config.track
        self._curves = Curves(config.track.detail, config.track.max_keys, say)
        self._told: set[str] = set()  # what was left out of tables and images
        self._shown: Media | None = None  # the last of them
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
        self._folder = run_dir / "wandb"
        # Our own axis: wandb's step may only grow, and a resumed run begins before the last one logged.
        self._run.define_metric(AXIS)
        for family in FAMILIES:
            self._run.define_metric(f"{family}/*", step_metric=AXIS)
        for pattern, key in KEYS.items():
            if key.summary is not None:
                self._run.define_metric(pattern, step_metric=AXIS, summary=key.summary)
        local = f"offline in {self._folder}; upload with `wandb sync {self._folder}/offline-run-*`"
        self._say(f"wandb: {local if self._run.offline else self._run.url}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by metric key, those that ``Curves`` selects; anything else is left out."""
        if self._run is None:
            return
        numbers = self._curves.select({k: v for k, v in values.items() if isinstance(v, int | float)})
        if numbers:
            self._guarded("log", lambda: self._run.log({**numbers, AXIS: step}))

    def log_media(self, step: int, media: Media) -> None:
        """Tables, images and charts."""
        self._guarded("log tables and images", lambda: self._log_media(step, media))

    def _log_media(self, step: int, media: Media) -> None:
        wandb, self._shown = _import_wandb(), media
        found, remarks = items(media, self._track.detail)
        if found:
            with self._staging():
                self._run.log({**{k: item.for_wandb(wandb) for k, item in found.items()}, AXIS: step})
        for remark in remarks:
            if remark not in self._told:
                self._told.add(remark)
                self._say(f"wandb: {remark}")

    def log_checkpoint(self, step: int, folder: str | Path) -> None:
        """The adapter in a checkpoint as a version of the artifact ``adapter-<run id>``, where asked for."""
        if self._track.log_artifacts:
            self._guarded("keep a checkpoint", lambda: self._log_checkpoint(step, Path(folder)))

    def _log_checkpoint(self, step: int, folder: Path) -> None:
        artifact = _import_wandb().Artifact(f"adapter-{self.run_id}", type="model", metadata={AXIS: step})
        with self._staging():
            for name in ADAPTER_FILES:
                if (folder / name).is_file():
                    artifact.add_file(str(folder / name))
            self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def _judge(self) -> None:
        media = self._shown
        assert media is not None and media.snapshot is not None
        lines = verdicts(media.snapshot, media.tasks, media.first, media.conflict)
        self._run.summary["routing/verdicts"] = "\n".join(lines)

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Offline, wandb's copies of tables and artifacts lie in the run folder, not in the user's home."""
        name = "WANDB_DATA_DIR"
        if not self._run.offline or name in os.environ:
            yield
            return
        os.environ[name] = str(self._folder.resolve() / "data")
        try:
            yield
        finally:
            del os.environ[name]

    def close(self, failed: bool = False) -> None:
        """End the run; its summary gets the verdicts on the routing as it was last shown."""
        if self._shown is not None and self._shown.snapshot is not None:
            self._guarded("sum up", self._judge)
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
