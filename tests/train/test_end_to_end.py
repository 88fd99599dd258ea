"""Two ranks as a user starts them: stopped in the middle, resumed to the end, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import psutil
import pytest

from taskmoe.train.cli import main
from taskmoe.train.track.log import read_log

CONFIG = """\
model: {type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}
tokenizer: {kind: wordlevel, vocab_size: 32}
moe: {r: 1, num_experts: 2}
data:
  skill_gym: {num_tasks: 2, num_skills: 3, alphabet_size: 8, train_rows: 40, validation_rows: 2, test_rows: 1}
  max_length: 24
  cache_dir: cache
mixing: {strategy: equal}
phases: [{train: [base, experts, router]}]
output_dir: run
max_steps: 100000
per_device_train_batch_size: 2
lr_scheduler_type: constant
logging_steps: 1
evaluation: {max_new_tokens: 2}
deepspeed: zero2.json
report_to: [none]
"""
SHARED_MEMORY = Path("/dev/shm")

Start = Callable[..., subprocess.Popen]


def family(folder: Path) -> list[psutil.Process]:
    """The living processes that were started in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.cwd() == str(folder)
                and "taskmoe.train.cli" in process.cmdline()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``taskmoe train``; afterwards no process, shared memory or temporary file may be left."""
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "tmp").mkdir()
    before = set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()

    def call(*arguments: str, launcher: tuple[str, ...] = ("taskmoe.train.cli",)) -> subprocess.Popen:
        number = len(list(tmp_path.glob("stdout-*")))
        with (
            open(tmp_path / f"stdout-{number}", "wb") as out,
            open(tmp_path / f"stderr-{number}", "wb") as err,
        ):
            return subprocess.Popen(
                [sys.executable, "-m", *launcher, "train", "cfg.yaml", *arguments],
                cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stdout=out, stderr=err,
                # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    yield call
    until(lambda: not family(tmp_path), "processes to end", 20, fail=False)
    left = family(tmp_path)
    for process in left:
        process.kill()
    assert not left, [process.cmdline() for process in left]
    if SHARED_MEMORY.is_dir():
        assert not {p.name for p in set(SHARED_MEMORY.iterdir()) - before if p.name.startswith("deepspeed")}
    # torch makes a folder per user for its compiler, once.
    assert not [p.name for p in (tmp_path / "tmp").iterdir() if not p.name.startswith("torchinductor_")]


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0, fail: bool = True) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            assert not fail, f"waited in vain for {what}"
            return
        time.sleep(0.05)


def output(folder: Path, number: int, stream: str = "stdout") -> str:
    return (folder / f"{stream}-{number}").read_text()


def reached(folder: Path, number: int, step: int) -> Callable[[], bool]:
    return lambda: f"step {step}/" in output(folder, number)


def resume(folder: str, max_steps: int) -> tuple[int, str]:
    """Exit code and stderr of the resumed run on this rank of the shared pair."""
    os.chdir(folder)
    argv = ["train", "cfg.yaml", "--resume_from_checkpoint", "true", "--max_steps", str(max_steps)]
    with redirect_stderr(StringIO()) as err, redirect_stdout(StringIO()):
        code = main(argv)
    return code, err.getvalue()


def test_stopped_by_sigterm_and_resumed_to_the_end(
    start: Start, tmp_path: Path, spawn_ranks: Callable
) -> None:
    process = start("--num_ranks", "2")
    until(lambda: process.poll() is not None or reached(tmp_path, 0, 3)(), "step 3")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert output(tmp_path, 0, "stderr") == "taskmoe: SIGTERM: saving after this step, then ending\n"
    last = output(tmp_path, 0).splitlines()[-1]
    words = r"stopped by SIGTERM after step (\d+); saved run/checkpoint-\1. Go on with .*"
    found = re.fullmatch(words, last)
    assert found, last
    step = int(found[1])
    folder = tmp_path / "run" / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["step"], state["world_size"]) == (step, 2)
    assert all((folder / f"rng-{rank}.pt").is_file() for rank in (0, 1))
    assert len(list((folder / "deepspeed").rglob("*optim_states.pt"))) == 2  # a part of each rank
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [folder.name]

    end = step + 3
    assert spawn_ranks(resume, folder=str(tmp_path), max_steps=end) == [(0, "")] * 2
    log = read_log(tmp_path / "run" / "trainer_log.jsonl")
    trained = [line for line in log if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, end + 1))  # no gap, nothing twice
    # Two ranks of two rows: what the tasks have seen adds up over the interruption.
    rows = [sum(v * 40 for k, v in line.items() if k.startswith("train/epochs/")) for line in trained]
    assert rows == pytest.approx([4 * n for n in range(1, end + 1)])
    assert [line["kind"] for line in log if line["step"] == end] == ["train", "eval", "routing", "end"]
    assert log[-1]["status"] == "finished"


@pytest.mark.slow
def test_ctrl_c_under_deepspeeds_own_launcher(start: Start, tmp_path: Path) -> None:
    launcher = ("deepspeed.launcher.runner", "--num_gpus", "2", "--module", "taskmoe.train.cli")
    process = start(launcher=launcher)
    until(lambda: process.poll() is not None or reached(tmp_path, 0, 3)(), "step 3")
    for member in psutil.Process(process.pid).children(recursive=True):  # as a terminal does
        member.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    until(lambda: not family(tmp_path), "the ranks to end")
    assert "stopped by SIGINT after step" in output(tmp_path, 0)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_ranks_save_when_their_launcher_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("--num_ranks", "2")
    until(lambda: process.poll() is not None or reached(tmp_path, 0, 3)(), "step 3")
    process.kill()
    process.wait()
    until(lambda: not family(tmp_path), "the ranks to end")
    assert "stopped by launcher gone after step" in output(tmp_path, 0)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()
