"""Two ranks under every ZeRO stage do what one process does that knows nothing of engines."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train import distributed
from taskmoe.train.choices import generator
from taskmoe.train.config import Config, ConfigError, SurgeryConfig
from taskmoe.train.engine import Engine
from taskmoe.train.micro_batch import learn
from taskmoe.train.objectives import Counts, count, step_loss
from taskmoe.train.schedule import resolve_phases
from taskmoe.train.step_surgery import StepSurgery, build_surgery

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


def run_engine(config: Config, train: tuple[str, ...], ranks: distributed.Ranks) -> dict[str, Any]:
    """Five steps: {name: weight} of what trains, and what was told."""
    phase = replace(resolve_phases(config)[0], train=train)
    made = model()
    if config.bf16:
        for _, p in made.parameter_groups()["base"]:
            p.data = p.data.bfloat16()
    if config.gradient_checkpointing:
        made.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = Engine(made, config, phase, ranks)
    made.train()
    for step in range(STEPS):
        batches = micro_batches(step, ranks.rank, ranks.world_size, config.gradient_accumulation_steps)
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


def run_many(cases: list[tuple[Config, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    ranks = distributed.Ranks(torch.distributed.get_rank(), 2, 0, torch.device("cpu"), owns_group=False)
    return [run_engine(config, train, ranks) for config, train in cases]


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


def reference(config: Config, train: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One process, torch alone: a backward pass for each task's rows, PCGrad on vectors, an optimiser."""
    made = model()
    made.set_trainable(train)
    if config.bf16:
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
        d = pcgrad(vectors, generator(config.seed, step))
        for k, part in zip(shared, d.split([trained[k].numel() for k in shared]), strict=True):
            trained[k].grad = part.view(trained[k].shape).float()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert conflicts  # else there is nothing to project
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


def compare(spawn_ranks: Any, cases: list[tuple[Config, tuple[str, ...]]]) -> None:
    """Each case on the pair against the reference of its own settings."""
    both = spawn_ranks(run_many, cases=cases, timeout_s=60 + 30 * len(cases))
    references: dict[Any, Any] = {}
    for i, (config, train) in enumerate(cases):
        key = (config.optim, train)
        if key not in references:
            references[key] = reference(config, train)
        for rank in range(2):
            error = worst(both[rank][i]["weights"], references[key])
            assert error <= BOUNDS[config.optim], (i, config, train, rank, error)
        start = {n: p.detach() for n, p in model().named_parameters() if n in references[key]}
        assert worst(references[key], start) > 100 * BOUNDS[config.optim]  # they did move
        assert both[0][i]["seen"] == both[1][i]["seen"]


BOUNDS = {"sgd": 1e-6, "adamw_torch": 1e-5}
ALL = ("base", *FROZEN)


def settings(tmp_path, stage, accumulation, checkpointing, train, optim):
    made = case(tmp_path, stage, optim, gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=4 // accumulation,
                gradient_checkpointing=checkpointing)  # fmt: skip
    return made, train


def test_a_diagonal_of_stages_equals_one_process(spawn_ranks, tmp_path):
    cases = [
        settings(tmp_path, 0, 1, False, ALL, "sgd"),
        settings(tmp_path, 1, 4, True, FROZEN, "sgd"),
        settings(tmp_path, 2, 1, False, FROZEN, "adamw_torch"),
        settings(tmp_path, 3, 1, True, FROZEN, "sgd"),
    ]
    compare(spawn_ranks, cases)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_accumulation_and_checkpointing_equals_one_process(spawn_ranks, tmp_path, stage):
    axes = ((1, 4), (False, True), (FROZEN, ALL), ("sgd", "adamw_torch"))
    cases = [settings(tmp_path, stage, *at) for at in itertools.product(*axes)]
    compare(spawn_ranks, cases)


def difference(spawn_ranks, first, second) -> float:
    """Between the weights of two cases after the last step, which both ranks agree on."""
    a, b = spawn_ranks(run_many, cases=[first, second], timeout_s=120)[0]
    return worst(a["weights"], b["weights"])


@pytest.mark.parametrize(
    ("stage", "train"), [(0, ALL), (1, FROZEN), (2, FROZEN), pytest.param(3, ALL, marks=pytest.mark.slow)]
)
def test_the_sum_is_plain_training(spawn_ranks, tmp_path, stage, train):
    plain = case(tmp_path, stage, per_device_train_batch_size=4, surgery=SurgeryConfig())
    summed = replace(plain, surgery=SurgeryConfig(method="sum"))
    assert difference(spawn_ranks, (plain, train), (summed, train)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_slices_equal_the_other_ways(spawn_ranks, tmp_path, stage):
    sliced = case(tmp_path, stage, per_device_train_batch_size=4)
    sliced = replace(sliced, surgery=replace(sliced.surgery, way="slices"))
    compare(spawn_ranks, [(sliced, FROZEN), (sliced, ALL)])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "separate", "slices"])
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_used_again_are_those_of_the_last_refresh(spawn_ranks, tmp_path, way, stage):
    """Fixed weights do not depend on the gradients: kept or fresh, they must give the same."""
    fixed = SurgeryConfig(method="fixed", options={"weights": [0.5, 1.5, 0.7, 2.0]}, way=way)
    fresh = case(tmp_path, stage, per_device_train_batch_size=4, surgery=fixed)
    kept = replace(fresh, surgery=replace(fixed, refresh_every=4))
    for train in (FROZEN,) if way == "auto" else (FROZEN, ALL):
        assert difference(spawn_ranks, (fresh, train), (kept, train)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradvac", "graddrop"])
def test_methods_that_see_the_matrix_do_not_depend_on_the_shards(spawn_ranks, tmp_path, method):
    surgery = SurgeryConfig(method=method)
    pair = case(tmp_path, 1, per_device_train_batch_size=4, surgery=surgery)
    (found,) = spawn_ranks(run_many, cases=[(pair, FROZEN)])[0]
    ranks = distributed.init()
    try:
        alone = run_engine(replace(pair, per_device_train_batch_size=8), FROZEN, ranks)
    finally:
        distributed.shutdown(ranks)
    assert worst(found["weights"], alone["weights"]) <= 1e-6


@pytest.mark.slow
def test_a_base_in_bf16(spawn_ranks, tmp_path):
    """Rounded activations, and other splits of a batch round otherwise: a share of the way walked."""
    halves = case(tmp_path, 2, per_device_train_batch_size=4, bf16=True)
    (found,) = spawn_ranks(run_many, cases=[(halves, FROZEN)])[0]
    expected = reference(halves, FROZEN)
    start = {n: p.detach() for n, p in model().named_parameters() if n in expected}
    assert worst(found["weights"], expected) <= 0.02 * worst(expected, start)


def test_what_is_told_about_a_step(spawn_ranks, tmp_path):
    surgery = SurgeryConfig(method="pcgrad", matrix_steps=5, max_tasks=2)
    metrics, lines = spawn_ranks(
        run_many, cases=[(case(tmp_path, 0, per_device_train_batch_size=4, surgery=surgery), FROZEN)]
    )[0][0]["seen"]
    assert 0 < metrics["grad/conflict_frac"] <= 1 and -1 <= metrics["grad/cosine"] <= 1
    assert metrics["train/weight/task-0"] >= 1 and metrics["grad/update_change"] > 0
    assert -1 <= metrics["grad/same_task_cosine"] <= 1
    assert len(metrics["grad/cosine_matrix"]) == 2 == len(metrics["grad/rows"])
    assert any("share rows" in line for line in lines)


def surgery_alone(**settings: Any) -> StepSurgery:
    """A phase's surgery in this process, without an engine."""
    made = model()
    made.set_trainable(FROZEN)
    here = distributed.Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)
    built = build_surgery(SurgeryConfig(**settings), made.train(), here, 0, lambda _: nullcontext())
    assert built is not None
    return built


def without_targets(whole: dict[str, torch.Tensor], tasks: list[int]) -> dict[str, torch.Tensor]:
    gone = torch.isin(whole["task_ids"], torch.tensor(tasks))
    return {**whole, "labels": whole["labels"].masked_fill(gone[:, None], -100)}


def one_step(surgery: StepSurgery, step: int, whole: dict[str, torch.Tensor] | None = None) -> dict:
    """{name: gradient}; the weights do not move."""
    whole = rows(step) if whole is None else whole
    made, counts = surgery.gradients.model, count(whole, "CAUSAL_LM", TASKS)
    made.zero_grad()
    surgery.begin(step, counts, [counts])
    surgery.enter(0)
    inputs = {n: v for n, v in whole.items() if n != "labels"}
    with surgery.gradients:
        weights = surgery.loss_weights(torch.ones(TASKS).double())
        step_loss(made(**inputs).logits, whole, counts, weights, task_type="CAUSAL_LM")[0].backward()
    surgery.finish()
    return {n: p.grad.clone() for n, p in surgery.gradients.scope.shared.items()}


def test_weights_used_again_are_each_tasks_own_whatever_rows_were_shared():
    surgery = surgery_alone(method="random", max_tasks=2, refresh_every=2)
    one_step(surgery, 2)  # all four tasks; step 3 draws other groups
    (kept,) = surgery._kept.values()
    whole = rows(0)
    found = one_step(surgery, 3, whole)
    plain = surgery_alone(method="sum")
    total = (whole["labels"][:, 1:] != -100).sum()
    expected = {n: torch.zeros_like(g) for n, g in found.items()}
    for task in kept:
        own = {n: v[whole["task_ids"] == task] for n, v in whole.items()}
        n_own = (own["labels"][:, 1:] != -100).sum()
        for n, g in one_step(plain, 0, own).items():
            expected[n] += kept[task] * g * n_own / total
    assert worst(found, expected) <= 1e-6


def test_the_weight_told_is_that_of_every_step():
    surgery = surgery_alone(method="random", refresh_every=3)
    for step in range(2):
        one_step(surgery, step, rows(0))
    metrics, _ = surgery.report(2)
    (kept,) = surgery._kept.values()
    assert metrics["train/weight/task-0"] == pytest.approx(kept[0])
    one_step(surgery, 2, rows(0))
    assert surgery.report(3)[0]["train/weight/task-0"] == kept[0]


def test_a_method_must_fit_the_tasks():
    with pytest.raises(ConfigError, match=r"surgery.max_tasks: 3, but there are 4 tasks, and 'gradvac'"):
        surgery_alone(method="gradvac", max_tasks=3)
    with pytest.raises(ConfigError, match=r"surgery.options.weights: 3 weights for 4 tasks"):
        surgery_alone(method="fixed", options={"weights": [1.0] * 3})


@pytest.mark.parametrize("way", ["fused", "separate", "slices"])
def test_a_step_without_a_target_moves_nothing(way):
    surgery = surgery_alone(method="random", way=way, refresh_every=2, matrix_steps=1)
    for step in range(2):
        found = one_step(surgery, step, without_targets(rows(0), list(range(TASKS))))
        assert all(g.isfinite().all() and not g.any() for g in found.values())
        assert surgery.one_pass and not surgery._kept
    if way == "fused":
        assert any(g.any() for g in one_step(surgery, 2, rows(0)).values())
        assert set(surgery._kept["all"]) == set(range(TASKS))


def test_a_task_without_a_target_has_no_row():
    surgery = surgery_alone(method="pcgrad")
    whole = rows(0)
    found = one_step(surgery, 0, without_targets(whole, [3]))
    kept = whole["task_ids"] != 3
    again = one_step(surgery_alone(method="pcgrad"), 0, {n: v[kept] for n, v in whole.items()})
    assert worst(found, again) <= 1e-6


def test_surgery_goes_on_with_the_same_settings_alone():
    state = surgery_alone(method="pcgrad").state_dict()
    surgery_alone(method="pcgrad", options={}).load_state_dict(state)
    for changed, message in (
        ({"scope": "experts"}, r"surgery.scope: the checkpoint has 'all', this run 'experts'"),
        ({"options": {"reduction": "mean"}}, r"surgery.options: the checkpoint has {}, this run {'reduction"),
    ):
        with pytest.raises(ConfigError, match=message):
            surgery_alone(method="pcgrad", **changed).load_state_dict(state)


def test_weights_of_tasks_appended_since_may_be_given():
    now = surgery_alone(method="fixed", options={"weights": [1.0, 2.0, 3.0, 4.0]})
    state = now.state_dict()
    now.load_state_dict({**state, "options": {"weights": [1.0, 2.0, 3.0]}})
    with pytest.raises(ConfigError, match=r"surgery.options: the checkpoint has .* this run"):
        now.load_state_dict({**state, "options": {"weights": [1.0, 3.0]}})
