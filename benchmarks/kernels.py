"""The grouped low-rank product against plain torch: right first, then how fast.

    python benchmarks/kernels.py                 # the GPU if there is one, else the CPU's small shapes
    python benchmarks/kernels.py --device cpu --routing task --runs 31 --budget 1400
    python benchmarks/kernels.py --check         # right or wrong, no clock

Needs torch and triton alone; peft and scattermoe join where they are installed. Every shape is compared with
fp64 before it is timed, and a wrong result has no speed: the row says WRONG and the exit code is 1. A shape
that fails, or that the budget leaves no time for, is listed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
from kernel_peers import PEERS, PLAIN, Cannot, Run, beside_base, ours
from kernel_report import device_name, notable, print_shape, rounded, targets, versions
from kernel_shapes import (
    TENSORS,
    Operands,
    Shape,
    Truth,
    cpu_shapes,
    gpu_shapes,
    kernel_bytes,
    least_bytes,
    operands,
)
from kernel_timing import Times, capture, copy_bandwidth, measure, ratio, why
from torch import Tensor

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "ours"
REPEATS = 20


def step(run: Run, dy: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients."""
    out = run.forward()
    return out, *torch.autograd.grad(out, run.leaves, dy)


def check(o: Operands, run: Run, truth: Truth) -> dict[str, Any]:
    """Errors against fp64 beside those of plain torch, and whether the bits repeat; on a GPU also whether the
    op waits for the device, and whether it can be captured."""
    plain = PEERS[PLAIN](o)
    found = _named(step(run, o.dy))
    errors, allowed = truth.errors(found), truth.errors(_named(step(plain, o.dy)))
    # The floor: the order of fp32 sums alone.
    floor = 2 * torch.finfo(torch.float32).eps
    wrong = [name for name in TENSORS if not errors[name] <= max(2 * allowed[name], floor)]
    again = (_named(step(run, o.dy)) for _ in range(REPEATS - 1))
    same = all(torch.equal(found[name], tensor) for other in again for name, tensor in other.items())
    result: dict[str, Any] = {"wrong": wrong, "errors": errors, "plain_errors": allowed, "same_bits": same}
    if o.x.is_cuda:
        result["no_sync"] = _without_sync(run, o.dy)
        result["captured"] = _tried(lambda: capture(lambda: step(run, o.dy)))
    return result


def _named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(TENSORS, tensors, strict=True))


def _tried(call: Callable[[], object]) -> bool | str:
    """True, or why not."""
    try:
        call()
    except Exception as error:
        return why(error)
    return True


def _without_sync(run: Run, dy: Tensor) -> bool | str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return _tried(lambda: step(run, dy))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peers_of(o: Operands, truth: Truth, names: Sequence[str]) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that do this shape and do it right, and why the others are left out."""
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            run = PEERS[name](o)
            error = truth.errors({"out": run.forward()}, blocks=1)["out"]
            if not error <= 4 * torch.finfo(o.x.dtype).eps:
                left_out[name] = f"wrong: error {error:.1e}"
            else:
                runs[name] = run
        except Cannot as reason:
            left_out[name] = str(reason)
        except Exception as error:
            left_out[name] = why(error)
    return runs, left_out


def speeds(o: Operands, runs: dict[str, Run], count: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each direction: medians, ratios, share of the roofline, the layer's cost over its base's."""
    device, rows = o.x.device.type, []
    everything = {**runs, **beside_base(o)}
    for direction in ("forward", "forward+backward"):
        calls: dict[str, Callable[[], object]] = {}
        for name, run in everything.items():
            calls[name] = partial(step, run, o.dy) if "+" in direction else partial(_forward, run)
        times = measure(calls, device, count)
        rows.append(_row(o, direction, times, runs, bandwidth))
    return rows


def _forward(run: Run) -> Tensor:
    with torch.no_grad():
        return run.forward()


def _row(o: Operands, direction: str, times: Times, runs: dict[str, Run], bandwidth: float) -> dict[str, Any]:
    medians = {name: statistics.median(seconds) for name, seconds in times.plain.items()}
    ratios, graph_ratios = {}, {}
    for name in runs:
        if name == OURS or name not in times.plain or OURS not in times.plain:
            continue
        against = "base + ours" if runs[name].with_base else OURS
        ratios[name] = ratio(times.plain, against, name)
        if against in times.graph and name in times.graph:
            graph_ratios[name] = ratio(times.graph, against, name)
    fair = [name for name in ratios if not runs[name].with_base]
    best = min(fair, key=lambda name: ratios[name], default=None)
    least = least_bytes(o.shape, o.x.element_size(), direction) / bandwidth
    graph = {name: statistics.median(seconds) for name, seconds in times.graph.items()}
    fastest = graph.get(OURS, medians.get(OURS))
    return {
        "shape": str(o.shape), "direction": direction,
        "seconds": medians, "graph_seconds": graph,
        "runs": len(times.plain.get(OURS, ())), "ratios": ratios, "graph_ratios": graph_ratios,
        "best_peer": best, "best_ratio": ratios[best] if best else None,
        "roofline": least / fastest if fastest else None,
        "overhead": {
            name: medians[name] / medians["base"]
            for name in ("base + ours", "ours, then base") if name in medians and "base" in medians
        },
        "extra_memory": times.memory, "host_seconds": times.host.get(OURS), "failed": times.failed,
    }  # fmt: skip


def kernel_rows(o: Operands, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """Each Triton kernel alone, against the measured copy bandwidth; task-level shapes on a GPU."""
    from taskmoe.kernels import launch

    rows = launch.Rows.of_plan(o.plan.op_tables(o.x.device))
    x, A, B, gates = (t.detach() for t in o.leaves)
    slots, scale = o.slots, o.scale
    s = launch.shrink(x, A, slots, rows, o.shape.M)
    calls: dict[str, Callable[[], object]] = {
        "shrink": lambda: launch.shrink(x, A, slots, rows, o.shape.M),
        "expand": lambda: launch.expand(s, gates, B, slots, scale, rows, x),
        "wgrad": lambda: launch.weight_gradient(s, gates, x, slots, scale, rows, A[None]),
    }
    times = measure(calls, "cuda", count)
    result = []
    for name in calls:
        D = o.shape.N if name == "expand" else o.shape.K
        seconds = times.graph.get(name) or times.plain.get(name)
        moved = kernel_bytes(o.shape, o.x.element_size(), D)
        share = moved / statistics.median(seconds) / bandwidth if seconds else None
        wide = o.x.element_size() * o.shape.M * D
        row = {"kernel": name, "shape": str(o.shape), "M": o.shape.M, "D": D}
        result.append(row | {"wide_bytes": wide, "share": share})
    return result


def one_shape(
    shape: Shape, options: argparse.Namespace, peers: Sequence[str] = (), bandwidth: float | None = None
) -> dict[str, Any]:
    """Check, then time (with a bandwidth); whatever fails is in the result."""
    result: dict[str, Any] = {**asdict(shape), "M": shape.M, "shape": str(shape), "rows": [], "kernels": []}
    try:
        o = operands(shape, options.device, DTYPES[options.dtype])
        truth, run = Truth(o), ours(o)
        result["check"] = check(o, run, truth)
        if result["check"]["wrong"] or not result["check"]["same_bits"]:
            return {**result, "status": "WRONG"}
        if bandwidth is not None:
            runs, result["left_out"] = peers_of(o, truth, peers)
            del truth
            result["rows"] = speeds(o, {OURS: run, **runs}, options.runs, bandwidth)
            if options.device != "cpu" and shape.by_task:
                result["kernels"] = kernel_rows(o, options.runs, bandwidth)
    except Exception as error:
        return {**result, "status": "failed", "error": why(error)}
    return {**result, "status": "right"}


def run_all(shapes: Sequence[Shape], options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    """All shapes within the budget, in their order."""
    start = time.perf_counter()
    bandwidth = copy_bandwidth(options.device)
    print(f"copies move {bandwidth / 1e9:.1f} GB/s; {len(shapes)} shapes, {options.dtype}, {options.device}")
    done: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    not_run: list[str] = []
    # On a GPU every bank and routing is checked on a small shape before the clock starts on large ones.
    small = {"sequences": 8, "length": 512, "K": 1024, "N": 1024}
    checks = [replace(shape, **small) for shape in shapes] if options.device != "cpu" else []
    work = [(shape, True) for shape in (shapes if options.check else dict.fromkeys(checks))]
    timed = [] if options.check else [(shape, False) for shape in shapes]
    for i, (shape, check_only) in enumerate([*work, *timed]):
        if time.perf_counter() - start > options.budget:
            not_run.append(str(shape))
            continue
        if check_only:
            found = one_shape(shape, options)
        else:
            first = options.device != "cpu" and len(done[False]) < options.compiled
            compiles = first or "P6" in options.peers
            names = [p for p in peers if compiles or not p.startswith("P6")]
            found = one_shape(shape, options, names, bandwidth)
        done[check_only].append(found)
        if options.device != "cpu":
            torch.cuda.empty_cache()
        print_shape(found, header=i == 0)
    return {
        "date": datetime.date.today().isoformat(), "device": device_name(options.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(), "runs": options.runs, "copy_bandwidth": bandwidth,
        "versions": versions(), "checks": done[True], "shapes": done[False], "not_run": not_run,
        "targets": targets(done[False], options.device),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None, shapes: Sequence[Shape] | None = None) -> int:
    """Exit code 1 when a result was wrong. ``shapes``: instead of the listed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what does not fit is listed")
    parser.add_argument("--runs", type=int, help="of each call; default 100 on a GPU, 15 in turns on the CPU")
    parser.add_argument("--routing", default="", help="only routings that begin like this: task, token, ...")
    parser.add_argument("--peers", nargs="+", default=[], help="only these, by their first two letters")
    parser.add_argument("--compiled", type=int, default=3, help="shapes that meet torch.compile on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="right or wrong, no clock")
    parser.add_argument("--out", type=Path, help="default results/kernels_DEVICE.json; - for none")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    options.runs = options.runs or (15 if cpu else 100)
    if shapes is None:
        shapes = cpu_shapes() + cpu_shapes(("token uniform",)) if cpu else gpu_shapes()
    shapes = [s for s in shapes if s.routing.startswith(options.routing)]
    peers = [p for p in PEERS if not options.peers or p[:2] in options.peers]
    result = rounded(run_all(shapes, options, peers))
    notable(result)
    if str(options.out) != "-" and not options.check:
        out = options.out or HERE / "results" / f"kernels_{options.device}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    return int(any(shape["status"] == "WRONG" for shape in (*result["checks"], *result["shapes"])))


def give_way() -> None:
    """Become Hugging Face's package ``kernels``, if it is installed: transformers imports that name, and the
    scripts of this folder have this file on their path."""
    spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != HERE])
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]  # peft imports transformers
    sys.exit(main())
elif __name__ == "kernels":
    give_way()
