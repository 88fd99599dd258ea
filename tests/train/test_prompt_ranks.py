"""Prompts under an engine: two ranks of ZeRO 2 and 3 do what one process does without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train import distributed
from taskmoe.train.config import Config
from taskmoe.train.engine import Engine
from taskmoe.train.micro_batch import learn
from taskmoe.train.objectives import Counts, count
from taskmoe.train.schedule import resolve_phases

TASKS, STEPS, ROWS, VOCAB, BOUND = 4, 3, 8, 23, 1e-6
WEIGHT = 0.7  # of distillation
ASKED = [0, 0, 1, 0, 1, 2, 3, 2]  # each rank's half holds tasks that the other's does not
METHODS: dict[str, dict[str, Any]] = {
    "one a task": {"bank": "prompt"},
    "shared": {"bank": "multitask_prompt"},
    "routed": {"bank": "prompt_bank", "num_experts": 3, "router_init_std": 0.5},
}
Case = tuple[str, str, int, bool]  # method, where, stage, checkpointing


def model(method: str, where: str, teacher: str | None = None) -> Any:
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
                        initializer_range=0.3)  # fmt: skip
    options = {"length": 3, "where": where, "start_std": 0.5}
    terms = None if teacher is None else {"distillation": {"weight": WEIGHT, "teacher": teacher}}
    config = TaskMoEConfig.from_dict({**METHODS[method], "bank_options": options, "regularisers": terms})
    return attach(LlamaForCausalLM(llama), config, TASKS)


def rows(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    ids, tasks = torch.randint(3, VOCAB, (ROWS, 6), generator=draw), torch.tensor(ASKED)
    labels = (ids + 5 * tasks[:, None]) % VOCAB
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task_ids": tasks}


def settings(stage: int, checkpointing: bool, folder: Path) -> Config:
    path = folder / f"zero{stage}.json"
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return Config(model={"type": "llama"}, optim="sgd", learning_rate=0.5, max_steps=STEPS, max_grad_norm=0.0,
                  gradient_checkpointing=checkpointing, per_device_train_batch_size=4, deepspeed=str(path),
                  report_to=())  # fmt: skip


def on_a_rank(
    cases: list[tuple[Case, Config]], teacher: str | None = None
) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    ranks = distributed.Ranks(rank, 2, 0, torch.device("cpu"), owns_group=False)
    found = []
    for (method, where, _, checkpointing), config in cases:
        made = model(method, where, teacher)
        if checkpointing:
            made.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        phase = resolve_phases(config)[0]
        engine = Engine(made, config, phase, ranks)
        made.train()
        for step in range(STEPS):
            batch = {n: v[rank * 4 : rank * 4 + 4] for n, v in rows(step).items()}
            mine = count(batch, config.task_type, TASKS)
            both = distributed.all_sum(torch.stack([mine.tokens_T, mine.samples_T]))
            with engine.accumulate():
                weights = torch.ones(TASKS).double()
                learn(engine, batch, Counts(both[0], both[1]), weights, config, ranks.device, 0)
            engine.step(dict.fromkeys(phase.learning_rates, config.learning_rate))
        with engine.gathered(engine.parameters):
            found.append({n: p.detach().float().clone() for n, p in engine.parameters.items()})
        engine.close()
    return found


def alone(
    method: str, where: str, taught: Any = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights at the start and after the steps. taught: the teachers' model; its term is a mean over the
    two ranks' rows.
    """
    made = model(method, where).train()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for step in range(STEPS):
        batch = rows(step)
        labels = batch.pop("labels")
        whole = made(**batch, use_cache=False).logits
        logits = whole[:, :-1]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        if taught is not None:
            with torch.no_grad():
                wanted = taught(**batch, use_cache=False).logits.log_softmax(-1)
            gaps = (wanted.exp() * (wanted - whole.log_softmax(-1))).sum(-1)
            loss = loss + WEIGHT * (gaps[:4].mean() + gaps[4:].mean()) / 2
        loss.backward()
        optimizer.step()
    return start, {n: p.detach() for n, p in trained.items()}


def compare(spawn_ranks: Any, cases: list[Case], folder: Path, taught: Any = None) -> None:
    given = [(case, settings(case[2], case[3], folder)) for case in cases]
    teacher = None if taught is None else str(folder)
    both = spawn_ranks(on_a_rank, cases=given, teacher=teacher, timeout_s=300)
    for i, case in enumerate(cases):
        start, expected = alone(*case[:2], taught)
        for found in (both[0][i], both[1][i]):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert float((value - start[name]).abs().max()) > 100 * BOUND, (case, name)
                assert float((found[name] - value).abs().max()) <= BOUND, (case, name)


def test_two_ranks_equal_one_process(spawn_ranks, tmp_path):
    cases: list[Case] = [
        ("one a task", "layers", 3, True),
        ("shared", "input", 2, False),
        ("routed", "layers", 2, True),
        ("routed", "input", 3, False),
    ]
    compare(spawn_ranks, cases, tmp_path)


def test_teachers_are_run_on_every_rank(spawn_ranks, tmp_path):
    taught = model("one a task", "input").eval()
    with torch.no_grad():
        taught.prompts.bank.prompts_TlW.normal_(std=0.5)
    taught.save_pretrained(tmp_path)
    cases: list[Case] = [("shared", "input", 2, False), ("shared", "input", 3, True)]
    compare(spawn_ranks, cases, tmp_path, taught)
