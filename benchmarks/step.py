"""Training tokens per second on the CPU: our experts against peft's LoRA and Poly on the same model.

    python benchmarks/step.py            # about two minutes
    python benchmarks/step.py --json     # the same, and one JSON object as the last line
    python benchmarks/step.py --track    # instead: what following a run costs, of configs/quickstart.yaml

A Llama (width 256, 4 layers, made from its config) with adapters of the same active rank on every linear
layer. One step is forward, backward and AdamW. The variants take turns, a step each, so that a busy machine
slows all of them alike; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach

VOCABULARY = 1000
TASKS = 8
ACTIVE_RANK = 8

Step = Callable[[Tensor, Tensor], None]


def llama(width: int, layers: int) -> nn.Module:
    """The same weights for every variant."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def lora(base: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        r=ACTIVE_RANK, lora_alpha=ACTIVE_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, config)


def poly(base: nn.Module) -> nn.Module:
    config = peft.PolyConfig(
        r=ACTIVE_RANK, n_skills=8, n_tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, config)


def experts(**settings: object) -> Callable[[nn.Module], nn.Module]:
    config = TaskMoEConfig(num_experts=8, target_modules="all-linear", **settings)  # type: ignore[arg-type]
    return lambda base: attach(base, config, TASKS)


VARIANTS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "lora": ("peft LoRA, r 8", lora),
    "poly": ("peft Poly, 8 skills of r 8", poly),
    "rank1": ("ours, 8 rank-1 experts, gated after", experts(r=1)),
    "before": ("ours, 8 experts of r 8, averaged before", experts(r=8, compose="before", gate="sigmoid")),
    "top_k": ("ours, 2 of 8 experts of r 4, gated after", experts(r=4, gate="top_k", top_k=2)),
}


def trainer(name: str, width: int, layers: int) -> Step:
    """One training step of a variant."""
    model = VARIANTS[name][1](llama(width, layers)).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(ids: Tensor, task_ids: Tensor) -> None:
        tasks = {} if name == "lora" else {"task_ids": task_ids}
        model(input_ids=ids, labels=ids, **tasks).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def measure(steps: dict[str, Step], batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of each variant; the same data for all, another order each round."""
    random = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(-2, rounds):  # two rounds to warm up
        ids = torch.randint(VOCABULARY, (batch, length), generator=random)
        task_ids = torch.randint(TASKS, (batch,), generator=random).sort().values
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            steps[name](ids, task_ids)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """How many times as fast as ``theirs``: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def tracked(steps: int) -> dict[str, float]:
    """A run of configs/quickstart.yaml with its default following, wandb offline, without evaluations.

    Returns seconds from its first step to its last line, and those of them that went into measuring, logging
    and drawing (the tables and images of the end with them).
    """
    from taskmoe.train.config_io import load
    from taskmoe.train.loop import train
    from taskmoe.train.track.log import END, read_log

    os.environ["WANDB_MODE"] = "offline"
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "output_dir": f"{folder}/run", "eval_steps": "null",
                    "evaluation.max_rows": 1, "evaluation.controls": "false"}  # fmt: skip
        train(load(str(quickstart), [f"--{key}={value}" for key, value in settings.items()]))
        lines = read_log(f"{folder}/run/trainer_log.jsonl")
    whole = next(line["time"]["seconds"] for line in reversed(lines) if line["kind"] == "train")
    spent = next(line["time"]["tracking_seconds"] for line in lines if line["kind"] == END)
    return {"seconds": whole, "tracking_seconds": spent, "tracking_share": spent / whole}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", default=["16x128", "16x8"], help="sequences x tokens")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each variant")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--track", type=int, nargs="?", const=600, metavar="STEPS",
                        help="measure what following a run of so many steps costs (600)")  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.track is not None:
        cost = tracked(options.track)
        print(f"\n{cost['tracking_seconds']:.2f} s of {cost['seconds']:.1f} s: {cost['tracking_share']:.2%}")
        if options.json:
            print(json.dumps(cost))
        return

    steps = {name: trainer(name, options.width, options.layers) for name in VARIANTS}
    result: dict[str, object] = {
        "width": options.width,
        "layers": options.layers,
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
    for shape in options.batches:
        batch, length = (int(n) for n in shape.split("x"))
        seconds = measure(steps, batch, length, options.rounds)
        print(f"\nbatch {shape}, width {options.width}, {options.layers} layers, {options.rounds} rounds")
        print(f"{'':42}{'ms/step':>10}{'tokens/s':>10}{'x LoRA':>9}{'x Poly':>9}")
        for name, (title, _) in VARIANTS.items():
            median = statistics.median(seconds[name])
            speed = batch * length / median
            against = [ratio(seconds, name, peer) for peer in ("lora", "poly")]
            print(f"{title:42}{1e3 * median:10.1f}{speed:10.0f}{against[0]:9.2f}{against[1]:9.2f}")
            result[f"tokens_per_second_{name}_{shape}"] = round(speed, 1)
        result[f"lora_ratio_{shape}"] = round(ratio(seconds, "rank1", "lora"), 3)
        result[f"poly_ratio_{shape}"] = round(ratio(seconds, "before", "poly"), 3)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
