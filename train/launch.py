"""`--num_ranks N`: starts the DeepSpeed launcher, passes signals on, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train import distributed
from taskmoe.train.signals import LAUNCHER_VARIABLE, STOP_SIGNALS, own_identity

RUNNER, LAUNCH = "deepspeed.launcher.runner", "deepspeed.launcher.launch"
POLL_S = 0.1


def launch_ranks(
    num_ranks: int, argv: Sequence[str], *, module: str = "taskmoe.train.cli", grace_s: float = 120.0
) -> int:
    """Runs `python -m module *argv` as `num_ranks` ranks under the DeepSpeed launcher; returns the exit code.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP go on to the ranks themselves, each as often as it came: DeepSpeed's
    runner would die of them and orphan its ranks, its launch process would end the ranks one after the
    other. From the first one on, the ranks have `grace_s` seconds to save and end; then everything left is
    killed.

    Returns:
        0 when all went well; 128 + n when stopped by signal n after the ranks had ended by themselves; 137
        when they had to be killed; else the code of the rank that failed.

    Raises:
        ConfigError: `num_ranks` is not positive, or more than there are GPUs (on a machine with GPUs).
    """
    port = distributed.free_port()
    command = launcher_command(num_ranks, argv, module=module, port=port, devices=visible_devices(num_ranks))
    # A session of its own: the terminal's Ctrl-C would otherwise also reach DeepSpeed's processes.
    child = subprocess.Popen(command, env=rank_environment(num_ranks), start_new_session=True)
    relay = _Relay(child.pid)
    try:
        with relay:
            return _wait(child, relay, grace_s)
    finally:
        _kill(session_members(child.pid))
        child.wait()
        distributed.remove_shared_memory(port)


def visible_devices(num_ranks: int) -> list[str] | None:
    """The first `num_ranks` GPUs named in CUDA_VISIBLE_DEVICES; None when it names none by number.

    Raises:
        ConfigError: `num_ranks` is not positive, or more than there are GPUs.
    """
    if num_ranks < 1:
        raise ConfigError(f"num_ranks: {num_ranks} is not a positive number of processes")
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if num_ranks > count:
        raise ConfigError(f"num_ranks: {num_ranks}, but {count} GPUs are visible: ask for at most {count}")
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    return names[:num_ranks] if all(name.isdigit() for name in names) else None


def launcher_command(
    num_ranks: int, argv: Sequence[str], *, module: str, port: int, devices: Sequence[str] | None = None
) -> list[str]:
    """The command line of DeepSpeed's runner."""
    # With --num_gpus the runner forgets CUDA_VISIBLE_DEVICES and takes the first GPUs of the machine.
    where = ["--num_gpus", str(num_ranks)]
    if devices is not None:
        where = ["--include", "localhost:" + ",".join(devices)]
    # Quiet: what went wrong is said by the rank it went wrong on, not by a dump of its command line.
    return [sys.executable, "-m", RUNNER, *where, "--master_port", str(port), "--no_local_rank",
            "--log_level", "critical", "--module", module, *argv]  # fmt: skip


def rank_environment(num_ranks: int) -> dict[str, str]:
    """The environment of the ranks: this process's, without a place of its own, and its cores shared out."""
    environment = {k: v for k, v in os.environ.items() if k not in distributed.LAUNCHER_VARIABLES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment[LAUNCHER_VARIABLE] = own_identity()
    return environment


def session_members(session: int) -> list[psutil.Process]:
    """The living processes of a session, whoever their parents are by now."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (OSError, psutil.Error):
            continue
    return members


def rank_processes(members: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those among a session's processes that DeepSpeed's launch process has started as ranks."""
    ranks = []
    launchers = {process.pid for process in members if _runs(process, LAUNCH) or _runs(process, RUNNER)}
    for process in members:
        try:
            # A rank that lost its launch process belongs to init: then its environment tells.
            is_child = process.ppid() in launchers or process.ppid() not in {m.pid for m in members}
            if process.pid not in launchers and is_child and "RANK" in process.environ():
                ranks.append(process)
        except psutil.Error:
            continue
    return ranks


class _Relay:
    """Takes this process's stop signals and sends them to the ranks."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.first: int | None = None
        self.first_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Relay:
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller's signals are not ours to take
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self.first_at = number, time.monotonic()
        members = session_members(self.session)
        ranks = rank_processes(members)
        # Before there are ranks nothing can be saved, and DeepSpeed's own processes end on SIGTERM.
        for process in ranks or members:
            _send(process, number if ranks else signal.SIGTERM)


def _wait(child: subprocess.Popen[bytes], relay: _Relay, grace_s: float) -> int:
    while child.poll() is None:
        if relay.first is not None and time.monotonic() - relay.first_at > grace_s:
            return _overdue(grace_s)
        time.sleep(POLL_S)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    if orphans := session_members(child.pid):
        # The runner, or the process below it, was killed over our head; its ranks may still save.
        for process in rank_processes(orphans):
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while session_members(child.pid):
            if time.monotonic() > deadline:
                return _overdue(grace_s)
            time.sleep(POLL_S)
        code = code or 1
    if relay.first is not None and code in _clean_stops(relay.first):
        return 128 + relay.first
    return code


def _overdue(grace_s: float) -> int:
    print(f"taskmoe: the ranks did not end within {grace_s:.0f} s and are killed", file=sys.stderr)
    return 128 + signal.SIGKILL


def _clean_stops(number: int) -> set[int]:
    """Exit codes that mean "ended because of this signal".

    0 and 128 + n come from ranks that saved; 256 - n is how DeepSpeed reports a rank that the signal ended
    before it could take it; SIGTERM is what its launch process sends to the other ranks then.
    """
    return {0, *(code for n in (number, int(signal.SIGTERM)) for code in (128 + n, 256 - n))}


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(list(processes), timeout=5)
