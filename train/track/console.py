"""What a person sees: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class ConsoleView:
    """Progress of a run on one stream.

    Args:
        total: steps of the run.
        start: the step at which this process begins (0, or where it resumed).
        stream: default ``sys.stdout``.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.start = total, start
        self._stream = stream or sys.stdout
        self._clock, self._began = clock, clock()
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
            )
            # Two frames a second: the bar must not cost a small machine its cores.
            self._progress = Progress(*columns, console=Console(file=self._stream), refresh_per_second=2)
            self._bar = self._progress.add_task("training", total=total, completed=start, status="")
            self._progress.start()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show ``train/loss``, ``train/tokens_per_second`` and the time left after ``step`` steps."""
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        if "train/tokens_per_second" in metrics:
            parts.append(f"{metrics['train/tokens_per_second']:,.0f} tokens/s")
        if step > self.start:
            left = (self._clock() - self._began) / (step - self.start) * max(self.total - step, 0)
            parts.append(f"{duration(left)} left")
        status = "  ".join(parts)
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, status=status)
        else:
            self.line(f"step {step}/{self.total}  {status}")

    def advance(self, step: int) -> None:
        """Move the bar, if there is one, between two updates."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step)

    def line(self, text: str) -> None:
        """Print a text, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice, and lines may follow."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``.

    >>> duration(75), duration(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
