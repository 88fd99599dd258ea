"""Fixtures of the whole suite: a fixed seed, no network, nothing left behind, one pair of ranks for all."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

# Here and not in a hook: torch, transformers and wandb read them at import, and so do the conftests below.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",  # tests of the wandb log set it themselves
    OMP_NUM_THREADS="1",
)
os.environ.pop("COLUMNS", None)  # tables are as wide as they are for a pipe

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PREFIXES = ("deepspeed", "torch_", "psm_")  # DeepSpeed's buffers, torch's and Python's segments


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


def _shared_memory() -> set[str]:
    if not SHARED_MEMORY.is_dir():
        return set()
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(SHARED_MEMORY_PREFIXES)}


SHARED_BEFORE = pytest.StashKey[set[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SHARED_BEFORE] = _shared_memory()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when the suite has left buffers in /dev/shm; one worker of several cannot tell."""
    left = _shared_memory() - session.config.stash[SHARED_BEFORE]
    if left and not hasattr(session.config, "workerinput"):
        print(f"\nleft in {SHARED_MEMORY}: {sorted(left)}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class RankPair:
    """Worker processes that live as long as the session and run functions as the ranks of one group.

    Starting two processes with torch and DeepSpeed takes seconds, so all two-rank tests share them. A call
    that fails or hangs ends the pair (its ranks may be at different collectives); the next one starts anew.
    """

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder = folder
        self.size = size
        self.starts = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], /, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Runs `function(**kwargs)` on every rank; returns the results in rank order.

        `function` stands at the top level of a test file, takes and returns picklable values, and finds the
        process group initialised. Raises AssertionError with every rank's traceback when one of them fails.
        """
        from taskmoe.train.distributed import free_port

        message = pickle.dumps((function.__code__.co_filename, function.__qualname__, kwargs, free_port()))
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send_bytes(message)
            replies = self._collect(timeout_s)
        except BaseException:
            self.close()
            raise
        failures = [f"--- rank {rank}\n{reply[1]}" for rank, reply in enumerate(replies) if not reply[0]]
        if failures:
            self.close()
            raise AssertionError("\n".join([f"{function.__qualname__} failed", *failures, self.output()]))
        return [reply[1] for reply in replies]

    def _start(self) -> None:
        from taskmoe.train.distributed import free_port

        self.starts += 1
        port = free_port()
        worker = Path(__file__).with_name("rank_worker.py")
        for rank in range(self.size):
            ours, theirs = Pipe()
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                           "WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "DS_ACCELERATOR": "cpu"}  # fmt: skip
            with open(self.folder / f"rank-{rank}.log", "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, str(worker), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], env=environment, cwd=self.folder, stdout=log, stderr=log,
                )  # fmt: skip
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout_s: float) -> list[tuple[bool, Any]]:
        replies: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(replies) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in replies}
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    replies[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    replies[rank] = (False, f"the process ended with code {self._processes[rank].wait()}")
                if not replies[rank][0]:
                    # The others may wait for this one in a collective: a moment for them to fail as well.
                    deadline = min(deadline, time.monotonic() + 5.0)
        return [replies.get(rank, (False, "no answer in time")) for rank in range(self.size)]

    def output(self, limit: int = 4000) -> str:
        """The end of what each rank has printed."""
        texts = [(self.folder / f"rank-{rank}.log").read_text(errors="replace") for rank in range(self.size)]
        return "\n".join(f"--- output of rank {rank}\n{text[-limit:]}" for rank, text in enumerate(texts))

    def close(self) -> None:
        """Kills the pair, if there is one."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


@pytest.fixture(scope="session")
def spawn_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    """`spawn_ranks(function, **kwargs) -> [result of rank 0, result of rank 1]`."""
    pair = RankPair(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()
