"""Tables and targets of the benchmark of the kernels, from the rows that it measured."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Found = Iterable[tuple[float, str]]  # value, shape
SHORT = {"forward": "fwd", "forward+backward": "f+b"}


def print_shape(result: dict[str, Any], *, header: bool) -> None:
    """One line a direction, and one a kernel; ratios are the peer's time over ours."""
    if header:
        columns = f"{'ms':>9}{'graph':>8}{'roof':>6}{'+base':>7}{'first':>7}{'MB':>7}"
        print(f"{'shape':52}{'':4}{columns}  times as fast as")
    name = result["shape"]
    if result["status"] != "right":
        detail = result.get("error") or f"{result['check']['wrong'] or 'bits do not repeat'}"
        print(f"{name:52}{result['status']}: {detail}", flush=True)
        return
    for row in result["rows"]:
        ratios = ", ".join(f"{peer.replace('compiled ', '')} {x:.2f}" for peer, x in row["ratios"].items())
        over, memory = row["overhead"], row["extra_memory"].get("ours")
        cells = [
            _cell(row["seconds"].get("ours"), 9, 1e3, 3),
            _cell(row["graph_seconds"].get("ours"), 8, 1e3, 3),
            _cell(row["roofline"], 6, 1, 2),
            _cell(over.get("base + ours"), 7, 1, 2),
            _cell(over.get("ours, then base"), 7, 1, 2),
            _cell(memory, 7, 2**-20, 0),
        ]
        print(f"{name:52}{SHORT[row['direction']]:4}{''.join(cells)}  {ratios}", flush=True)
        for peer, reason in row["failed"].items():
            print(f"{'':56}{peer}: {reason}")
    for kernel in result["kernels"]:
        share = _cell(kernel["share"], 6, 1, 2)
        print(f"{'':52}{kernel['kernel']:7} D {kernel['D']:<6}{share} of the copy bandwidth")
    if "no_sync" in result.get("check", {}):
        found = {key: result["check"][key] for key in ("no_sync", "captured")}
        for key in (key for key, value in found.items() if value is not True):
            print(f"{'':52}{key}: {found[key]}")
    if not result["rows"]:
        print(f"{name:52}right", flush=True)


def _cell(value: float | None, width: int, factor: float, digits: int) -> str:
    return f"{'-' if value is None else f'{value * factor:.{digits}f}':>{width}}"


def targets(shapes: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each target with the worst shape and how many shapes meet it."""
    steps = [
        (shape, row) for shape in shapes for row in shape["rows"] if row["direction"] == "forward+backward"
    ]
    by_task = [(shape, row) for shape, row in steps if shape["routing"].startswith("task")]
    by_token = [(shape, row) for shape, row in steps if not shape["routing"].startswith("task")]
    if device == "cpu":
        simple = ("P1", "P2", "P4")
        return [
            _target("task-level forward+backward over the best of P1, P2, P4", 0.9, _best(by_task, simple)),
            _target("token-level forward+backward over the best of P1, P4", 0.9, _best(by_token, simple)),
        ]
    kernels = [kernel for shape in shapes for kernel in shape["kernels"] if kernel["share"] is not None]
    shares = [(k, (k["share"], f"{k['kernel']} {k['shape']}")) for k in kernels]
    large = [share for k, share in shares if k["wide_bytes"] >= 64e6]
    small = [share for k, share in shares if k["M"] == 16384 and k["D"] == 1024]
    ragged = [(shape, row) for shape, row in by_task if shape["routing"] == "task ragged"]
    every = [(row["best_ratio"], row["shape"]) for _, row in steps if row["best_ratio"] is not None]
    graphs = [(_least(row["graph_ratios"]), row["shape"]) for _, row in steps if _least(row["graph_ratios"])]
    return [
        _target("shrink, expand, wgrad: share of the copy bandwidth, M x D of 64 MB and more", 0.8, large),
        _target("shrink, expand, wgrad: share of the copy bandwidth at 16k x 1024", 0.6, small),
        _target("task-level forward+backward over the best of P2, P4", 1.3, _best(by_task, ("P2", "P4"))),
        _target("ragged forward+backward over P1", 5.0, _best(ragged, ("P1",))),
        _target("forward+backward over the best peer", 0.95, every),
        _target("forward+backward over the best peer, as CUDA graphs", 0.95, graphs),
    ]


def _best(rows: Iterable[tuple[dict[str, Any], dict[str, Any]]], peers: Sequence[str]) -> Found:
    for _, row in rows:
        found = [ratio for peer, ratio in row["ratios"].items() if peer[:2] in peers]
        if found:
            yield min(found), row["shape"]


def _least(ratios: dict[str, float]) -> float:
    return min((ratio for peer, ratio in ratios.items() if not peer.startswith("P7")), default=0.0)


def _target(name: str, needed: float, found: Found) -> dict[str, Any]:
    values = sorted(found)
    worst, shape = values[0] if values else (None, None)
    return {
        "target": name, "needed": needed, "worst": worst, "worst_shape": shape,
        "median": statistics.median(value for value, _ in values) if values else None,
        "met": sum(value >= needed for value, _ in values), "of": len(values),
    }  # fmt: skip


def notable(result: dict[str, Any]) -> None:
    """Targets with pass or miss, and what was wrong, failed or was not run."""
    print()
    for target in result["targets"]:
        if not target["of"]:
            print(f"not measured: {target['target']}")
            continue
        verdict = "pass" if target["met"] == target["of"] else "MISS"
        print(
            f"{verdict}: {target['target']}: {target['met']} of {target['of']} at {target['needed']} "
            f"or more, median {target['median']:.2f}, worst {target['worst']:.2f} ({target['worst_shape']})"
        )
    every = (*result["checks"], *result["shapes"])
    for status in ("WRONG", "failed"):
        names = [shape["shape"] for shape in every if shape["status"] == status]
        if names:
            print(f"{status}: {len(names)}: {'; '.join(names)}")
    if result["not_run"]:
        print(f"not run, out of time: {len(result['not_run'])} shapes, from {result['not_run'][0]}")
    left_out = {f"{peer}: {why}" for shape in every for peer, why in shape.get("left_out", {}).items()}
    for line in sorted(left_out):
        print(f"left out, {line}")


def rounded(value: Any) -> Any:
    """The same with numbers of four digits, for the file."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def device_name(device: str) -> str:
    return platform.machine() if device == "cpu" else torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "peft", "scattermoe"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
