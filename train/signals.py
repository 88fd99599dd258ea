"""Being told to stop: signals, and a launcher that has died, turned into one decision of all ranks."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch

from taskmoe.train import distributed

# SIGUSR1 is what batch systems send ahead of the end; SIGHUP is a closed terminal.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
LAUNCHER_GONE = "launcher gone"
REASONS = (*STOP_SIGNALS, LAUNCHER_GONE)
LAUNCHER_VARIABLE = "TASKMOE_LAUNCHER"  # "pid:creation time" of the process that called launch_ranks
LAUNCHER_PROGRAMS = {"deepspeed", "ds", "torchrun", "accelerate", "mpirun", "mpiexec", "orted"}
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.")


class LauncherWatch:
    """Notices that the processes which started this rank have died.

    Watched are the parent and its parents as long as they look like a launcher: killing DeepSpeed's runner
    leaves the process between it and the ranks alive, so that the ranks' own parent id never changes. A
    shell is no launcher: a run left behind with nohup goes on when its shell ends.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.interval_s = interval_s
        self._checked = float("-inf")
        self._gone = False
        self._links: list[tuple[psutil.Process, int]] = []  # (a process, the id its parent had at the start)
        self._origin = _parse_origin(os.environ.get(LAUNCHER_VARIABLE))
        process = psutil.Process()
        while (parent := _parent(process)) is not None and self._is_launcher(parent):
            self._links.append((process, parent.pid))
            process = parent

    def parent_gone(self) -> bool:
        """True once a launcher above this process has died; looks at most once per `interval_s`."""
        if not self._gone and time.monotonic() - self._checked >= self.interval_s:
            self._checked = time.monotonic()
            self._gone = self._look()
        return self._gone

    def _is_launcher(self, process: psutil.Process) -> bool:
        if self._origin is not None and process.pid == self._origin[0]:
            return True
        try:
            program = _program(process.cmdline())
        except psutil.Error:
            return False
        return os.path.basename(program) in LAUNCHER_PROGRAMS or program.startswith(LAUNCHER_MODULES)

    def _look(self) -> bool:
        try:
            if self._origin is not None and not _alive(*self._origin):
                return True
            return any(process.ppid() != pid for process, pid in self._links)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # a system that hides its processes: nothing can be said
            return False


class StopRequest:
    """Context manager: from the first stop signal on, `agreed()` says on all ranks at the same step to stop.

        with StopRequest() as stop:
            for step in ...:
                train(step)
                if reason := stop.agreed():
                    save(); break

    The first signal sets a flag and is announced on stderr by rank 0. A second Ctrl-C ends the process at
    once. A signal that was ignored when the run started (nohup, background jobs) stays ignored. Outside the
    main thread no handler can be installed; the launcher is still watched. On leaving, the handlers from
    before are back.
    """

    def __init__(self, watch: LauncherWatch | None = None) -> None:
        self._watch = watch if watch is not None else LauncherWatch()
        self._reason: str | None = None
        self._agreed: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """What this rank alone knows: the name of the first signal, "launcher gone", or None."""
        if self._reason is None and self._watch.parent_gone():
            self._reason = LAUNCHER_GONE
        return self._reason

    @property
    def exit_code(self) -> int:
        """0 before a stop was agreed on; 128 + the signal's number after it, as shells have it."""
        if self._agreed is None:
            return 0
        return 128 + int(signal.SIGTERM if self._agreed == LAUNCHER_GONE else signal.Signals[self._agreed])

    def agreed(self) -> str | None:
        """The reason to stop now, the same on all ranks, or None. A collective: every rank, every step."""
        mine = self.reason
        code = torch.tensor([0 if mine is None else 1 + REASONS.index(mine)])
        highest = int(distributed.all_max(code).item())
        self._agreed = REASONS[highest - 1] if highest else None
        return self._agreed

    def __enter__(self) -> StopRequest:
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        main = os.environ.get("RANK", "0") == "0"
        if self._reason is None:
            self._reason = name
            again = "; Ctrl-C again ends at once, unsaved" if name == "SIGINT" else ""
            if main:
                _say(f"{name}: saving after this step, then ending{again}")
        elif name == "SIGINT" and self._reason == "SIGINT":
            if main:
                _say("second Ctrl-C: ending at once, nothing saved since the last checkpoint")
            # Not an exception: the process may stand in a collective that never returns.
            os._exit(128 + number)


def own_identity() -> str:
    """What `launch_ranks` puts into TASKMOE_LAUNCHER for its ranks to watch."""
    process = psutil.Process()
    return f"{process.pid}:{process.create_time()}"


def _parse_origin(text: str | None) -> tuple[int, float] | None:
    pid, _, created = (text or "").partition(":")
    return (int(pid), float(created)) if pid.isdigit() and created else None


def _program(words: list[str]) -> str:
    """What a command line runs: below Python the module or the script, else the first word."""
    if words and os.path.basename(words[0]).startswith("python"):
        words = [word for word in words[1:] if word == "-m" or not word.startswith("-")]
        words = words[1:] if words[:1] == ["-m"] else words
    return words[0] if words else ""


def _alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _say(text: str) -> None:
    # Signal handlers run between any two instructions, also inside a write to sys.stderr.
    with suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"taskmoe: {text}\n".encode())
