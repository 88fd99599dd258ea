"""Measure the launches of the Triton kernels on the GPU at hand, and keep the fastest of each line of the
table.

The length of a chunk of rows is not tuned: it decides in which order gradients are summed. Another launch
may still change a result's last bit; the same launch never does.

Legend: M rows, D wide dimension, R columns of a group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from taskmoe.kernels import configs
from taskmoe.kernels.configs import Key, Launch
from taskmoe.kernels.plan import Plan

ROWS, TASKS = 16384, 8
WIDTHS = {"narrow": 1024, "wide": 4096}
DTYPES = {16: torch.bfloat16, 32: torch.float32}  # float64 is for tests

Timer = Callable[[Callable[[], object]], float]


def candidates(key: Key) -> Iterator[Launch]:
    """The launches that are worth a try; some may not fit a GPU."""
    size = key.bits // 16
    for width in (32, 64, 128, 256):
        for warps in (4, 8):
            for stages in (1,) if key.kernel == "expand" else (2, 3, 4):
                for rows in (32, 64, 128) if key.kernel == "wgrad" else (0,):
                    if width * max(rows, 64) * size <= 64 * 256:
                        yield Launch(width, rows, warps, stages)


def problem(key: Key, device: torch.device) -> Callable[[], object]:
    """The kernel of ``key`` on a batch of equal tasks, ready to run."""
    from taskmoe.kernels import launch  # needs triton

    D, dtype = WIDTHS[key.width], DTYPES[key.bits]
    plan = Plan.from_sequences(range(TASKS), ROWS // TASKS, TASKS)
    rows = launch.Rows.of_plan(plan.op_tables(device, tiles=True))
    wide = torch.randn(ROWS, D, device=device, dtype=dtype)
    rank = torch.randn(ROWS, key.rank, device=device)
    bank = torch.randn(TASKS, key.rank, D, device=device)
    gates = torch.ones(TASKS, 1, device=device)
    slots = torch.arange(TASKS, device=device)[:, None]
    if key.kernel == "shrink":
        return lambda: launch.shrink(wide, bank, slots, rows, ROWS)
    if key.kernel == "expand":
        return lambda: launch.expand(rank, gates, bank, slots, 1.0, rows, wide, wide)
    return lambda: launch.weight_gradient(rank, gates, wide, slots, 1.0, rows, bank[None])


def seconds_on_gpu(run: Callable[[], object]) -> float:
    """Median seconds of a call, with a cold cache."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3


def misfits() -> tuple[type[Exception], ...]:
    """What Triton raises for a launch that this GPU cannot do: too much shared memory, or no such program."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def tune(
    gpu: str,
    arch: str,
    device: torch.device,
    budget_s: float,
    say: Callable[[str], None],
    timer: Timer = seconds_on_gpu,
) -> dict[str, list[int] | None]:
    """{line: [width, rows, num_warps, num_stages]} where another launch than the table's is faster by 3 %,
    None where none is; lines that were not measured are left out.

    Args:
        gpu, arch: the GPU's name and architecture, as :func:`taskmoe.kernels.configs.launch` takes them.
        budget_s: when it is spent, the lines that are left keep what they have.
        say: is told of each line.
    """
    found: dict[str, list[int] | None] = {}
    deadline = time.monotonic() + budget_s
    known = configs.overrides()
    # So that little time still reaches every kernel.
    for key in sorted(configs.keys(), key=lambda k: (k.bits, k.rank, k.width)):
        if key.bits not in DTYPES:
            continue
        if time.monotonic() > deadline:
            say(f"{key}: the time is spent; it and what follows keep their launches")
            break
        line = (gpu, str(key))
        before = known.pop(line, None)
        run = problem(key, device)
        present = configs.TABLE.get((arch, key)) or configs.default(key)
        times = {present: timer(run)}
        for candidate in candidates(key):
            known[line] = candidate
            try:
                times[candidate] = timer(run)
            except misfits():
                continue
        known.pop(line, None)
        best = min(times, key=lambda launch: times[launch])
        gain = times[present] / times[best]
        better = [best.width, best.rows, best.num_warps, best.num_stages]
        found[str(key)] = better if gain > 1.03 else None
        if before is not None:
            known[line] = before
        say(f"{key}: {1e6 * times[best]:.1f} us with {best}, {gain:.2f} x the table's")
    return found


def write(path: Path, gpu: str, lines: Mapping[str, list[int] | None]) -> None:
    """Write the launches of one GPU into the file of overrides (None: the table's); what it says of other
    lines and other GPUs stays."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = {**known.get(gpu, {}), **lines}
    known[gpu] = {line: launch for line, launch in merged.items() if launch is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
