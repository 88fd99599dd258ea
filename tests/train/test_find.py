"""Evaluation of encoders: each query among its task's texts, against one text at a time; runs of a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taskmoe.train.config import Config, ConfigError, ContrastiveConfig
from taskmoe.train.config_checks import validate
from taskmoe.train.config_io import load
from taskmoe.train.distributed import Ranks
from taskmoe.train.evaluate import evaluate
from taskmoe.train.loop import train
from taskmoe.train.setup import build_data, build_moe

ALONE = Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)
CONFIG = """\
model: {type: bert, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
        hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
tokenizer: {kind: char, vocab_size: 64}
task_type: FEATURE_EXTRACTION
pooling: mean
moe: {bank: module, bank_options: {of: ffn}, num_experts: 2, router_init_std: 1.0}
datasets:
  - {name: double, path: double.jsonl, validation_path: double.jsonl}
  - {name: mirror, path: mirror.jsonl, validation_path: mirror.jsonl}
data: {max_length: 16, max_target_length: 16, cache_dir: cache}
mixing: {strategy: equal}
phases: [{train: [base, experts, router]}]
output_dir: run
max_steps: 30
per_device_train_batch_size: 12
per_device_eval_batch_size: 5
learning_rate: 0.01
logging_steps: 5
report_to: [none]
"""
LETTERS = "abcdefgh"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks: a letter to that letter twice, two letters to the two in the other order; one text twice."""
    monkeypatch.chdir(tmp_path)
    wrong = {c: [c + LETTERS[i - 1]] for i, c in enumerate(LETTERS)}
    double = [{"query": c, "positive": 2 * c, "negatives": wrong[c]} for c in LETTERS]
    mirror = [{"query": a + b, "positive": b + a} for a, b in zip(LETTERS, LETTERS[2:], strict=False)]
    mirror.append({"query": "xy", "positive": "ca"})
    for name, rows in (("double", double), ("mirror", mirror)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def build(config: Config):
    data = build_data(config, ALONE, ("train", "validation"), None, None, lambda line: None)
    model = build_moe(config, data.tokenizer, data.bundle.tasks, ALONE)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in model.parameter_groups()["experts"]:
            p.add_(torch.randn_like(p) * 0.3)
    return data, model


def score(config: Config, data, model):
    splits = data.bundle.splits["validation"]
    return evaluate(model, splits, data.tokenizer, config, data.collator, ALONE, return_predictions=True)


def test_what_is_found_is_the_nearest_text_of_the_task(folder):
    config = load("config.yaml")
    data, model = build(config)
    found = score(config, data, model)
    model.eval()
    for task, split in enumerate(data.bundle.splits["validation"]):
        name = data.bundle.tasks[task].name

        @torch.no_grad()
        def vector(ids, task=task):
            ids = torch.tensor([ids])
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[task]).logits[0]

        rows = list(zip(split.tokens, split.raw, strict=True))
        texts = {raw["target"]: vector(row["labels"]) for row, raw in rows}
        hits, reciprocal = [], []
        for place, (row, raw) in enumerate(rows):
            query = vector(row["input_ids"])
            scores = {text: float(query @ v) for text, v in texts.items()}
            best = max(scores, key=scores.get)
            assert found["predictions"][name][place] == best
            hits.append(best == raw["target"])
            reciprocal.append(1 / sum(s >= scores[raw["target"]] for s in scores.values()))
        assert found["tasks"][name]["exact_match"] == pytest.approx(sum(hits) / len(hits))
        assert found["tasks"][name]["mrr"] == pytest.approx(sum(reciprocal) / len(reciprocal))
    assert found["macro"]["mrr"] > 0


def test_what_is_found_does_not_depend_on_the_batch(folder):
    config = load("config.yaml")
    data, model = build(config)
    one = score(config, data, model)
    other = score(replace(config, per_device_eval_batch_size=2), data, model)
    assert one["predictions"] == other["predictions"]
    assert one["macro"]["mrr"] == other["macro"]["mrr"]
    assert one["macro"]["loss"] != other["macro"]["loss"]  # that of training


def test_cosines_over_the_temperature(folder):
    config = load("config.yaml")
    _, model = build(replace(config, contrastive=ContrastiveConfig("cosine", 0.25)))
    ids = torch.tensor([[5, 6, 7]])
    vector = model(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[0]).logits[0]
    assert float((vector @ vector).detach()) == pytest.approx(1 / 0.25)


def test_a_run_trains_scores_and_comes_back(folder):
    assert train(load("config.yaml")) == 0
    rows = [json.loads(line) for line in (folder / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    scores = [row for row in rows if "eval/macro/mrr" in row]
    assert scores[-1]["eval/macro/mrr"] > 0.5
    assert train(load("config.yaml", ["--max_steps=35", "--resume_from_checkpoint=true"])) == 0


def test_micro_batches_in_a_row_and_on_two_ranks_are_one_step(folder, spawn_ranks):
    one = load("config.yaml", ["--per_device_train_batch_size=6", "--gradient_accumulation_steps=2",
                               "--max_steps=3", f"--output_dir={folder / 'one'}", "--logging_steps=1",
                               f"--data.cache_dir={folder / 'cache'}", "--optim=sgd"])  # fmt: skip
    assert train(one) == 0
    two = replace(one, gradient_accumulation_steps=1, output_dir=str(folder / "two"))
    spawn_ranks(run_on_a_rank, config=two, folder=str(folder))
    losses = []
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (folder / name / "trainer_log.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def run_on_a_rank(config: Config, folder: str) -> int:
    import os

    os.chdir(folder)
    return train(config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("contrastive: {similarity: l2}", "contrastive.similarity: 'l2' is not one of cosine, dot"),
        ("contrastive: {temperature: 0}", "contrastive.temperature: 0.0 is out of range"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor: has no effect: task_type is"),
        ("evaluation: {num_beams: 2}", "evaluation.num_beams: has no effect: task_type is"),
    ],
)
def test_settings_that_cannot_be_used(folder, line, message):
    (folder / "config.yaml").write_text(f"{CONFIG}{line}\n")
    with pytest.raises(ConfigError) as error:
        load("config.yaml")
    assert message in str(error.value)


def test_contrastive_settings_need_the_task_type(folder):
    config = load("config.yaml")
    with pytest.raises(ConfigError, match=r"contrastive.*has no effect: task_type is 'CAUSAL_LM'"):
        validate(replace(config, task_type="CAUSAL_LM", pooling="model", model={"type": "llama"},
                         contrastive=ContrastiveConfig("dot")))  # fmt: skip
