"""Regularisers in whole runs: logged, resumed bit for bit, silent where nothing of theirs trains."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
)
from taskmoe.train.loop import train

GYM = SkillGymConfig(num_tasks=4, num_skills=4, train_rows=64, validation_rows=6, test_rows=4,
                     alphabet_size=8, min_string_length=2, max_string_length=4)  # fmt: skip
WINDOW = {"window_balance": {"weight": 0.1, "decay": 0.8}, "z_loss": 0.01, "orthogonality": 0.1}
BASE = Config(
    model={"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2},
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(r=2, num_experts=3, gate="gumbel", router_init_std=1.0, regularisers=WINDOW),
    data=DataConfig(skill_gym=GYM, max_length=16),
    mixing=MixingConfig(strategy="equal"),
    max_steps=12,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    router_learning_rate=1e-1,
    warmup_ratio=0.0,
    phases=(PhaseConfig(name="base", steps=4, train=("base",), adapters=False),
            PhaseConfig(name="experts", train=("experts", "router"))),
    logging_steps=2,
    save_steps=4,
    save_total_limit=0,
    report_to=(),
)  # fmt: skip


def logged(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    found = [r for r in rows if any(k.startswith("regulariser/") for k in r)]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("regulariser/")} for r in found}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-12" / "adapter_model.safetensors")


def test_a_resumed_run_goes_on_with_its_window(tmp_path):
    whole = replace(BASE, output_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    seen = logged(tmp_path / "whole")
    assert sorted(seen) == [6, 8, 10, 12]  # not while the base trains alone
    assert all(row.keys() == {f"regulariser/{n}" for n in WINDOW} for row in seen.values())
    window = torch.load(tmp_path / "whole" / "checkpoint-12" / "regularisers.pt", weights_only=True)
    assert sorted(window["window_balance"]) == ["0", "1", "2", "3"]

    half = replace(BASE, output_dir=str(tmp_path / "half"))
    assert train(half) == 0
    shutil.rmtree(tmp_path / "half" / "checkpoint-12")
    assert train(replace(half, resume_from_checkpoint="true")) == 0
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert logged(tmp_path / "half") == seen

    plain = replace(BASE, moe=replace(BASE.moe, regularisers=None), output_dir=str(tmp_path / "plain"))
    assert train(plain) == 0
    assert any(not torch.equal(expected[n], t) for n, t in weights(tmp_path / "plain").items())


def test_alignment_lowers_the_divergence_it_is_given(tmp_path):
    """Against a weight that is next to nothing."""
    found = []
    for weight in (1e-9, 0.1):
        moe = TaskMoEConfig(r=4, num_experts=1, router="none", gate="uniform",
                            regularisers={"alignment": weight})  # fmt: skip
        run = replace(
            BASE,
            moe=moe,
            max_steps=24,
            save_steps=None,
            router_learning_rate=None,
            gradient_checkpointing=True,
            output_dir=str(tmp_path / str(weight)),
            phases=(PhaseConfig(name="experts", train=("experts",)),),
        )
        assert train(run) == 0
        found.append(logged(tmp_path / str(weight))[24]["regulariser/alignment"])
    assert found[1] < 0.9 * found[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
def test_imported_loras_are_mixed_by_a_router_that_trains(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {n: v for n, v in BASE.model.items() if n != "type"}
    for name, rank in (("one", 2), ("two", 3)):
        lora = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **own)), lora)
        wrapped.save_pretrained(tmp_path / name)
    options = {"adapters": (str(tmp_path / "one"), str(tmp_path / "two"))}
    moe = TaskMoEConfig(bank="imported", bank_options=options, num_experts=2, gate="softmax")
    run = replace(
        BASE,
        moe=moe,
        output_dir=str(tmp_path / "run"),
        phases=(PhaseConfig(name="route", train=("base", "router")),),
    )
    assert train(run) == 0
    first = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    state = weights(tmp_path / "run")
    moved = {n for n, t in state.items() if not torch.equal(t, first[n])}
    assert moved == {"routing.router.logits_STHE"}
    assert any(n.endswith("A_ErK") and t.shape[:2] == (2, 3) for n, t in state.items())
