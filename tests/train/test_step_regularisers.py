"""Two ranks under every ZeRO stage add what one process adds that knows nothing of engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train import distributed
from taskmoe.train.config import Config, SurgeryConfig
from taskmoe.train.engine import Engine
from taskmoe.train.micro_batch import learn
from taskmoe.train.objectives import Counts, count, step_loss
from taskmoe.train.schedule import resolve_phases

TASKS, STEPS, VOCAB = 4, 3, 23
TRAIN = ("experts", "router", "task_embedding")
# Tasks of a step's rows, by rank: each sees tasks that the other does not.
ASKED = [([0, 0, 1, 0], [1, 2, 3, 2]), ([2, 2, 0, 1], [0, 1, 1, 0]), ([0, 1, 0, 0], [3, 3, 2, 3])]
WEIGHTS = {
    "window_balance": 0.5, "z_loss": 0.1, "entropy": -0.2, "orthogonality": 0.3, "expert_distance": 0.2,
}  # fmt: skip


def model(regularisers: dict[str, Any] | None, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    small = {"r": 2, "num_experts": 3, "task_embedding_dim": 4, "router_hidden_dim": 4, "router": "task_mlp"}
    config = TaskMoEConfig.from_dict({**small, "regularisers": regularisers, **settings})
    made = attach(LlamaForCausalLM(llama), config, TASKS, dry_run=False)
    with torch.no_grad():
        for group, parameters in made.parameter_groups().items():
            for _, p in parameters if group != "base" else ():
                p.copy_(torch.randn(p.shape) * 0.3)
    return made


def rows(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCAB, (8, 6), generator=draw)
    tasks = torch.tensor([t for part in ASKED[step] for t in part])
    labels = (ids + 5 * tasks[:, None]) % VOCAB
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task_ids": tasks}


def micro_batches(step: int, rank: int, ranks: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    whole, share = rows(step), 8 // ranks
    size = share // accumulation
    starts = [rank * share + i * size for i in range(accumulation)]
    return [{n: v[s : s + size] for n, v in whole.items()} for s in starts]


def run_engine(config: Config, settings: dict[str, Any], ranks: distributed.Ranks) -> dict[str, Any]:
    phase = replace(resolve_phases(config)[0], train=TRAIN)
    made = model(**settings)
    if config.gradient_checkpointing:
        made.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = Engine(made, config, phase, ranks)
    made.train()
    for step in range(STEPS):
        batches = micro_batches(step, ranks.rank, ranks.world_size, config.gradient_accumulation_steps)
        parts = [count(b, config.task_type, TASKS) for b in batches]
        mine = sum(parts[1:], parts[0])
        counts = Counts(*distributed.all_sum(torch.stack([mine.tokens_T, mine.samples_T])))
        if engine.surgery is not None:
            engine.surgery.begin(step, counts, parts)
        if engine.regularisers is not None:
            engine.regularisers.begin(counts)
        with engine.accumulate():
            for i, batch in enumerate(batches):
                learn(engine, batch, counts, torch.ones(TASKS).double(), config, ranks.device, i)
        engine.step(dict.fromkeys(phase.learning_rates, config.learning_rate))
    with engine.gathered(engine.parameters):
        weights = {n: p.detach().float().clone() for n, p in engine.parameters.items()}
    told = engine.regularisers.report() if engine.regularisers is not None else {}
    state = engine.regularisers.state_dict() if engine.regularisers is not None else {}
    engine.close()
    return {"weights": weights, "told": told, "state": state}


def run_many(cases: list[tuple[Config, dict[str, Any]]]) -> list[dict[str, Any]]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    ranks = distributed.Ranks(torch.distributed.get_rank(), 2, 0, torch.device("cpu"), owns_group=False)
    return [run_engine(*case, ranks) for case in cases]


def balance(gates: dict[int, torch.Tensor], shares_STE: torch.Tensor) -> torch.Tensor:
    load_SE = torch.stack(list(gates.values())).mean(0)
    return (3 * (load_SE * shares_STE.mean(1)).sum(-1)).mean()


def own_terms(made: torch.nn.Module, window: dict[int, torch.Tensor], tasks: list[int]) -> torch.Tensor:
    """The sum of WEIGHTS times the terms, from the formulas."""
    logits = made.routing.logits(torch.tensor(tasks)).squeeze(2)
    p = logits.softmax(-1)
    for i, t in enumerate(tasks):
        now = p[:, i].detach()
        window[t] = 0.9 * window[t] + 0.1 * now if t in window else now
    banks = [m.bank for m in made.modules() if hasattr(m, "bank")]
    overlap, likeness = [], []
    for bank in banks:
        A = bank.A_ErK / bank.A_ErK.norm(dim=-1, keepdim=True)
        deltas = [bank.B_ErN[e].T @ bank.A_ErK[e] for e in range(3)]
        pairs = [(0, 1), (0, 2), (1, 2)]
        overlap.append(sum((A[e] @ A[f].T).square().sum() / 2 for e, f in pairs) / 3)
        cosines = [(deltas[e] * deltas[f]).sum() / (deltas[e].norm() * deltas[f].norm()) for e, f in pairs]
        likeness.append(sum(cosines) / 3)
    return (
        0.5 * balance(window, p)
        + 0.1 * logits.logsumexp(-1).square().mean()
        - 0.2 * -(p * p.log()).sum(-1).mean()
        + 0.3 * sum(overlap) / len(banks)
        + 0.2 * sum(likeness) / len(banks)
    )


def reference(optim: str, rate: float) -> dict[str, torch.Tensor]:
    """One process, torch alone: the loss plus the terms, and an optimiser."""
    made = model(None).train()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = kind(trained.values(), lr=rate, weight_decay=0.0)
    window: dict[int, torch.Tensor] = {}
    for step in range(STEPS):
        whole = rows(step)
        counts = count(whole, "CAUSAL_LM", TASKS)
        inputs = {n: v for n, v in whole.items() if n != "labels"}
        loss, _ = step_loss(
            made(**inputs).logits, whole, counts, torch.ones(TASKS).double(), task_type="CAUSAL_LM"
        )
        (loss + own_terms(made, window, sorted(set(whole["task_ids"].tolist())))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in trained.items()}


def case(tmp_path: Path, stage: int, optim: str = "sgd", **changes: Any) -> Config:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    changes.setdefault("per_device_train_batch_size", 4)
    return Config(model={"type": "llama"}, optim=optim, learning_rate=0.1 if optim == "sgd" else 1e-3,
                  max_steps=STEPS, seed=3, deepspeed=str(path), report_to=(), max_grad_norm=0,
                  **changes)  # fmt: skip


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


def test_terms_of_weights_on_two_ranks_are_those_of_one_process(spawn_ranks, tmp_path):
    """At every stage, plain and under the surgery that sums, which must not touch them."""
    summed = SurgeryConfig(method="sum")
    cases = [
        (case(tmp_path, 0), {"regularisers": WEIGHTS}),
        (case(tmp_path, 1, per_device_train_batch_size=1, gradient_accumulation_steps=4),
         {"regularisers": WEIGHTS}),
        (case(tmp_path, 2, surgery=summed), {"regularisers": WEIGHTS}),
        (case(tmp_path, 3, gradient_checkpointing=True), {"regularisers": WEIGHTS}),
        (case(tmp_path, 2, "adamw_torch"), {"regularisers": WEIGHTS}),
    ]  # fmt: skip
    both = spawn_ranks(run_many, cases=cases, timeout_s=240)
    without = model(None)
    for i, (config, _) in enumerate(cases):
        expected = reference(config.optim, config.learning_rate)
        for rank in range(2):
            bound = 1e-6 if config.optim == "sgd" else 1e-5
            assert worst(both[rank][i]["weights"], expected) <= bound, (i, rank)
            assert both[rank][i]["told"] == both[0][i]["told"]
        start = {n: p.detach() for n, p in without.named_parameters() if n in expected}
        assert worst(expected, start) > 1e-3
        told = both[0][i]["told"]
        assert told.keys() == {f"regulariser/{n}" for n in WEIGHTS}
        assert all(abs(v) > 1e-6 for v in told.values())
        assert sorted(both[0][i]["state"]["window_balance"]) == ["0", "1", "2", "3"]


def token_reference(name: str, places: int, term) -> dict[str, torch.Tensor]:
    """One process: micro-batches as two ranks have them; the term is the mean over them."""
    made = model(None, router="token_linear").train()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    seen: list[torch.Tensor] = []
    for m in made.modules():
        if hasattr(m, "token_routing"):
            m.register_forward_pre_hook(lambda m, args: seen.append(term(m, args[0])))
    for step in range(STEPS):
        batches = [b for rank in range(2) for b in micro_batches(step, rank, 2, 2)]
        parts = [count(b, "CAUSAL_LM", TASKS) for b in batches]
        counts = sum(parts[1:], parts[0])
        for batch in batches:
            seen.clear()
            inputs = {n: v for n, v in batch.items() if n != "labels"}
            weights = torch.ones(TASKS).double()
            loss, _ = step_loss(made(**inputs).logits, batch, counts, weights, task_type="CAUSAL_LM")
            assert len(seen) == places
            (loss + sum(seen) / places / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in trained.items()}


def z_loss(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    logits = x.flatten(0, 1) @ layer.token_routing.router.weight_E1K[:, 0].T
    return 0.5 * logits.logsumexp(-1).square().mean()


def test_terms_of_tokens_are_means_over_micro_batches_and_ranks(spawn_ranks, tmp_path):
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings = {"router": "token_linear", "regularisers": {"token_z_loss": 0.5}}
    cases = [(case(tmp_path, 0, **half), settings), (case(tmp_path, 2, **half), settings)]
    found = spawn_ranks(run_many, cases=cases, timeout_s=120)
    expected = token_reference("token_z_loss", 14, z_loss)
    for i in range(len(cases)):
        assert worst(found[0][i]["weights"], expected) <= 1e-6, i
        assert found[0][i]["told"] == found[1][i]["told"]
        assert found[0][i]["told"]["regulariser/token_z_loss"] > 0.1


@pytest.mark.slow
def test_alignment_is_the_same_with_parameters_partitioned(spawn_ranks, tmp_path):
    settings = {"regularisers": {"alignment": 0.1}}
    cases = [(case(tmp_path, stage, gradient_checkpointing=stage > 0), settings) for stage in (0, 2, 3)]
    found = spawn_ranks(run_many, cases=cases, timeout_s=240)
    for i in (1, 2):
        assert worst(found[0][i]["weights"], found[0][0]["weights"]) <= 1e-6, i
    plain = spawn_ranks(run_many, cases=[(cases[0][0], {"regularisers": None})], timeout_s=120)
    assert worst(plain[0][0]["weights"], found[0][0]["weights"]) > 1e-3
