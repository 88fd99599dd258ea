"""Settings from files: inheritance, files beside them, and the way back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    SurgeryConfig,
    TokenizerConfig,
    TrackConfig,
)
from taskmoe.train.config_checks import validate
from taskmoe.train.config_io import dump, load


def test_a_missing_file_names_the_nearest(write_run, fails, tmp_path: Path) -> None:
    write_run("", "quickstart.yaml")
    message = fails(load, tmp_path / "quikstart.yaml")
    assert "no such config file; the nearest is" in message and message.endswith("quickstart.yaml")
    assert "no such config file" in fails(load, tmp_path)


def test_extends_merges_sections_and_replaces_lists(write_run, write, fails, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_run("moe: {n_skills: 2, r: 3}\nphases: [{steps: 4}, {name: b}]\n", "base.yaml")
    write("extends: ../base.yaml\nmoe: {r: 1}\nseed: 1\nlogging_steps: 3\n", "sub/mid.yaml")
    path = write(
        "extends: sub/mid.yaml\nmoe: {num_experts: 5}\nmodel: {hidden_size: 8}\n"
        "phases: [{name: c}]\nlogging_steps:\n"
    )
    got = load(path)
    assert got.moe == TaskMoEConfig(num_experts=5, r=1)
    assert got.model == {"type": "llama", "hidden_size": 8}
    assert got.phases == (PhaseConfig(name="c"),)
    assert got.seed == 1 and got.max_steps == 10
    assert got.logging_steps == Config().logging_steps
    write_run("sed: 1\n", "base.yaml")  # a fault is reported where it stands
    assert fails(load, path).startswith(f"{tmp_path / 'sub' / '..' / 'base.yaml'}:5: sed: unknown key")


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: other.yaml", "extends: no file"),
        ("extends: c.yaml", "extends: c.yaml leads back to this file"),
        ("extends: [a]", "extends: expected the path of a YAML file, found ['a']"),
    ],
)
def test_extends_that_lead_nowhere(write, fails, text: str, message: str) -> None:
    path = write(text)
    assert fails(load, path).startswith(f"{path}:1: {message}")


def test_a_deepspeed_file_is_found_beside_the_yaml(write_run, write, fails, tmp_path: Path) -> None:
    write("{}", "zero.json")
    path = write_run("deepspeed: zero.json")
    assert load(path).deepspeed == str(tmp_path / "zero.json")
    write('{"fp16": {"enabled": true}}', "zero.json")
    assert "fp16: this section is not used here" in fails(load, path)


def test_files_lie_beside_the_yaml(write_run, tmp_path: Path) -> None:
    (tmp_path / "vectors.json").write_text('{"a": [1.0, 2.0]}')
    moe = "moe: {router: task_mlp, representation: frozen, representation_options: {path: vectors.json}}"
    options = load(write_run(moe)).moe.representation_options
    assert options == {"path": str(tmp_path / "vectors.json")}


RICH = Config(
    model={"type": "llama", "hidden_size": 32, "rms_norm_eps": 1e-5, "bos_token_id": None, "list": [1, 2]},
    tokenizer=TokenizerConfig(kind="char"),
    moe=TaskMoEConfig(
        compose="before",
        num_heads=2,
        lora_alpha=3.0,
        target_modules=("q", "v"),
        layers_to_transform=(0, 1),
        rank_pattern={"mlp.up": 2, "1": 3},
        gate="top_k",
        top_k=2,
    ),
    datasets=(
        DatasetConfig(
            name="no", path="a.jsonl", labels=("no", "1e-3", "null", "0"), template="{{ a }}:\n{{ b }}"
        ),
        DatasetConfig(name="b", path="b.csv", weight=0.5),
    ),
    mixing=MixingConfig(strategy="explicit"),
    data=DataConfig(skill_gym=SkillGymConfig(num_tasks=3), max_length=7),
    phases=(
        PhaseConfig(
            name="a",
            steps=3,
            train=("base",),
            adapters=False,
            mixing=MixingConfig(strategy="temperature", cap=3),
            base_learning_rate=1e-4,
        ),
        PhaseConfig(name="b", router_temperature=(2.0, 0.5), restart_schedule=True),
    ),
    task_weights={"b": 2.0},
    warmup_steps=2,
    max_steps=9,
    evaluation=EvaluationConfig(metrics={"a*": "macro_f1"}, groups={"g": "a*"}),
    resume_from_checkpoint="true",
    run_name="007",
    learning_rate=1e-5,
    surgery=SurgeryConfig(method="pcgrad", options={"reduction": "mean"}, scope="layer", max_tasks=3),
    track=TrackConfig(wandb_entity="x"),
)


@pytest.mark.parametrize(
    "config",
    [
        RICH,
        Config(model={"type": "t5"}, data=DataConfig(skill_gym=SkillGymConfig())),
        Config(
            model_name_or_path="m",
            task_type="SEQ_CLS",
            pooling="mean",
            data=DataConfig(root="x"),
            optim="sgd",
        ),
    ],
    ids=["rich", "defaults", "classification"],
)
def test_round_trip(write, config: Config) -> None:
    validate(config)
    text = dump(config)
    again = load(write(text))
    assert again == config
    assert dump(again) == text


def test_dump_shows_what_takes_effect(settings) -> None:
    text = dump(settings("mixing: {strategy: equal}\n"))
    assert "max_length: 256" in text and "learning_rate: 0.001" in text
    assert "max_epochs" not in text and "router_hidden_dim" not in text
