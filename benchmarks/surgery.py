"""The price of per-task gradients on the CPU: a training step with PCGrad, in each way to get the gradients.

    python benchmarks/surgery.py            # a quarter of an hour
    python benchmarks/surgery.py --json     # the same, and one JSON object as the last line

A Llama made from its config, experts on every linear layer; one step is forward, backward, PCGrad and AdamW.
The ways take turns, a step each, so that a busy machine slows all of them alike; a ratio is the median over
the rounds of the ratio within a round. Ways of many passes over the whole batch take part in the first few
rounds alone. Memory is the peak of torch's allocator within a step, above what it holds between steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from surgery_steps import (
    WAYS,
    Shape,
    Step,
    allowed_bytes,
    build,
    draw,
    largest_layer,
    peak_bytes,
    shared_entries,
)

SLOW = ("separate", "torchjd")
BASE, SMALL = "16x128", "16x32"
SHORT = "16x8"  # activations hide the gradients' memory elsewhere; here it shows
# (key of the result, what it is at most): the wish of the method, fixed before anything was measured.
TARGETS = (
    ("fused_over_plain_T8", 1.25),
    ("fused_over_separate_T8", 0.4),
    ("fused_over_slices_T8", 1.2),
    (f"fused_over_slices_T8_{SMALL}", 0.75),
)
MEMORY_TARGET = 1.2  # of the memory that surgery is granted
# Width, rank, experts: from 0.2 to 3.5 million shared entries.
GROWTH = ("256:1:8", "256:16:8", "256:4:32", "512:4:8")


def measure(
    steps: dict[str, Step], tasks: int, batch: str, rounds: int, slow_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step of each way; the same data for all, another order each round."""
    random = torch.Generator().manual_seed(1)
    rows, length = (int(n) for n in batch.split("x"))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-1, rounds):  # one round to warm up
        ids, task_ids = draw(random, rows, length, tasks)
        names = [name for name in steps if name not in SLOW or i < slow_rounds]
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            steps[name](ids, task_ids)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str) -> float:
    """The time of ``fused`` over that of ``way``: the median over the rounds that both took part in."""
    pairs = zip(seconds["fused"], seconds[way], strict=False)  # the slow ways stop after the first rounds
    return statistics.median(ours / theirs for ours, theirs in pairs)


def case(shape: Shape, batch: str, ways: Sequence[str], rounds: int, slow_rounds: int) -> dict[str, Any]:
    """Time and memory of each way for one shape and batch."""
    models = {name: build(shape) for name in ways}
    P, granted = shared_entries(models["plain"]), allowed_bytes(models["plain"], shape.tasks)
    layer = largest_layer(models["plain"])
    steps = {name: WAYS[name][1](model) for name, model in models.items()}
    seconds = measure(steps, shape.tasks, batch, rounds, slow_rounds)
    rows, length = (int(n) for n in batch.split("x"))
    ids, task_ids = draw(torch.Generator().manual_seed(2), rows, length, shape.tasks)
    peaks = {name: peak_bytes(step, ids, task_ids) for name, step in steps.items()}
    return {
        **asdict(shape),
        "batch": batch,
        "shared_entries": P,
        "largest_layer_entries": layer,
        "milliseconds": {n: round(1e3 * statistics.median(s), 1) for n, s in seconds.items()},
        "fused_over": {n: round(ratio(seconds, n), 3) for n in ways if n != "fused"},
        "peak_bytes": peaks,
        "extra_bytes": peaks["fused"] - peaks["plain"],
        "granted_bytes": granted,
    }


def show(found: dict[str, Any]) -> None:
    """A table of one case."""
    print(
        f"\nT {found['tasks']}, batch {found['batch']}, width {found['width']}, {found['layers']} layers, "
        f"{found['num_experts']} experts of rank {found['r']}: P = {found['shared_entries']:,}"
    )
    print(f"{'':42}{'ms/step':>10}{'fused / it':>12}{'peak MB':>10}")
    for name, (title, _) in WAYS.items():
        if name in found["milliseconds"]:
            against = found["fused_over"].get(name, 1.0)
            peak = found["peak_bytes"][name] / 1e6
            print(f"{title:42}{found['milliseconds'][name]:10.1f}{against:12.2f}{peak:10.1f}")
    T, P, layer = found["tasks"], found["shared_entries"], found["largest_layer_entries"]
    print(
        f"memory of fused above plain: {found['extra_bytes'] / 1e6:.1f} MB; granted: {T} x {P:,} x 4 + "
        f"{T} x {layer:,} x 4 = {found['granted_bytes'] / 1e6:.1f} MB"
    )


def judged(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, measured, at most) of each target that was measured."""
    times = [(key, result[key], bound) for key, bound in TARGETS if key in result]
    parts = [c["extra_bytes"] / c["granted_bytes"] for c in result["cases"]]
    return [*times, ("extra_memory_over_granted", round(max(parts), 3), MEMORY_TARGET)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--batches", nargs="+", default=[BASE, SMALL], help="sequences x tokens")
    parser.add_argument("--growth", nargs="*", default=list(GROWTH), help="width:r:num_experts, at 8 tasks")
    parser.add_argument("--growth_batches", nargs="*", default=[BASE, SHORT])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way")
    parser.add_argument("--slow_rounds", type=int, default=3, help="of those with many passes")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--router", default="task_mlp", help="task_mlp: shared by all tasks; or task_table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    ways = [name for name in WAYS if name != "torchjd" or has_torchjd()]
    base = Shape(width=options.width, layers=options.layers, router=options.router)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "rounds": options.rounds,
        "slow_rounds": options.slow_rounds,
        "threads": options.threads,
        "router": options.router,
        "machine": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": [],
    }
    for package in ("transformers", *(("torchjd",) if "torchjd" in ways else ())):
        result["versions"][package] = version(package)
    for batch in options.batches:
        for tasks in options.tasks:
            found = case(replace(base, tasks=tasks), batch, ways, options.rounds, options.slow_rounds)
            result["cases"].append(found)
            show(found)
            suffix = "" if batch == options.batches[0] else f"_{batch}"
            for name, value in found["fused_over"].items():
                result[f"fused_over_{name}_T{tasks}{suffix}"] = value
    for text in options.growth:
        width, r, num_experts = (int(n) for n in text.split(":"))
        shape = replace(base, width=width, r=r, num_experts=num_experts)
        for batch in options.growth_batches:
            found = case(shape, batch, ["plain", "fused", "slices"], options.rounds, 0)
            result["cases"].append(found)
            show(found)
    print()
    for name, value, bound in judged(result):
        print(f"{name:34}{value:8.3f}  at most {bound:<5}  {'pass' if value <= bound else 'MISS'}")
    if options.json:
        print(json.dumps(result))


def has_torchjd() -> bool:
    try:
        import torchjd  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
