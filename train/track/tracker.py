"""The one thing the loop talks to: it passes each measurement to the log, the terminal and wandb."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config
from taskmoe.train.track.console import ConsoleView
from taskmoe.train.track.log import END, JsonlLog
from taskmoe.train.track.media import Media
from taskmoe.train.track.routing import group_keys
from taskmoe.train.track.wandb_log import WandbLog

LOG_NAME = "trainer_log.jsonl"
TIME_WORDS = ("second", "seconds", "time")


class HasRank(Protocol):
    @property
    def rank(self) -> int: ...


class Tracker:
    """Follows one run. Rank 0 alone writes and speaks; on other ranks every method does nothing.

    Metric keys carry task slugs: ``train/loss``, ``train/loss/<slug>``, ``train/tokens/<slug>``,
    ``train/epochs/<slug>``, ``weight/<slug>``, ``learning_rate/<group>``, ``train/tokens_per_second``,
    ``eval/<slug>/<metric>``, ``eval/macro/<metric>``, ``eval/score``. The log file keeps all of them; wandb
    draws curves for the first ``config.track.per_task_keys`` tasks only.

    Args:
        run_dir: folder of the run; ``trainer_log.jsonl`` and ``wandb/`` are written there.
        ranks: anything with a ``rank``, or the rank itself.
        resume_state: what :meth:`state_dict` gave when the checkpoint was written, or None for a new run. Its
            ``step`` is the last step whose lines stay in the log; a loop that knows better may set it.
        total_steps: for the time left; default ``config.max_steps``.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        ranks: HasRank | int,
        tasks: TaskTable,
        resume_state: Mapping[str, Any] | None = None,
        *,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.speaks = (ranks if isinstance(ranks, int) else ranks.rank) == 0
        if not self.speaks:
            return
        state = resume_state or {}
        self._step = int(state.get("step", 0))
        self._clock, self._began = clock, clock() - float(state.get("seconds", 0.0))
        self._uncharted = {task.slug for task in list(tasks)[max(config.track.per_task_keys, 0) :]}
        self._console = ConsoleView(total_steps or config.max_steps, self._step, stream, clock)
        self._log = JsonlLog(Path(run_dir) / LOG_NAME, self._step if resume_state is not None else None)
        self._wandb: WandbLog | None = None
        if "wandb" in config.report_to:
            self._wandb = WandbLog(config, run_dir, state.get("wandb_run_id"), self._console.line)

    def log_train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the measurements of a step and move the progress bar."""
        if self.speaks:
            self._record(step, "train", flatten(metrics))
            self._console.update(step, metrics)

    def advance(self, step: int) -> None:
        """Move the progress bar; nothing is recorded."""
        if self.speaks:
            self._console.advance(step)

    def log_eval(self, step: int, results: Mapping[str, Any]) -> None:
        """Record an evaluation; nested results are joined with ``/``, ``eval/`` put in front if missing."""
        if not self.speaks:
            return
        flat = {key if key.startswith("eval/") else f"eval/{key}": v for key, v in flatten(results).items()}
        self._record(step, "eval", flat)
        shown = [
            f"{key.removeprefix('eval/')} {value:.4f}"
            for key, value in flat.items()
            if (key == "eval/score" or key.startswith("eval/macro/")) and isinstance(value, int | float)
        ]
        self._console.line(f"evaluation at step {step}: {'  '.join(shown) or f'{len(flat)} values'}")

    def log_media(self, step: int, media: Media) -> None:
        """Record the routing group by group; in wandb as tables and images too."""
        if not self.speaks:
            return
        self._step = max(self._step, step)
        numbers = {} if media.snapshot is None else group_keys(media.snapshot, media.first)
        if media.snapshot is not None:
            self._log.write(step, "routing", numbers)
        if self._wandb is not None:
            self._wandb.log(step, numbers)  # drawn with track.detail: detailed
            self._wandb.log_media(step, media)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """Tell wandb of a checkpoint."""
        if self.speaks and self._wandb is not None:
            self._wandb.log_checkpoint(step, folder)

    def line(self, text: str) -> None:
        """Print a text."""
        if self.speaks:
            self._console.line(text)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: JSON-able, empty on ranks other than 0."""
        if not self.speaks:
            return {}
        run_id = self._wandb.run_id if self._wandb is not None else None
        return {"step": self._step, "seconds": self._clock() - self._began, "wandb_run_id": run_id}

    def close(self, status: str = "finished", time: Mapping[str, float] | None = None) -> None:
        """End the run; ``status`` is ``finished``, ``interrupted`` or ``failed``. May be called twice.

        time: seconds to write down beside those of the whole run.
        """
        if not self.speaks:
            return
        self.speaks = False
        seconds = {**(time or {}), "seconds": self._clock() - self._began}
        self._log.write(self._step, END, {"status": status}, seconds)
        self._log.close()
        self._console.close()
        if self._wandb is not None:
            self._wandb.close(failed=status == "failed")

    def _record(self, step: int, kind: str, flat: Mapping[str, Any]) -> None:
        self._step = max(self._step, step)
        timing = {key: value for key, value in flat.items() if is_time(key)}
        values = {key: value for key, value in flat.items() if key not in timing}
        self._log.write(step, kind, values, {**timing, "seconds": self._clock() - self._began})
        if self._wandb is not None:
            self._wandb.log(step, {k: v for k, v in flat.items() if task_of(k) not in self._uncharted})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with ``/``.

    >>> flatten({"score": 1.0, "macro": {"f1": 0.5}})
    {'score': 1.0, 'macro/f1': 0.5}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def task_of(key: str) -> str | None:
    """The slug in a metric key that belongs to one task, by its place: a task may be called ``loss``.

    >>> task_of("train/loss/sum"), task_of("eval/sum/f1"), task_of("train/loss"), task_of("eval/macro/f1")
    ('sum', 'sum', None, None)
    """
    parts = key.split("/")
    if len(parts) == 2 and parts[0] == "weight":
        return parts[1]
    if len(parts) != 3 or parts[1] == "macro":
        return None
    return {"train": parts[2], "eval": parts[1]}.get(parts[0])


def is_time(key: str) -> bool:
    """Whether a metric measures the clock, so that two equal runs differ in it."""
    parts = key.split("/")
    if parts[0] == "weight":
        return False
    name = parts[1] if parts[0] == "train" and len(parts) == 3 else parts[-1]
    return name.split("_")[-1] in TIME_WORDS
