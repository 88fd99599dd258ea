"""Two ranks under every ZeRO stage do what one process does that knows nothing of engines."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train import distributed
from taskmoe.train.choices import generator
from taskmoe.train.config import Config, SurgeryConfig
from taskmoe.train.engine import Engine
from taskmoe.train.micro_batch import learn
from taskmoe.train.objectives import Counts, count
from taskmoe.train.schedule import resolve_phases

TASKS, STEPS, ROWS, VOCAB = 4, 5, 8, 23
FROZEN = ("experts", "router", "task_embedding")
# Tasks of the rows of a step, by rank: each sees tasks that the other does not, and task 3 comes and goes.
ASKED = [([0, 0, 1, 0], [1, 2, 3, 2]), ([2, 2, 0, 1], [0, 1, 1, 0]), ([0, 1, 0, 0], [3, 3, 2, 3])]


def model(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    small = {"r": 2, "num_experts": 3, "task_embedding_dim": 4, "router_hidden_dim": 4}
    config = TaskMoEConfig.from_dict({**small, "router": "task_mlp", "router_scope": "layer", **settings})
    made = attach(LlamaForCausalLM(llama), config, TASKS, dry_run=False)
    with torch.no_grad():
        for group, parameters in made.parameter_groups().items():
            for _, p in parameters if group != "base" else ():
                p.copy_(torch.randn(p.shape) * 0.3)
    return made


def rows(step: int) -> dict[str, torch.Tensor]:
    """The rows of a step over both ranks; tasks want opposite things of equal words, so they conflict."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCAB, (ROWS, 6), generator=draw)
    tasks = torch.tensor([t for part in ASKED[step % len(ASKED)] for t in part])
    labels = (ids + 5 * tasks[:, None]) % VOCAB
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task_ids": tasks}


def micro_batches(step: int, rank: int, ranks: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    whole, share = rows(step), ROWS // ranks
    size = share // accumulation
    starts = [rank * share + i * size for i in range(accumulation)]
    return [{n: v[s : s + size] for n, v in whole.items()} for s in starts]


def run_engine(folder: str, config: Config, train: tuple[str, ...], bf16: bool = False) -> dict[str, Any]:
    """Five steps on a rank of the pair; {name: weight} of what trains, and what was seen."""
    torch.set_num_threads(1)
    ranks = distributed.Ranks(torch.distributed.get_rank(), 2, 0, torch.device("cpu"), owns_group=False)
    phase = replace(resolve_phases(config)[0], train=train)
    made = model()
    if bf16:
        for _, p in made.parameter_groups()["base"]:
            p.data = p.data.bfloat16()
    if config.gradient_checkpointing:
        reentrant = config.gradient_checkpointing_reentrant
        made.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    engine = Engine(made, config, phase, ranks)
    made.train()
    for step in range(STEPS):
        batches = micro_batches(step, ranks.rank, 2, config.gradient_accumulation_steps)
        parts = [count(b, config.task_type, TASKS) for b in batches]
        mine = sum(parts[1:], parts[0])
        both = distributed.all_sum(torch.stack([mine.tokens_T, mine.samples_T]))
        counts = Counts(both[0], both[1])
        if engine.surgery is not None:
            engine.surgery.begin(step, counts, parts)
        with engine.accumulate():
            for i, batch in enumerate(batches):
                learn(engine, batch, counts, torch.ones(TASKS).double(), config, ranks.device, i)
        engine.step(dict.fromkeys(phase.learning_rates, config.learning_rate))
    with engine.gathered(engine.parameters):
        weights = {n: p.detach().float().clone() for n, p in engine.parameters.items()}
    seen = engine.surgery.report(STEPS) if engine.surgery is not None else None
    engine.close()
    return {"weights": weights, "seen": seen}


def run_many(cases: list[tuple[str, Config, tuple[str, ...]]]) -> list[dict[str, Any]]:
    return [run_engine(*case) for case in cases]


def pcgrad(vectors: list[torch.Tensor], draw: torch.Generator) -> torch.Tensor:
    """The definition (arXiv 2001.06782, algorithm 1) on whole vectors, in fp64."""
    total = torch.zeros_like(vectors[0])
    for i, own in enumerate(vectors):
        g = own.clone()
        for j in torch.randperm(len(vectors), generator=draw).tolist():
            if j != i and g @ vectors[j] < 0:
                g = g - (g @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    return total


def reference(config: Config, train: tuple[str, ...], surgery: bool = True, bf16: bool = False) -> Any:
    """One process, torch alone: a backward pass for each task's rows, PCGrad on vectors, an optimiser."""
    made = model()
    made.set_trainable(train)
    if bf16:
        for _, p in made.parameter_groups()["base"]:
            p.data = p.data.bfloat16()
    made.train()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    private = [n for n in trained if n.endswith("embedding_TD")]
    shared = [n for n in trained if n not in private]
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[config.optim]
    optimizer = kind(trained.values(), lr=config.learning_rate, weight_decay=0.0)
    conflicts = 0
    for step in range(STEPS):
        whole = rows(step)
        n = (whole["labels"][:, 1:] != -100).sum()
        vectors = []
        for task in sorted(set(whole["task_ids"].tolist())):
            own = {k: v[whole["task_ids"] == task] for k, v in whole.items()}
            labels = own.pop("labels")
            logits = made(**own).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            before = {k: p.grad for k, p in trained.items()}
            for k in shared:
                trained[k].grad = None
            (loss / n).backward()
            vectors.append(torch.cat([trained[k].grad.flatten() for k in shared]).double())
            for k in shared:
                trained[k].grad = before[k]
        conflicts += sum(bool(a @ b < 0) for a, b in itertools.combinations(vectors, 2))
        d = pcgrad(vectors, generator(config.seed, step)) if surgery else torch.stack(vectors).sum(0)
        for k, part in zip(shared, d.split([trained[k].numel() for k in shared]), strict=True):
            trained[k].grad = part.view(trained[k].shape).float()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert conflicts or not surgery
    return {k: p.detach().clone() for k, p in trained.items()}


def case(tmp_path: Path, stage: int, optim: str = "sgd", **changes: Any) -> Config:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    changes.setdefault("surgery", SurgeryConfig(method="pcgrad"))
    return Config(model={"type": "llama"}, optim=optim, learning_rate=0.1 if optim == "sgd" else 1e-3,
                  max_steps=STEPS, seed=3, deepspeed=str(path), report_to=(), **changes)  # fmt: skip


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


def compare(spawn_ranks, cases, bounds) -> None:
    """Each case on the pair against the reference of its own settings."""
    references: dict[Any, Any] = {}
    both = spawn_ranks(run_many, cases=cases, timeout_s=60 + 30 * len(cases))
    for i, (_, config, train) in enumerate(cases):
        key = (config.optim, train, config.max_grad_norm)
        if key not in references:
            references[key] = reference(config, train)
        for rank in range(2):
            error = worst(both[rank][i]["weights"], references[key])
            print(i, config.deepspeed, error)
            assert error <= bounds[config.optim], (i, config, train, rank, error)
        assert both[0][i]["seen"] == both[1][i]["seen"]


BOUNDS = {"sgd": 1e-6, "adamw_torch": 1e-5}
ALL = ("base", *FROZEN)


def test_a_diagonal_of_stages_equals_one_process(spawn_ranks, tmp_path):
    def settings(stage, accumulation, checkpointing, train, optim):
        made = case(tmp_path, stage, optim, gradient_accumulation_steps=accumulation,
                    per_device_train_batch_size=4 // accumulation,
                    gradient_checkpointing=checkpointing)  # fmt: skip
        return str(tmp_path), made, train

    cases = [
        settings(0, 1, False, FROZEN, "sgd"),
        settings(1, 4, True, ALL, "sgd"),
        settings(2, 1, True, FROZEN, "adamw_torch"),
        settings(3, 4, False, FROZEN, "sgd"),
        settings(3, 1, True, ALL, "sgd"),
    ]
    compare(spawn_ranks, cases, BOUNDS)
