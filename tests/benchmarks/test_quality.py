from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from taskmoe.train.metrics import resolve

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = """# A tiny encoder
model: {type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64,
        max_position_embeddings: 32}
task_type: SEQ_CLS
pooling: mean
moe: {r: 2, num_experts: 4, router: task_table, router_init_std: 1.0}
data: {max_length: 16}
mixing: {strategy: equal}
max_steps: 3
per_device_train_batch_size: 4
learning_rate: 0.01
evaluation:
  metrics: {"stance_*": "f1:yes,no", "mood": macro_recall}
  groups: {stance: "stance_*"}
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("bootstrap", "arms", "quality")
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    return SimpleNamespace(**modules)


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    """A config and two stance tasks and a mood task of eight rows."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY, encoding="utf-8")
    words = {"stance_a": ("yes", "no", "none"), "stance_b": ("yes", "no", "none"), "mood": ("good", "bad")}
    for task, labels in words.items():
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        cycle = [labels[i % len(labels)] for i in range(12)]
        rows = [json.dumps({"text": f"this is {label} {i}", "label": label}) for i, label in enumerate(cycle)]
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    common = {"data.root": str(tmp_path / "data"), "data.cache_dir": str(tmp_path / "cache")}
    return SimpleNamespace(config=config, common=common, out=tmp_path / "out")


@pytest.mark.parametrize("metric", ["macro_f1", "macro_recall", "f1:b", "f1:a,c", "accuracy"])
def test_resampled_metric_is_the_metric_of_the_resample(parts: Any, metric: str) -> None:
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    rows = [{"target": str(label)} for label in random.choice(labels, 40)]
    predictions = [str(label) for label in random.choice([*labels, "none of them"], 40)]
    task = parts.bootstrap.Scored(rows, metric, labels, "t")
    picks = parts.bootstrap.draws({"t": 40}, 5)["t"]
    found = parts.bootstrap.resampled(task, predictions, picks)
    wanted = [resolve(metric, labels)([predictions[i] for i in p], [rows[i] for i in p]) for p in picks]
    assert found == pytest.approx(wanted)
    assert len({round(float(value), 6) for value in found}) > 1


def test_metric_with_alternatives(parts: Any) -> None:
    rows = [{"target": "a", "accepted": ["a", "b"]}, {"target": "c"}]
    task = parts.bootstrap.Scored(rows, "exact_match", None, "t")
    found = parts.bootstrap.resampled(task, ["b", "x"], np.array([[0, 0], [0, 1], [1, 1]]))
    assert found.tolist() == [1.0, 0.5, 0.0]


def test_comparison_is_paired_averages_seeds_and_groups(parts: Any) -> None:
    rows = [{"target": "a"} for _ in range(100)]
    tasks = {name: parts.bootstrap.Scored(rows, "accuracy", ["a", "b"], group)
             for name, group in (("s1", "s"), ("s2", "s"), ("m", "m"))}  # fmt: skip
    right = ["a"] * 50 + ["b"] * 50
    better = ["a"] * 51 + ["b"] * 49
    worse = dict.fromkeys(tasks, right)
    ahead = {**worse, "m": better}
    found = parts.bootstrap.compare(tasks, {"x": [ahead, ahead], "y": [worse]}, resamples=400)
    assert found["arms"]["x"]["score"] == pytest.approx((0.5 + 0.51) / 2)
    difference = found["differences"]["x - y"]
    assert difference["score"] == pytest.approx(0.005)
    # Unpaired, both would move by 5 points; paired, only the one example counts, never against x.
    assert 0 <= difference["interval"][0] <= difference["interval"][1] <= 0.02
    low, high = found["arms"]["y"]["interval"]
    assert 0.4 < low < 0.47 and 0.53 < high < 0.6
    assert difference["tasks"]["s1"]["interval"] == [0.0, 0.0]


def test_same_predictions_show_no_difference(parts: Any) -> None:
    assert parts.quality.verdict([-0.1, 0.2]) == parts.quality.verdict([0.0, 0.0]) == "no difference shown"
    assert parts.quality.verdict([0.1, 0.2]) == "higher"
    assert parts.quality.verdict([-0.2, -0.1]) == "lower"


def test_arms_have_equal_parameter_counts(parts: Any, tiny: Any) -> None:
    bench = parts.arms.Bench(tiny.config, tiny.common, tiny.out)
    arms = {
        "experts": parts.arms.Arm("experts"),
        "lora": parts.arms.Arm("lora", parts.quality.PLAIN_LORA, fit_r="experts"),
    }
    data = bench.data(bench.load({}))
    settings = parts.arms.fitted(bench, arms, "lora", data)
    ours, theirs = (parts.arms.trainable(bench, s, data) for s in ({}, settings))
    assert settings["moe.r"] == 8
    assert "router" in ours and "router" not in theirs
    assert ours["heads"] == theirs["heads"] > 0
    assert parts.arms.bank_size(theirs) == pytest.approx(parts.arms.bank_size(ours), rel=0.02)


def test_runs_are_chosen_compared_and_used_again(
    parts: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = parts.arms.Arm(
        "lora", parts.quality.PLAIN_LORA, ({"learning_rate": 1e-3}, {"learning_rate": 1e-2}), fit_r="experts"
    )
    suite = parts.quality.Suite(str(tiny.config), {"experts": parts.arms.Arm("experts"), "lora": lora})
    bench = parts.arms.Bench(tiny.config, tiny.common, tiny.out)
    result = parts.quality.measure(suite, bench, [0, 1], 50)
    found = result["arms"]["lora"]
    best = max(found["tried"], key=lambda one: one["score"])
    assert found["settings"]["learning_rate"] == best["choice"]["learning_rate"]
    assert len(found["tried"]) == 2 and len(found["seed_scores"]) == 2
    assert found["rows"] == 12 and result["differences"]["experts - lora"]
    runs = sorted(path.parent.name for path in tiny.out.rglob("quality.json"))
    assert runs[:2] == ["experts-seed0", "experts-seed1"] and len(runs) == 5
    json.dumps(result)
    parts.quality.print_table(result)

    def no_training(config: Any) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(parts.arms, "train", no_training)
    again = parts.quality.measure(suite, bench, [0, 1], 50)
    assert again["arms"]["lora"]["seed_scores"] == found["seed_scores"]
    with pytest.raises(AssertionError, match="trained again"):
        parts.arms.run(bench, "experts", {"learning_rate": 0.5}, 0)
