"""What a task costs at inference, on the CPU: routed, as an adapter in peft, merged, and the base alone.

    python benchmarks/export.py            # about two minutes
    python benchmarks/export.py --json     # the same, and one JSON object as the last line

Forward passes of a Llama made from its config, all rows of one task, without gradients. The variants take
turns, one pass each, so that a busy machine slows all of them alike; a ratio is the median over the rounds of
the ratio within a round, and its spread the middle half of them. A second copy of the base shows the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence

import peft
import torch
import transformers
from step import TASKS, experts, llama, measure, ratio
from torch import Tensor, nn

from taskmoe.moe import TaskMoEModel, save_lora

Pass = Callable[[Tensor, Tensor], None]
ROUTED = {
    "after": ("8 experts of r 4, gated after", {"r": 4}),
    "top_k": ("2 of 8 experts of r 4, gated after", {"r": 4, "gate": "top_k", "top_k": 2}),
    "before": ("8 experts of r 8, averaged before", {"r": 8, "compose": "before", "gate": "sigmoid"}),
}


def plain(model: nn.Module) -> Pass:
    """A forward pass that knows no tasks."""

    @torch.no_grad()
    def run(ids: Tensor, tasks: Tensor) -> None:
        model(input_ids=ids, use_cache=False)

    return run


def routed(model: TaskMoEModel) -> Pass:
    """A forward pass of the mixture, all rows of the first task."""

    @torch.no_grad()
    def run(ids: Tensor, tasks: Tensor) -> None:
        model(input_ids=ids, task_ids=torch.zeros_like(tasks), use_cache=False)

    return run


def variants(width: int, layers: int) -> dict[str, tuple[str, Pass]]:
    """{name: (title, a forward pass)}; the second base is the same model again."""
    found = {
        "base": ("base", plain(llama(width, layers).eval())),
        "again": ("base, a second copy", plain(llama(width, layers).eval())),
    }
    for name, (title, settings) in ROUTED.items():
        model = experts(**settings)(llama(width, layers)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, p in model.parameter_groups()["experts"]:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        with tempfile.TemporaryDirectory() as folder:
            save_lora(model, 0, folder)
            adapter = peft.PeftModel.from_pretrained(llama(width, layers), folder).eval()
        found[f"{name}_routed"] = (f"{title}: routed", routed(model))
        found[f"{name}_peft"] = (f"{title}: in peft", plain(adapter))
        found[f"{name}_merged"] = (f"{title}: merged", plain(model.merge_and_unload(0)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", default=["16x128", "1x16"], help="sequences x tokens")
    parser.add_argument("--rounds", type=int, default=30, help="passes of each variant")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    all_of_them = variants(options.width, options.layers)
    result: dict[str, object] = {
        "width": options.width,
        "layers": options.layers,
        "rounds": options.rounds,
        "threads": options.threads,
        "tasks": TASKS,
        "machine": platform.processor() or platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
    for shape in options.batches:
        batch, length = (int(n) for n in shape.split("x"))
        passes = {name: run for name, (_, run) in all_of_them.items()}
        seconds = measure(passes, batch, length, options.rounds)
        print(f"\nbatch {shape}, width {options.width}, {options.layers} layers, {options.rounds} rounds")
        print(f"{'':46}{'ms/pass':>10}{'x base':>9}{'middle half':>16}")
        for name, (title, _) in all_of_them.items():
            time, base = seconds[name], seconds["base"]
            times = ratio(seconds, "base", name)  # as many times as long
            low, _, high = statistics.quantiles([a / b for a, b in zip(time, base, strict=True)], n=4)
            print(f"{title:46}{1e3 * statistics.median(time):10.2f}{times:9.3f}{low:9.3f}{high:7.3f}")
            result[f"{name}_{shape}"] = {
                "times_base": round(times, 4),
                "half": [round(low, 4), round(high, 4)],
            }
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
