"""Stop requests: from signals and dead launchers to one decision of all ranks."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from taskmoe.train import distributed, signals
from taskmoe.train.signals import LAUNCHER_GONE, LAUNCHER_VARIABLE, LauncherWatch, StopRequest, own_identity


def raise_signal(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGHUP", 129)]
)
def test_a_signal_becomes_a_request(name, code, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed() is None and stop.exit_code == 0
        raise_signal(name)
        assert stop.agreed() == name
        assert stop.agreed() == name and stop.exit_code == code
    assert signal.getsignal(number) == before
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"{name}: saving" in said


def test_only_a_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    ends = []
    monkeypatch.setattr(signals.os, "_exit", ends.append)
    with StopRequest():
        raise_signal("SIGINT")
        raise_signal("SIGTERM")  # launchers send it after the terminal's SIGINT
        assert ends == []
        raise_signal("SIGINT")
        assert ends == [130]
    assert "ending at once" in capfd.readouterr().err
    with StopRequest() as stop:
        raise_signal("SIGTERM")
        raise_signal("SIGTERM")
        raise_signal("SIGINT")
        assert ends == [130] and stop.reason == "SIGTERM"


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            raise_signal("SIGHUP")
            assert stop.agreed() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_ranks_are_silent(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with StopRequest() as stop:
        raise_signal("SIGTERM")
        assert stop.reason == "SIGTERM"
    assert capfd.readouterr().err == ""


def test_a_dead_launcher_is_a_request(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = f"{child.pid}:{psutil.Process(child.pid).create_time()}"
    monkeypatch.setenv(LAUNCHER_VARIABLE, identity)
    watch = LauncherWatch(interval_s=0.0)
    child.wait()
    with StopRequest(watch) as stop:
        assert stop.agreed() == LAUNCHER_GONE and stop.exit_code == 143
    monkeypatch.setenv(LAUNCHER_VARIABLE, own_identity())
    assert not LauncherWatch(interval_s=0.0).parent_gone()
    pid = os.getpid()  # the id lives on, but in a process that is younger than the launcher was
    monkeypatch.setenv(LAUNCHER_VARIABLE, f"{pid}:{psutil.Process(pid).create_time() - 60}")
    assert LauncherWatch(interval_s=0.0).parent_gone()


def test_without_a_launcher_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    for text in (None, "", "nonsense", "12", "12:"):
        assert signals._parse_origin(text) is None
    watch = LauncherWatch(interval_s=0.0)
    assert not watch.parent_gone()


@pytest.mark.parametrize(
    ("line", "program"),
    [
        ("/v/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=x", "deepspeed.launcher.launch"),
        ("/v/bin/python /v/bin/deepspeed --num_gpus 2 train.py", "/v/bin/deepspeed"),
        ("bash torchrun.sh", "bash"),
        ("timeout 60 torchrun train.py", "timeout"),
        ("python", ""),
        ("", ""),
    ],
)
def test_the_program_of_a_command_line(line, program):
    assert signals._program(line.split()) == program


LEAF = """
    import pathlib, sys, time
    from taskmoe.train.signals import LauncherWatch
    watch = LauncherWatch(interval_s=0.05)
    folder = pathlib.Path(sys.argv[1])
    (folder / "ready").touch()
    end = time.monotonic() + 60
    while not watch.parent_gone() and time.monotonic() < end and not (folder / "enough").exists():
        time.sleep(0.05)
    (folder / "result").write_text(str(watch.parent_gone()))
"""
MIDDLE = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def wait_for(path, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.02)


def test_the_grandparent_is_watched_when_it_is_a_launcher(tmp_path):
    """Runner, launch process, rank, as under DeepSpeed: a killed runner leaves the rank's parent alive."""
    environment = {k: v for k, v in os.environ.items() if k != LAUNCHER_VARIABLE}
    tops = {}
    for name in ("deepspeed", "wrapper"):
        folder = tmp_path / f"under-{name}"
        folder.mkdir()
        for program, text in ((name, MIDDLE), ("torchrun", MIDDLE), ("rank", textwrap.dedent(LEAF))):
            (folder / program).write_text(text)
        commands = [[sys.executable, str(folder / program)] for program in (name, "torchrun", "rank")]
        command = [*commands[0], *commands[1], *commands[2], str(folder)]
        tops[name] = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        for name, top in tops.items():
            wait_for(tmp_path / f"under-{name}" / "ready")
            top.kill()
            top.wait()
        wait_for(tmp_path / "under-deepspeed" / "result")
        assert (tmp_path / "under-deepspeed" / "result").read_text() == "True"
        # A program that is no launcher may end, as a shell does below nohup.
        time.sleep(0.3)
        assert not (tmp_path / "under-wrapper" / "result").exists()
        (tmp_path / "under-wrapper" / "enough").touch()
        wait_for(tmp_path / "under-wrapper" / "result")
        assert (tmp_path / "under-wrapper" / "result").read_text() == "False"
    finally:
        for top in tops.values():
            if top.poll() is None:
                top.kill()
                top.wait()
            (tmp_path / "under-wrapper" / "enough").touch()


def stop_one_rank(signalled, at):
    ranks = distributed.init()
    with StopRequest() as stop:
        for step in range(10):
            if ranks.rank == signalled and step == at:
                raise_signal("SIGTERM")
            if reason := stop.agreed():
                return step, reason, stop.exit_code
    return None


@pytest.mark.parametrize("signalled", [0, 1])
def test_all_ranks_stop_at_the_same_step(spawn_ranks, signalled):
    assert spawn_ranks(stop_one_rank, signalled=signalled, at=4) == [(4, "SIGTERM", 143)] * 2
