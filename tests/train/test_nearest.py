"""Added tasks start at the known task that serves their first rows best, and a run finds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.train import nearest
from taskmoe.train.config import Config, DataConfig, MixingConfig, PhaseConfig, TokenizerConfig
from taskmoe.train.config_io import load
from taskmoe.train.loop import train

BASE = Config(
    model={
        "type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(r=2, num_experts=3, router_init_std=1.0, new_task_rows="nearest"),
    mixing=MixingConfig(strategy="equal"),
    max_steps=30,
    per_device_train_batch_size=8,
    learning_rate=2e-2,
    warmup_ratio=0.0,
    phases=(PhaseConfig(train=("base", "experts", "router")),),
    report_to="none",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path):
    """name, answer -> a task whose prompts are those of every other, and whose answer is always the same."""

    def write(name: str, answer: str) -> None:
        (tmp_path / "data" / name).mkdir(parents=True)
        lines = [json.dumps({"input": f"w{i % 5}", "output": answer}) for i in range(12)]
        for split in ("train", "validation"):
            (tmp_path / "data" / name / f"{split}.jsonl").write_text("\n".join(lines))

    return write


@pytest.mark.parametrize(("answer", "expected"), [("no", "berry"), ("yes", "apple")])
def test_a_run_starts_an_added_task_where_its_rows_cost_least(
    answer, expected, folder, tmp_path, monkeypatch, capsys
):
    folder("apple", "yes")
    folder("berry", "no")
    data = DataConfig(root=str(tmp_path / "data"), max_length=16, cache_dir=str(tmp_path / "cache"))
    config = replace(BASE, data=data, output_dir=str(tmp_path / "run"))
    assert train(config) == 0
    found = []
    start_from = nearest.start_from

    def noted(model, seen):
        written = start_from(model, seen)
        assert len(written) == 1
        logits = model.get_parameter(written[0]).detach().clone()
        found.append((dict(seen), logits))
        return written

    monkeypatch.setattr(nearest, "start_from", noted)
    folder("citrus", answer)
    assert train(replace(config, max_steps=31, resume_from_checkpoint="true")) == 0
    [(seen, logits_STHE)] = found
    assert seen == {"citrus": expected}
    place = {"apple": 0, "berry": 1}[expected]
    assert torch.equal(logits_STHE[:, 2], logits_STHE[:, place])
    saved = load_file(tmp_path / "run" / "checkpoint-30" / "adapter_model.safetensors")
    assert torch.equal(logits_STHE[:, :2], saved["routing.router.logits_STHE"])
    assert f"new task citrus starts from {expected} (loss " in capsys.readouterr().out
    assert train(replace(config, max_steps=32, resume_from_checkpoint="true")) == 0
    assert len(found) == 1, "the task is known now"


def test_class_labels_have_no_common_loss(tmp_path):
    given = ["--task_type=SEQ_CLS", "--moe.new_task_rows=nearest"]
    with pytest.raises(ConfigError, match=r"moe\.new_task_rows: 'nearest' compares losses"):
        load(Path(__file__).parents[2] / "configs" / "tweeteval_minilm.yaml", given)
