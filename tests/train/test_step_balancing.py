"""Weights of losses in the loop: by hand, on two ranks, resumed, and every method from its YAML."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskTable
from taskmoe.train import distributed
from taskmoe.train.balancing.balancer import BALANCERS
from taskmoe.train.balancing.base import BalancingError
from taskmoe.train.balancing.learned import FAMO
from taskmoe.train.balancing.static import Random
from taskmoe.train.config import (
    BalancingConfig,
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    SurgeryConfig,
    TokenizerConfig,
)
from taskmoe.train.config_idle import ineffective
from taskmoe.train.config_io import load
from taskmoe.train.loop import train
from taskmoe.train.setup import build_data, build_moe
from taskmoe.train.step_balancing import STATE, ValidationRows, build_balancing
from taskmoe.train.surgery import through_torchjd
from taskmoe.train.surgery.combine import METHODS
from taskmoe.train.surgery.direct import DIRECT
from taskmoe.train.track.log import read_log

GYM = SkillGymConfig(num_tasks=3, num_skills=3, train_rows=40, validation_rows=5, test_rows=3,
                     min_string_length=2, max_string_length=4, alphabet_size=8)  # fmt: skip
LLAMA = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
BASE = Config(
    model=LLAMA,
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(r=2, num_experts=2, lora_dropout=0.1),
    data=DataConfig(skill_gym=GYM, max_length=16),
    mixing=MixingConfig(strategy="equal"),
    evaluation=replace(Config().evaluation, max_rows=1, max_new_tokens=2),
    max_steps=8,
    per_device_train_batch_size=6,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    warmup_ratio=0.0,
    logging_steps=2,
    report_to=(),
)
# Small windows, so that every method has something to say within a few steps.
QUICK: dict[str, BalancingConfig] = {
    "fixed": BalancingConfig("fixed", {"weights": [0.5, 1.0, 2.0]}),
    "random": BalancingConfig("random"),
    "uncertainty": BalancingConfig("uncertainty", {"lr": 0.1}),
    "dwa": BalancingConfig("dwa", {"window": 1, "temperature": 0.1}),
    "coba": BalancingConfig("coba", {"warmup": 2, "history": 4}, validation_rows=2),
    "famo": BalancingConfig("famo", {"lr": 0.2}),
}


def run_of(folder: Path, balancing: BalancingConfig, **changes: Any) -> Config:
    return replace(BASE, balancing=balancing, output_dir=str(folder), **changes)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")


def untimed(run: Path) -> list[dict[str, Any]]:
    lines = read_log(run / "trainer_log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines]


def test_every_method_of_the_registry_is_here() -> None:
    assert list(QUICK) == list(BALANCERS)
    for name, kind in BALANCERS.items():
        idle = ineffective(replace(BASE, balancing=BalancingConfig(name)))
        assert ("balancing.validation_rows" in idle) is not kind.needs_validation


def first_update(folder: Path, balancing: BalancingConfig, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights after one step of SGD, less those of a step of rate 0."""
    plain = {"moe": replace(BASE.moe, lora_dropout=0.0), "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    moved = run_of(folder / "moved", balancing, **plain, **changes)
    still = replace(moved, output_dir=str(folder / "still"), learning_rate=0.0, router_learning_rate=0.0)
    assert train(moved) == train(still) == 0
    after, before = weights(folder / "moved", 1), weights(folder / "still", 1)
    return {n: (after[n] - before[n]).double() for n in after}


def test_the_update_is_the_weighted_sum_of_the_tasks_updates(tmp_path) -> None:
    def fixed(*given: float) -> BalancingConfig:
        return BalancingConfig("fixed", {"weights": list(given)})

    alone = [first_update(tmp_path / f"task{t}", fixed(*[float(t == k) for k in range(3)])) for t in range(3)]
    assert all(any(update.abs().max() > 1e-5 for update in of_task.values()) for of_task in alone)
    name = load_names(tmp_path / "task0" / "moved")[1]
    drawn = Random(3, BASE.seed).weights(0, None).tolist()
    cases = [
        (BalancingConfig(), None, [1.0, 1.0, 1.0]),
        (fixed(0.5, 1.0, 2.0), None, [0.5, 1.0, 2.0]),
        (fixed(0.5, 1.0, 2.0), {name: 3.0}, [0.5, 3.0, 2.0]),
        (BalancingConfig("random"), None, drawn),
    ]
    for i, (balancing, task_weights, expected) in enumerate(cases):
        found = first_update(tmp_path / str(i), balancing, task_weights=task_weights)
        for n in found:
            by_hand = sum(w * of_task[n] for w, of_task in zip(expected, alone, strict=True))
            assert torch.allclose(found[n], by_hand, rtol=1e-4, atol=1e-8), (i, n)


def load_names(run: Path) -> list[str]:
    return TaskTable.load(run / "task_map.json").names


@pytest.mark.parametrize("method", QUICK)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, method) -> None:
    whole = run_of(tmp_path / "whole", QUICK[method], save_steps=5)
    assert train(whole) == 0
    # Stops between two lines of the log, so that the means of the weights must come back as well.
    part = replace(whole, output_dir=str(tmp_path / "part"))
    assert train(part) == 0
    for late in ("checkpoint-8", "latest"):
        remove(tmp_path / "part" / late)
    assert train(replace(part, resume_from_checkpoint="true")) == 0
    first, second = weights(tmp_path / "whole", 8), weights(tmp_path / "part", 8)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "part")
    paths = [tmp_path / run / "checkpoint-8" / STATE for run in ("whole", "part")]
    states = [torch.load(path, weights_only=True) for path in paths]
    assert repr(states[0]) == repr(states[1])
    logged = [line for line in untimed(tmp_path / "whole") if line["kind"] == "train"]
    name = [key for key in logged[0] if key.startswith("weight/")]
    assert len(name) == 3
    if method != "fixed":  # the others do something within these steps
        assert any(line[key] != logged[0][key] for line in logged for key in name)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def train_all(configs: list[Config]) -> list[int]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return [train(config) for config in configs]


@pytest.mark.parametrize(
    ("plain", "zero3"),
    [
        (["uncertainty", "dwa"], ["coba", "famo"]),
        pytest.param(["coba", "famo"], ["uncertainty", "dwa"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(spawn_ranks, tmp_path, plain, zero3) -> None:
    # Adam's first steps are signs, which rounding flips; SGD shows the weights as they are.
    changes: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
    changes["moe"] = replace(BASE.moe, lora_dropout=0.0)
    for name in (*plain, *zero3):
        assert train(run_of(tmp_path / f"one-{name}", QUICK[name], **changes)) == 0
    changes["gradient_accumulation_steps"] = 1
    pair = [run_of(tmp_path / f"two-{name}", QUICK[name], **changes) for name in plain]
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    changes["deepspeed"] = str(path)
    last = [run_of(tmp_path / f"zero3-{name}", QUICK[name], **changes) for name in zero3]
    assert spawn_ranks(train_all, configs=[*pair, *last], timeout_s=240) == [[0] * 4] * 2
    for run in (*(f"two-{n}" for n in plain), *(f"zero3-{n}" for n in zero3)):
        name = run.partition("-")[2]
        one, two = weights(tmp_path / f"one-{name}", 8), weights(tmp_path / run, 8)
        assert max(float((one[n] - two[n]).abs().max()) for n in one) <= 1e-6, run
        mine, theirs = untimed(tmp_path / f"one-{name}"), untimed(tmp_path / run)
        for a, b in zip(mine, theirs, strict=True):
            for key in (k for k in a if k.startswith("weight/")):
                assert a[key] == pytest.approx(b[key], abs=1e-5), (run, a["step"], key)


@pytest.mark.parametrize("method", ["famo", "coba", "uncertainty"])
def test_tasks_may_be_appended(tmp_path, method) -> None:
    for name in ("one", "two", "three"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [json.dumps({"input": f"{name} {i}", "output": f"{i}"}) for i in range(12)]
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    held = tmp_path / "held"
    (tmp_path / "data" / "two").rename(held)
    data = DataConfig(root=str(tmp_path / "data"), max_length=16)
    tokenizer = TokenizerConfig(kind="char", vocab_size=64)
    base = run_of(tmp_path / "run", QUICK[method], data=data, tokenizer=tokenizer, max_steps=4)
    assert train(base) == 0
    held.rename(tmp_path / "data" / "zwei")
    assert train(replace(base, max_steps=8, resume_from_checkpoint="true")) == 0
    state = torch.load(tmp_path / "run" / "checkpoint-8" / STATE, weights_only=True)
    assert state["balancer"]["n_tasks"] == 3
    last = [line for line in untimed(tmp_path / "run") if line["kind"] == "train"][-1]
    assert all(math.isfinite(float(last[f"weight/{name}"])) for name in ("one", "three", "zwei"))


def test_famo_compares_the_same_rows_under_the_same_dropout(tmp_path) -> None:
    # Nothing moves at a rate of 0, so the second pass finds the losses of the first, bit for bit.
    seen: list[torch.Tensor] = []

    class Spy(FAMO):
        def _learn(self, before_T, after_T, here_T):
            seen.extend([before_T, after_T])
            super()._learn(before_T, after_T, here_T)

    still = run_of(tmp_path, QUICK["famo"], model={**LLAMA, "attention_dropout": 0.3}, learning_rate=0.0,
                   router_learning_rate=0.0, max_steps=2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BALANCERS, "famo", Spy)
        assert train(still) == 0
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])


def validation(config: Config, rank: int = 0, ranks: int = 1) -> ValidationRows:
    here = distributed.Ranks(rank, ranks, 0, torch.device("cpu"))
    data = build_data(config, here, ("train", "validation"), None, None, lambda line: None)
    found = build_balancing(config, data, here).validation
    assert found is not None
    return found


def test_validation_rows_are_drawn_by_step_and_leave_the_random_state(tmp_path) -> None:
    rows = validation(run_of(tmp_path, QUICK["coba"]))
    drawn = [rows.rows(step) for step in range(30)]
    assert drawn == [validation(run_of(tmp_path, QUICK["coba"])).rows(step) for step in range(30)]
    assert all([task for task, _ in step] == [0, 0, 1, 1, 2, 2] for step in drawn)
    for task in range(3):
        assert {row for step in drawn for t, row in step if t == task} == set(range(5))
    assert drawn != [validation(run_of(tmp_path, QUICK["coba"], seed=1)).rows(step) for step in range(30)]


def test_validation_losses_are_those_of_a_plain_pass(tmp_path) -> None:
    config = run_of(tmp_path, QUICK["coba"], moe=replace(BASE.moe, lora_dropout=0.5))
    here = distributed.Ranks(0, 1, 0, torch.device("cpu"))
    data = build_data(config, here, ("train", "validation"), None, None, lambda line: None)
    rows = build_balancing(config, data, here).validation
    assert rows is not None
    model = build_moe(config, data.tokenizer, data.bundle.tasks, here)
    for _, p in model.parameter_groups()["experts"]:
        torch.nn.init.normal_(p, std=0.3)
    model.train()
    before = torch.get_rng_state()
    found_T = rows.losses(model, 4)
    assert model.training and torch.equal(before, torch.get_rng_state())
    model.eval()
    for task in range(3):
        total, n = 0.0, 0
        for t, r in rows.rows(4):
            if t == task:
                row = data.bundle.splits["validation"][t].tokens[r]
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
                log_p = model(input_ids=ids, task_ids=[t]).logits[0, :-1].log_softmax(-1)
                targets = (labels[1:] != -100).nonzero().squeeze(1).tolist()
                total -= sum(float(log_p[i, labels[1:][i]].detach()) for i in targets)
                n += len(targets)
        assert float(found_T[task]) == pytest.approx(total / n, rel=1e-5)


def test_coba_without_validation_rows_is_an_error(tmp_path) -> None:
    config = run_of(tmp_path, QUICK["coba"], data=DataConfig(skill_gym=replace(GYM, validation_rows=0)))
    with pytest.raises(ConfigError, match=r"balancing.method: 'coba' learns from validation rows"):
        train(replace(config, eval_split="test"))


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path) -> None:
    far = {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0}
    config = run_of(tmp_path, QUICK["dwa"], logging_steps=8, **far)
    with pytest.raises(BalancingError, match="is not finite"):
        train(config)


def test_effective_weights_are_rate_times_weight_times_combination(tmp_path) -> None:
    mixing = MixingConfig(strategy="explicit", weights={"a": 2.0, "b": 1.0, "c": 1.0})
    data = DataConfig(root=str(tmp_path / "data"), max_length=16)
    for name, length in (("a", 1), ("b", 3), ("c", 5)):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [json.dumps({"input": f"{i}", "output": "x" * length}) for i in range(12)]
        (tmp_path / "data" / name / "train.jsonl").write_text("\n".join(rows) + "\n")
    surgery = SurgeryConfig("fixed", {"weights": [1.0, 1.0, 4.0]})
    config = run_of(tmp_path / "run", QUICK["fixed"], data=data, mixing=mixing, surgery=surgery, max_steps=2,
                    loss_reduction="sample", task_weights={"a": 3.0},
                    tokenizer=TokenizerConfig(kind="char", vocab_size=64))  # fmt: skip
    assert train(config) == 0
    (line,) = (line for line in untimed(tmp_path / "run") if line["kind"] == "train")
    assert line["weight/a"] == pytest.approx(0.5 * (3.0 * 0.5))
    assert line["weight/b"] == pytest.approx(0.25 * 1.0)
    assert line["weight/c"] == pytest.approx(0.25 * 2.0 * 4.0)
    assert train(replace(config, output_dir=str(tmp_path / "token"), loss_reduction="token")) == 0
    (line,) = (line for line in untimed(tmp_path / "token") if line["kind"] == "train")
    a, b, c = (line[f"weight/{name}"] for name in "abc")
    # Each row ends in an end-of-sequence token: 2, 4 and 6 targets.
    assert a / b == pytest.approx(2 * 1.5 * 2 / 4) and c / b == pytest.approx(2.0 * 4.0 * 6 / 4)


def test_a_twofold_correction_is_said_once(tmp_path, capsys) -> None:
    phases = (PhaseConfig(name="first", steps=1), PhaseConfig(name="second"))
    config = run_of(tmp_path, QUICK["dwa"], loss_reduction="task", max_steps=2, phases=phases)
    assert train(config) == 0
    text = capsys.readouterr().out
    assert text.count("settings correct an imbalance between tasks") == 1
    assert "3 settings" in text and "balancing.method: dwa" in text and "loss_reduction: task" in text
    mixing = MixingConfig(strategy="proportional")
    single = run_of(tmp_path / "single", QUICK["random"], mixing=mixing, max_steps=1)
    assert train(single) == 0
    assert "correct an imbalance" not in capsys.readouterr().out


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text("model: {type: llama}\ndata: {skill_gym: {}}\nreport_to: []\n" + text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balancing: {method: fammo}", "balancing.method: 'fammo' is not one of .* the nearest is 'famo'"),
        ("balancing: {method: famo, options: {tau: 1}}", "balancing.options.tau: 'famo' has no such option"),
        ("balancing: {method: dwa, options: {window: 0}}", "balancing.options.window: 0 is no integer >= 1"),
        ("balancing: {method: fixed, options: {weights: [1, -1]}}", "balancing.options.weights: -1 is no"),
        ("balancing: {method: fixed, options: {weights: 2}}", "balancing.options.weights: 2 is no list"),
        ("balancing: {options: {lr: 1}}", "balancing.options.*: has no effect: balancing.method is not set"),
        ("balancing: {method: dwa, validation_rows: 2}", "validation_rows: has no effect: .* not 'coba'"),
        ("balancing: {method: coba, validation_rows: 0}", "balancing.validation_rows: 0 is out of range"),
        ("balancing: {methud: famo}", "balancing.methud"),
    ],
)
def test_bad_settings_name_their_key(tmp_path, text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_weights_must_fit_the_tasks(tmp_path) -> None:
    config = run_of(tmp_path, BalancingConfig("fixed", {"weights": [1.0, 2.0]}))
    with pytest.raises(ConfigError, match=r"balancing.options.weights: 2 weights for 3 tasks"):
        train(config)


def test_another_method_does_not_go_on_from_a_checkpoint(tmp_path) -> None:
    assert train(run_of(tmp_path, QUICK["dwa"], max_steps=2)) == 0
    other = run_of(tmp_path, QUICK["uncertainty"], max_steps=4, resume_from_checkpoint="true")
    with pytest.raises(ConfigError, match=r"balancing.method: the checkpoint has 'dwa'"):
        train(other)


OPTIONS: dict[tuple[str, str], str] = {
    ("balancing", "coba"): "{warmup: 2, history: 2}",
    ("surgery", "fixed"): "{weights: [1.0, 0.5, 2.0]}",
}


@pytest.mark.parametrize(
    ("section", "method"),
    [*(("balancing", m) for m in BALANCERS), *(("surgery", m) for m in (*METHODS, *DIRECT))],
)
def test_every_method_is_reachable_from_yaml(tmp_path, section, method) -> None:
    if getattr(METHODS.get(method), "__module__", "") == through_torchjd.__name__:
        pytest.importorskip("torchjd")
    options = OPTIONS.get((section, method), "{}")
    text = f"""
model: {{type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
        num_key_value_heads: 2}}
tokenizer: {{kind: wordlevel, vocab_size: 32}}
moe: {{r: 2, num_experts: 2}}
data: {{max_length: 16, skill_gym: {{num_tasks: 3, num_skills: 3, train_rows: 20, validation_rows: 3,
       test_rows: 3, max_string_length: 4, alphabet_size: 8}}}}
evaluation: {{max_rows: 1, max_new_tokens: 2}}
max_steps: 3
logging_steps: 1
per_device_train_batch_size: 9
learning_rate: 0.01
warmup_ratio: 0.0
report_to: []
output_dir: {tmp_path / "run"}
{section}: {{method: {method}, options: {options}}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert train(load(str(path))) == 0
    lines = [line for line in untimed(tmp_path / "run") if line["kind"] == "train"]
    assert len(lines) == 3
    assert all(math.isfinite(float(line["train/loss"])) for line in lines)
    assert all(math.isfinite(w) for line in lines for k, w in line.items() if k.startswith("weight/"))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", 3).values())
    if section == "surgery":
        assert all("grad/conflict_frac" in line for line in lines)


def test_the_documented_methods_are_the_registries() -> None:
    text = (Path(__file__).parents[2] / "docs" / "METHODS.md").read_text(encoding="utf-8")
    for section, names in (("surgery", (*METHODS, *DIRECT)), ("balancing", tuple(BALANCERS))):
        table = text.partition(f"| `{section}.method` |")[2].partition("\n\n")[0]
        rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
        assert sorted(n for row in rows for n in re.findall(r"`(\w+)`", row)) == sorted(names)
