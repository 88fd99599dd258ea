"""``bf16: true``: frozen weights in bf16; what trains, its gradients and the optimiser's state in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import TaskMoEConfig
from taskmoe.train import loop
from taskmoe.train.config import (
    Config,
    ConfigError,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
)
from taskmoe.train.config_checks import validate

GYM = SkillGymConfig(
    num_tasks=2, num_skills=3, train_rows=32, validation_rows=2, test_rows=2, alphabet_size=8
)
LLAMA = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
T5 = {"type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
# A linear, a norm and an embedding: autocast treats each in another way.
CASES = {
    "llama": (LLAMA, "CAUSAL_LM", None),
    "llama saved": (LLAMA, "CAUSAL_LM", ("lm_head", "model.norm", "embed_tokens")),
    "t5": (T5, "SEQ_2_SEQ_LM", None),
    "t5 saved": (T5, "SEQ_2_SEQ_LM", ("lm_head", "decoder.final_layer_norm")),
}


def make(folder: Path, case: str, **settings: Any) -> Config:
    model, task_type, saved = CASES[case]
    values: dict[str, Any] = {
        "model": model,
        "task_type": task_type,
        "tokenizer": TokenizerConfig(kind="wordlevel", vocab_size=32),
        "moe": TaskMoEConfig(r=2, num_experts=3, modules_to_save=saved),
        "data": DataConfig(skill_gym=GYM, max_length=24),
        "mixing": MixingConfig(strategy="equal"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "bf16": True,
        "logging_steps": 1,
        "output_dir": str(folder / "run"),
        "report_to": (),
        **settings,
    }
    return Config(**values)


def zero(folder: Path, stage: int) -> str:
    section: dict[str, int] = {"stage": stage}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0  # every tensor is partitioned
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    return str(path)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """After every step: dtypes of parameters and optimiser state, and before it those of gradients."""
    steps: list[dict[str, Any]] = []
    step = loop.Run._step
    update = loop.Engine.step

    def watched_update(self: Any, rates: Any) -> Any:
        from deepspeed.utils import safe_get_full_grad

        found = {n: safe_get_full_grad(p) for n, p in self.parameters.items()}
        steps.append({"gradients": {n: None if g is None else g.dtype for n, g in found.items()},
                      "zero": [n for n, g in found.items() if g is not None and not g.any()]})  # fmt: skip
        return update(self, rates)

    def watched_step(self: Any, phase: Any) -> Any:
        result = step(self, phase)
        groups = self.model.parameter_groups()
        steps[-1]["frozen"] = {n: p.dtype for _, ps in groups.items() for n, p in ps if not p.requires_grad}
        steps[-1]["trained"] = {n: p.dtype for _, ps in groups.items() for n, p in ps if p.requires_grad}
        states = self.engine.optimizer.state.values()
        steps[-1]["optimiser"] = {
            v.dtype for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.dim() > 0
        }
        return result

    monkeypatch.setattr(loop.Run, "_step", watched_step)
    monkeypatch.setattr(loop.Engine, "step", watched_update)
    return steps


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        ("llama", 0),
        ("llama", 3),
        ("t5", 2),
        ("llama saved", 0),
        ("llama saved", 3),
        ("t5 saved", 0),
        ("t5 saved", 2),
    ],
)
def test_frozen_weights_are_bf16_and_what_trains_is_fp32(
    tmp_path: Path, seen: list[dict[str, Any]], case: str, stage: int
) -> None:
    assert loop.train(make(tmp_path, case, deepspeed=zero(tmp_path, stage))) == 0
    assert len(seen) == 2
    for step in seen:
        assert set(step["frozen"].values()) == {torch.bfloat16}
        assert set(step["trained"].values()) == {torch.float32}
        assert set(step["gradients"].values()) == {torch.float32}  # and none is missing
        assert step["optimiser"] == {torch.float32}
    assert seen[1]["zero"] == []  # at step 1 B is zero, so A and the gates get nothing
    saved = [n for n in seen[1]["trained"] if ".saved." in n]
    assert len(saved) == len(CASES[case][2] or ())
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_gradient_checkpointing_and_a_task_embedding(tmp_path: Path, seen: list[dict[str, Any]]) -> None:
    moe = TaskMoEConfig(r=1, num_experts=4, router="task_mlp", modules_to_save=("lm_head",))
    assert loop.train(make(tmp_path, "llama", moe=moe, gradient_checkpointing=True)) == 0
    assert set(seen[1]["gradients"].values()) == {torch.float32} and seen[1]["zero"] == []


def test_heads_on_an_encoder(tmp_path: Path, seen: list[dict[str, Any]]) -> None:
    for task in ("a", "b"):
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = [{"text": "x y" if i % 2 else "z", "label": str(i % 2)} for i in range(8)]
        (tmp_path / "data" / task / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bert = {"type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    config = make(tmp_path, "llama", model=bert, task_type="SEQ_CLS", pooling="mean",
                  data=DataConfig(root=str(tmp_path / "data"), max_length=16))  # fmt: skip
    assert loop.train(config) == 0
    heads = [n for n in seen[1]["trained"] if n.endswith(("weight_TNK", "bias_TN"))]
    assert len(heads) == 2
    assert set(seen[1]["gradients"].values()) == {torch.float32}
    assert set(seen[1]["frozen"].values()) == {torch.bfloat16}


def test_a_saved_module_gives_what_its_original_gives(tmp_path: Path) -> None:
    """At step 0, in bf16: a rounded copy and not another model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from taskmoe.moe import attach

    shape = {k: v for k, v in LLAMA.items() if k != "type"}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **shape), dtype=torch.bfloat16)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = base.eval()(input_ids=ids).logits
    saved = ("lm_head", "embed_tokens")
    model = attach(base, TaskMoEConfig(r=1, num_experts=2, modules_to_save=saved), ["a", "b"]).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, task_ids=torch.tensor([0, 1])).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected)


def test_bf16_has_no_effect_where_the_base_trains(tmp_path: Path) -> None:
    phases = (PhaseConfig(name="base", steps=1, train=("base",), adapters=False), PhaseConfig())
    config = make(tmp_path, "llama", phases=phases)
    with pytest.raises(ConfigError, match="bf16: has no effect: a phase trains the base"):
        validate(config)
