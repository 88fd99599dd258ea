"""The own launcher: DeepSpeed's runner started for real, signals that reach the ranks, no process left."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train import launch
from taskmoe.train.signals import LAUNCHER_VARIABLE

RANK_PROGRAM = """
    import os, pathlib, signal, sys, time

    folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
    rank = os.environ["RANK"]

    def note(name, text=""):
        (folder / f"{name}-{rank}").write_text(text)

    if mode == "exit":
        note("environment", " ".join(sorted(f"{k}={v}" for k, v in os.environ.items()
                                            if k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"))))
        sys.exit(int(sys.argv[3]) if rank == "1" else 0)
    if mode == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        note("ready", str(os.getpid()))
        time.sleep(120)
    if mode == "train":
        from taskmoe.train import distributed
        from taskmoe.train.signals import LauncherWatch, StopRequest
        ranks = distributed.init()
        code = 0
        try:
            with StopRequest(LauncherWatch(interval_s=0.1)) as stop:
                for step in range(2000):
                    time.sleep(0.05)
                    if reason := stop.agreed():
                        time.sleep(1.0)  # saving takes its time
                        note("saved", f"{step} {reason}")
                        code = stop.exit_code
                        break
                    if step == 0:
                        note("ready", str(os.getpid()))
        finally:
            distributed.shutdown(ranks)
        sys.exit(code)
"""
LAUNCHING_PROGRAM = """
    import sys
    from taskmoe.train.launch import launch_ranks
    sys.exit(launch_ranks(2, sys.argv[1:], module="rank_program", grace_s=float({grace_s})))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that calls launch_ranks on RANK_PROGRAM; ends and reports whatever it leaves."""
    (tmp_path / "rank_program.py").write_text(textwrap.dedent(RANK_PROGRAM))
    started = []

    def call(*arguments, grace_s=60):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LAUNCHING_PROGRAM.format(grace_s=grace_s)),
             str(tmp_path), *arguments],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    left = family(tmp_path)
    for process in left:
        process.kill()
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert not left, [process.cmdline() for process in left]


def family(folder):
    """The living processes whose command line names the test's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition, timeout_s=90.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def both(folder, name):
    return all((folder / f"{name}-{rank}").exists() for rank in (0, 1))


def texts(folder, name):
    return [(folder / f"{name}-{rank}").read_text() for rank in (0, 1)]


def test_the_command_line():
    command = launch.launcher_command(2, ["train", "x.yaml", "--seed", "1"], module="a.b", port=29511)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[3:5] == ["--num_gpus", "2"]
    assert command[-6:] == ["--module", "a.b", "train", "x.yaml", "--seed", "1"]
    assert command[command.index("--master_port") + 1] == "29511"
    chosen = launch.launcher_command(2, [], module="a.b", port=1, devices=["3", "5"])
    assert "--num_gpus" not in chosen and chosen[chosen.index("--include") + 1] == "localhost:3,5"


def test_the_environment_of_ranks(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    monkeypatch.setenv("RANK", "3")
    environment = launch.rank_environment(4)
    assert environment["OMP_NUM_THREADS"] == "1" and "RANK" not in environment
    assert launch.rank_environment(2)["OMP_NUM_THREADS"] == "3"
    assert launch.rank_environment(99)["OMP_NUM_THREADS"] == "1"
    assert environment[LAUNCHER_VARIABLE].startswith(f"{os.getpid()}:")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.rank_environment(4)["OMP_NUM_THREADS"] == "7"


def test_the_devices(monkeypatch):
    with pytest.raises(ConfigError, match="num_ranks: 0 is not a positive number"):
        launch.visible_devices(0)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,7")
    assert launch.visible_devices(2) == ["2", "3"]
    with pytest.raises(ConfigError, match="num_ranks: 4, but 3 GPUs are visible"):
        launch.visible_devices(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    assert launch.visible_devices(1) is None
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch.visible_devices(8) is None


@pytest.mark.slow  # test_end_to_end.py holds it of `taskmoe train`, in the fast tests
def test_sigterm_reaches_the_ranks_and_they_save(start, tmp_path):
    process = start("train")
    until(lambda: both(tmp_path, "ready"))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    saved = texts(tmp_path, "saved")
    assert saved[0] == saved[1] and saved[0].endswith("SIGTERM")
    assert output.splitlines() == ["taskmoe: SIGTERM: saving after this step, then ending"]
    assert not family(tmp_path)


@pytest.mark.slow
def test_ctrl_c_reaches_the_ranks_and_they_save(start, tmp_path):
    process = start("train")
    until(lambda: both(tmp_path, "ready"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert all(text.endswith("SIGINT") for text in texts(tmp_path, "saved"))
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(start, tmp_path):
    process = start("train")
    until(lambda: both(tmp_path, "ready"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "ending at once" in output
    assert not (tmp_path / "saved-0").exists() and not (tmp_path / "saved-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_of_a_rank_comes_back(start, tmp_path, code):
    process = start("exit", str(code))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == code and output == ""
    threads = os.environ["OMP_NUM_THREADS"]
    for rank, text in enumerate(texts(tmp_path, "environment")):
        assert text == f"LOCAL_RANK={rank} OMP_NUM_THREADS={threads} RANK={rank} WORLD_SIZE=2"


@pytest.mark.slow
def test_ranks_that_do_not_listen_are_killed(start, tmp_path):
    process = start("deaf", grace_s=1)
    until(lambda: both(tmp_path, "ready"))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 137 and "did not end within 1 s" in output


@pytest.mark.slow
def test_a_signal_before_there_are_ranks(start, tmp_path):
    process = start("train")
    until(lambda: any("deepspeed.launcher.runner" in p.cmdline() for p in psutil.process_iter()
                      if p.pid in {c.pid for c in psutil.Process(process.pid).children()}))  # fmt: skip
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launch_ranks", "runner", "launch"])
def test_a_killed_launcher_ends_the_ranks_after_they_saved(start, tmp_path, victim):
    process = start("train")
    until(lambda: both(tmp_path, "ready"))
    if victim == "launch_ranks":
        process.kill()
    else:
        name = f"deepspeed.launcher.{victim}"
        next(p for p in family(tmp_path) if name in p.cmdline()).kill()
    process.wait(timeout=60)
    assert process.returncode not in (0, None)
    until(lambda: both(tmp_path, "saved"), timeout_s=20)
    until(lambda: not family(tmp_path), timeout_s=20)
