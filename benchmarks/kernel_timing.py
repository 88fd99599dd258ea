"""Clocks for the benchmark of the kernels: interleaved runs on a CPU, CUDA events with a cold L2 on a GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
FLUSH = 256 * 2**20  # more than the L2 of any GPU


@dataclass
class Times:
    """Seconds of each run, and what could not be measured."""

    plain: dict[str, list[float]] = field(default_factory=dict)
    graph: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(calls: Mapping[str, Call], device: str, runs: int) -> Times:
    """Every call ``runs`` times (a slow one on a GPU: fewer); one that fails is noted and left out."""
    return _on_cpu(calls, runs) if device == "cpu" else _on_gpu(calls, runs)


def ratio(times: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """How many times as fast as ``theirs``: the median over rounds where they took turns, else of medians."""
    a, b = times[ours], times[theirs]
    if len(a) == len(b):
        return statistics.median(y / x for x, y in zip(a, b, strict=True))
    return statistics.median(b) / statistics.median(a)


def _on_cpu(calls: Mapping[str, Call], runs: int) -> Times:
    # The CPU time of a single thread does not count what else runs on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = Times()
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call()
            start = clock()
            call()
            # A run lasts long enough for the clock.
            repeats[name] = max(1, min(50, round(1e-3 / (clock() - start))))
        except Exception as error:
            times.failed[name] = why(error)
    times.plain = {name: [] for name in repeats}
    names, order = list(repeats), random.Random(0)
    for _ in range(runs):
        order.shuffle(names)  # what ran before leaves its traces in the caches
        for name in names:
            call, n = calls[name], repeats[name]
            start = clock()
            for _ in range(n):
                call()
            times.plain[name].append((clock() - start) / n)
    times.host = {name: statistics.median(seconds) for name, seconds in times.plain.items()}
    return times


def _on_gpu(calls: Mapping[str, Call], runs: int) -> Times:
    times, flush = Times(), torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for name, call in calls.items():
        try:
            _warm(call)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            torch.cuda.synchronize()
            slow = time.perf_counter() - start
            times.memory[name] = torch.cuda.max_memory_allocated() - before
            n = max(10, min(runs, round(1 / slow)))
            times.plain[name] = _events(call, flush, n)
            times.host[name] = min(host, _host_time(call))
        except Exception as error:
            times.failed[name] = why(error)
            torch.cuda.empty_cache()
            continue
        try:
            times.graph[name] = _events(capture(call).replay, flush, n)
        except Exception as error:
            times.failed[f"{name}, as a CUDA graph"] = why(error)
            torch.cuda.synchronize()
    return times


def _events(call: Call, flush: torch.Tensor, runs: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _host_time(call: Call) -> float:
    """Seconds until a call returns, with room in the device's queue."""
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _warm(call: Call) -> None:
    for _ in range(3):
        call()


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph; raises where it waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _warm(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the best of several large copies."""
    source = torch.zeros((2**30 if device != "cpu" else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    if device == "cpu":
        seconds = min(_on_cpu({"copy": lambda: target.copy_(source)}, 9).plain["copy"])
    else:
        _warm(lambda: target.copy_(source))
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        seconds = statistics.median(_events(lambda: target.copy_(source), flush, 50))
    return 2 * source.numel() * source.element_size() / seconds


def why(error: Exception) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
