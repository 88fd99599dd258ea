from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config, DataConfig, TrackConfig
from taskmoe.train.track.media import Media
from taskmoe.train.track.wandb_log import WandbLog, disabled, logged_in, without_secrets


@pytest.fixture
def said() -> list[str]:
    return []


def start(said: list[str], tmp_path: Path, run_id: str | None = None, **settings: Any) -> WandbLog:
    return WandbLog(Config(**settings), tmp_path / "run", run_id, said.append)


def test_offline_when_nobody_is_logged_in(wandb: Any, said: list[str], tmp_path: Path) -> None:
    log = start(said, tmp_path, run_name="first", track=TrackConfig(wandb_project="p", wandb_entity="e"))
    init = wandb.runs[0].init
    assert (init["mode"], init["project"], init["entity"], init["name"]) == ("offline", "p", "e", "first")
    assert init["dir"] == str(tmp_path / "run") and init["id"] == log.run_id and init["resume"] == "allow"
    assert len(said) == 1 and "offline" in said[0] and "wandb sync" in said[0]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_mode_has_the_last_word(
    wandb: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    start(said, tmp_path)
    assert wandb.runs[0].init["mode"] is None  # wandb reads the variable itself


def test_logged_in_users_are_online(
    wandb: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    start(said, tmp_path)
    assert wandb.runs[0].init["mode"] is None and said == ["wandb: https://example.org/run"]


@pytest.mark.parametrize("variable, value", [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_disabled_starts_nothing(
    wandb: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    log = start(said, tmp_path)
    log.log(1, {"train/loss": 1.0})
    log.close()
    assert not wandb.runs and not said and log.run_id is None


def test_who_is_logged_in(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert not logged_in(home)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert logged_in(home)
    assert not logged_in({**home, "WANDB_BASE_URL": "https://wandb.example.org:8080"})
    (tmp_path / "other").write_text("machine wandb.example.org login user password x\n")
    assert logged_in({"NETRC": str(tmp_path / "other"), "WANDB_BASE_URL": "https://wandb.example.org:8080"})
    (tmp_path / ".netrc").write_text("no netrc at all")
    assert not logged_in(home)
    assert logged_in({**home, "WANDB_API_KEY": "x"})
    assert not disabled({"WANDB_MODE": "offline"})


def test_axis_is_ours_so_that_a_resumed_run_may_begin_earlier(
    wandb: Any, said: list[str], tmp_path: Path
) -> None:
    start(said, tmp_path).log(20, {"train/loss": 0.5, "train/note": "text"})
    resumed = start(said, tmp_path, run_id="abc")
    resumed.log(11, {"train/loss": 0.7})
    resumed.close()
    first, second = wandb.runs
    assert first.logged == [{"train/loss": 0.5, "step": 20}] and second.logged == [
        {"train/loss": 0.7, "step": 11}
    ]
    assert second.init["id"] == resumed.run_id == "abc" and second.exit_code == 0
    assert first.metrics["train/*"] == {"step_metric": "step"} and "step" in first.metrics


def test_two_new_runs_have_two_ids(wandb: Any, said: list[str], tmp_path: Path) -> None:
    assert start(said, tmp_path).run_id != start(said, tmp_path).run_id


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "finish"])
def test_trouble_is_one_line_and_the_run_goes_on(
    wandb: Any, said: list[str], tmp_path: Path, where: str
) -> None:
    wandb.broken.add(where)
    log = start(said, tmp_path)
    for step in range(3):
        log.log(step, {"train/loss": 1.0})
    log.close()
    log.close()
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert ("is kept" if where == "finish" else "goes on without it") in warnings[0]
    assert wandb.torn_down == (where == "finish")  # else its exit hook fails, aloud


def test_a_missing_package_is_no_trouble_either(
    said: list[str], tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(said, tmp_path).log(1, {"train/loss": 1.0})
    assert len(said) == 1 and said[0].startswith("warning")


def test_secrets_stay_here_and_settings_do_not(wandb: Any, said: list[str], tmp_path: Path) -> None:
    model = {
        "type": "llama",
        "pad_token_id": 0,
        "hf_token": "t0",
        "auth": {"apiKey": "k0", "user_password": "p0"},
    }
    start(said, tmp_path, model=model, data=DataConfig(max_length=77), learning_rate=0.25)
    config = wandb.runs[0].init["config"]
    text = json.dumps(config)
    assert not any(secret in text for secret in ("t0", "k0", "p0"))
    assert config["model"] == {"type": "llama", "pad_token_id": 0, "auth": {}}
    assert config["data"]["max_length"] == 77 and config["learning_rate"] == 0.25
    # These contain the words, but are no secrets.
    assert "tokenizer" in config and "max_new_tokens" in config["evaluation"]
    assert "per_task_keys" in config["track"]
    assert without_secrets({"a": [{"secret": "s"}, 1]}) == {"a": [{}, 1]}


def test_no_artifact_unless_asked_for(wandb: Any, said: list[str], tmp_path: Path) -> None:
    start(said, tmp_path).log_checkpoint(3, tmp_path)  # the fake has no Artifact: it would warn
    assert len(said) == 1
    start(said, tmp_path, track=TrackConfig(log_artifacts=True)).log_checkpoint(3, tmp_path)
    assert said[-1].startswith("warning: wandb could not keep a checkpoint")


def test_brief_runs_draw_no_routing_groups(wandb: Any, said: list[str], tmp_path: Path) -> None:
    values = {
        "routing/entropy": 1.0,
        "routing/layers.0.q/entropy": 2.0,
        "routing/layers.0.q/head-0/drift": 3.0,
    }
    start(said, tmp_path).log(1, values)
    start(said, tmp_path, track=TrackConfig(detail="detailed")).log(1, values)
    brief, detailed = wandb.runs
    assert brief.logged == [{"routing/entropy": 1.0, "step": 1}]
    assert detailed.logged == [{**values, "step": 1}]


def test_a_disabled_run_draws_nothing(
    said: list[str], tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("taskmoe.train.track.wandb_log.items", None)  # calling it would be an error
    log = start(said, tmp_path, track=TrackConfig(log_artifacts=True))
    log.log_media(1, Media(TaskTable()))
    log.log_checkpoint(1, tmp_path)
    assert not said and not wandb.runs
