"""Two stages (Ye, Zha, Ren 2022): routes are learned, then experts start anew while the temperature falls."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train.config import (
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
)
from taskmoe.train.loop import Run, train
from taskmoe.train.weights import fresh_weights, start_anew

STAGES = (
    PhaseConfig(name="routes", steps=4, train=("experts", "router", "task_embedding")),
    PhaseConfig(
        name="experts",
        train=("experts",),
        reinit=("experts",),
        router_temperature=(300.0, 1.0),
        router_temperature_schedule="exponential",
        gate="softmax",
        restart_schedule=True,
    ),
)
CONFIG = Config(
    model={"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2},
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(
        r=2, num_experts=3, router="task_mlp", router_scope="layer", gate="gumbel_one_hot", lora_dropout=0.2
    ),
    data=DataConfig(
        skill_gym=SkillGymConfig(num_tasks=3, num_skills=4, train_rows=32, validation_rows=2, test_rows=2,
                                 min_string_length=2, max_string_length=4, alphabet_size=8),
        max_length=16,
    ),
    mixing=MixingConfig(strategy="equal"),
    max_steps=8,
    per_device_train_batch_size=6,
    gradient_accumulation_steps=2,
    warmup_ratio=0.0,
    phases=STAGES,
    save_steps=2,
    save_total_limit=0,
    report_to=(),
)  # fmt: skip


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")


def test_experts_start_anew_and_what_the_first_stage_learned_of_routes_stays(tmp_path, monkeypatch):
    seen = []
    step = Run._step

    def noted(self, phase):
        out = step(self, phase)
        seen.append(self.model.routing.temperature)
        gates = self.model.routing(torch.arange(3))[0]
        assert bool(((gates == 0) | (gates == 1)).all()) == (phase.index == 0), "one-hot, then softmax"
        return out

    monkeypatch.setattr(Run, "_step", noted)
    still = replace(STAGES[1], learning_rate=0.0)  # so that its start can be seen
    config = replace(CONFIG, phases=(STAGES[0], still), output_dir=str(tmp_path / "run"))
    assert train(config) == 0
    never = replace(CONFIG, phases=(PhaseConfig(learning_rate=0.0, router_learning_rate=0.0),), max_steps=2)
    assert train(replace(never, output_dir=str(tmp_path / "start"))) == 0
    start = weights(tmp_path / "start", 2)
    middle, end = (weights(tmp_path / "run", n) for n in (4, 8))
    for name in start:
        assert not torch.equal(middle[name], start[name]), f"{name} did not move in the first stage"
        kept = middle if name.startswith("routing.") else start
        assert torch.equal(end[name], kept[name]), name
    assert seen[:4] == [1.0] * 4
    assert seen[4] == 300.0 and abs(seen[7] - 1) < 1e-9
    assert abs(seen[5] / seen[4] - seen[6] / seen[5]) < 1e-9, "the same factor each step"


def test_resumed_equals_uninterrupted_within_a_stage_and_between(tmp_path):
    assert train(replace(CONFIG, output_dir=str(tmp_path / "whole"))) == 0
    for stop in (2, 4, 6):
        half = tmp_path / f"half-{stop}"
        shutil.copytree(tmp_path / "whole", half)
        for later in half.glob("checkpoint-*"):  # as if the run had died after `stop`
            if int(later.name.split("-")[1]) > stop:
                shutil.rmtree(later)
        assert train(replace(CONFIG, output_dir=str(half), resume_from_checkpoint="true")) == 0
        expected, found = weights(tmp_path / "whole", 8), weights(half, 8)
        assert all(torch.equal(found[n], expected[n]) for n in expected), stop


def run_all(configs: list[Config]) -> list[int]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return [train(config) for config in configs]


def test_two_ranks_draw_the_same_routes_and_start_anew_alike(spawn_ranks, tmp_path):
    text = {"representation": "text", "representation_options": {"targets": True}}
    config = replace(
        CONFIG,
        moe=replace(CONFIG.moe, lora_dropout=0.0, **text),
        phases=(replace(STAGES[0], train=("base", "experts", "router")), STAGES[1]),
        optim="sgd",
        learning_rate=0.1,
        router_learning_rate=0.1,
    )
    assert train(replace(config, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4)) == 0
    pair = []
    for stage in (2, 3):
        settings = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": settings}))
        pair.append(replace(config, output_dir=str(tmp_path / f"two-{stage}"), deepspeed=str(path)))
    assert spawn_ranks(run_all, configs=pair, timeout_s=240) == [[0, 0]] * 2
    expected, start = weights(tmp_path / "one", 8), weights(tmp_path / "one", 4)
    moved = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    for stage in (2, 3):
        found = weights(tmp_path / f"two-{stage}", 8)
        assert found.keys() == expected.keys()
        off = max(float((found[n] - expected[n]).abs().max()) for n in expected)
        assert off <= 1e-6 < 1e-2 * moved, f"ZeRO {stage}"


def test_copies_of_modules_start_from_the_base_as_it_is_now():
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    moe = TaskMoEConfig(num_experts=2, bank="module", bank_options={"of": "ffn"}, router_scope="layer")
    model = attach(LlamaForCausalLM(llama), moe, 2)
    fresh = fresh_weights(model, ["experts"])
    assert fresh and all(n in fresh for n, _ in model.parameter_groups()["experts"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = {n: p.detach().clone() for n, p in model.named_parameters() if n not in fresh}
    start_anew(model, fresh, ["experts"])
    own = dict(model.named_parameters())
    assert all(torch.equal(own[n], value) for n, value in moved.items())
    layer = model.base_model.model.layers[1].mlp
    for e in range(2):
        for name, value in layer.stack.expert(e).items():
            assert torch.equal(value, layer.original.get_parameter(name))


@pytest.mark.parametrize(
    ("router", "options", "buffer", "anew"),
    [("ranks", {"top_k": 2}, "bias_E", True), ("token_cluster", {"dim": 5}, "centroids_ED", False)],
)
def test_what_a_router_has_counted_starts_anew_and_what_it_was_given_stays(router, options, buffer, anew):
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    moe = TaskMoEConfig(r=1, num_experts=4, router=router, gate="raw", router_options=options)
    model = attach(LlamaForCausalLM(llama), moe, 2)
    fresh, experts = fresh_weights(model, ["router"]), fresh_weights(model, ["experts"])
    moved = {n: b for n, b in model.named_buffers() if n.endswith(buffer)}
    assert moved
    for b in moved.values():
        b.fill_(3.0)
    start_anew(model, experts, ["experts"])
    assert all((b == 3.0).all() for b in moved.values())
    start_anew(model, fresh, ["router"])
    assert all(torch.equal(b, torch.full_like(b, 0.0 if anew else 3.0)) for b in moved.values())
