from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plotly.colors import sample_colorscale

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config, DataConfig, TrackConfig
from taskmoe.train.track import routing
from taskmoe.train.track.keys import KEYS, pattern_of
from taskmoe.train.track.media import Media
from taskmoe.train.track.wandb_log import WandbLog, disabled, logged_in, without_secrets
from taskmoe.train.track.wandb_media import UNKNOWN


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


PROGRAM = """
import sys
from pathlib import Path

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config, TrackConfig
from taskmoe.train.track.media import Media
from taskmoe.train.track.routing import group_keys, metrics
from taskmoe.train.track.wandb_log import WandbLog

run_dir, checkpoint = map(Path, sys.argv[1:])
snapshot, first = (Snapshot.load(checkpoint / name) for name in ("routing.safetensors", "first.safetensors"))
tasks = TaskTable.load(checkpoint / "task_map.json")
config = Config(run_name="r", track=TrackConfig(detail="detailed", log_artifacts=True))
log = WandbLog(config, run_dir, "abc12345", print)
for step, loss, score in ((1, 2.0, 0.25), (2, 1.0, 0.75), (3, 1.5, 0.5)):
    log.log(step, {"train/loss": loss, "eval/score": score, "weight/t-0": loss, "grad/rows": [["t-0"]]})
log.log(3, metrics(snapshot, first) | group_keys(snapshot, first))
results = {n: {"f1": 0.5, "loss": 0.1 * i, "rows": 9, "metric": "f1"} for i, n in enumerate(tasks.names)}
conflict = ([["t-0"], ["t-2", "t-1"]], [[1.0, -0.5], [-0.5, 1.0]])
log.log_media(3, Media(tasks, snapshot, first, conflict, {"tasks": results}))
log.log_checkpoint(3, checkpoint)
log.summary({"routing/verdict": "routed"})
log.close()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an adapter whose tasks 0 and 2 are routed alike, and one that is none of it."""
    folder = tmp_path_factory.mktemp("checkpoint-3")
    torch.manual_seed(0)
    logits_THE = torch.randn(3, 2, 4)
    logits_THE[2] = logits_THE[0]
    gates = {"layers.0.q": logits_THE.softmax(-1), "layers.1.q": logits_THE.mul(3).softmax(-1)}
    Snapshot("task", gates).save(folder / "routing.safetensors")
    Snapshot("task", {group: torch.full((3, 2, 4), 0.25) for group in gates}).save(
        folder / "first.safetensors"
    )
    TaskTable.from_names(["T 0", "T 1", "T 2"]).save(folder / "task_map.json")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "rng.pt").write_text("not of the adapter")
    return folder


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A real run of a user who is not logged in: its folder, home and outputs."""
    folder = tmp_path_factory.mktemp("offline")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "run"), str(checkpoint)],
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return SimpleNamespace(run=folder / "run", home=folder, stdout=run.stdout, stderr=run.stderr)


@pytest.fixture(scope="module")
def offline(written: SimpleNamespace, read_offline: Any) -> Any:
    return read_offline(written.run)


def test_a_real_run_says_one_line_and_stays_in_its_folder(written: SimpleNamespace) -> None:
    assert written.stdout.count("\n") == 1 and written.stdout.startswith("wandb: offline"), written.stdout
    assert written.stderr == ""
    assert not (written.home / ".local").exists()  # where wandb would put tables and artifacts


def test_the_offline_run_holds_the_curves(offline: Any, checkpoint: Path) -> None:
    assert offline.curve("train/loss") == [(1, 2.0), (2, 1.0), (3, 1.5)]
    assert offline.summary["train/loss"] == {"min": 1.0, "last": 1.5}
    assert offline.summary["eval/score"] == {"max": 0.75, "last": 0.5}
    assert offline.summary["routing/verdict"] == "routed"
    assert not offline.curve("grad/rows")
    snapshot = Snapshot.load(checkpoint / "routing.safetensors")
    first = Snapshot.load(checkpoint / "first.safetensors")
    numbers = routing.metrics(snapshot, first) | routing.group_keys(snapshot, first)
    assert "routing/layers.1.q/head-1/drift" in numbers and "routing/between_tasks" in numbers
    for key, value in numbers.items():
        assert offline.curve(key) == [(3, pytest.approx(value))]
        assert pattern_of(key) is not None
    last = offline.summary["routing/entropy"]
    assert last == pytest.approx(numbers["routing/entropy"])
    families = {key.partition("/")[0] for key in offline.summary if "/" in key}
    for family in families:
        assert offline.metrics[f"{family}/*"].step_metric == "step"
    assert offline.config["track"]["detail"] == "detailed"


def test_the_offline_run_holds_the_tables(offline: Any, checkpoint: Path) -> None:
    snapshot = Snapshot.load(checkpoint / "routing.safetensors")
    columns, rows = offline.table("routing/gates")
    assert columns == ["layer", "head", "task", "expert", "gate"] and len(rows) == 2 * 2 * 3 * 4
    for group, h, task, e, gate in rows:
        assert gate == pytest.approx(float(snapshot.gates[group][int(task[2:]), h, e]))
    columns, rows = offline.table("routing/similarity_table")
    assert columns == ["task", "other", "cosine"] and len(rows) == 3
    assert rows[0] == ["T 0", "T 2", pytest.approx(1.0)] and rows[1][2] < 0.99
    assert offline.table("grad/conflict_table") == (columns, [["T 0", "T 2 + T 1", -0.5]])
    columns, rows = offline.table("eval/table")
    assert columns == ["task", "group", "score", "metric", "loss", "rows", "f1"]
    assert rows[2] == ["T 2", None, 0.5, "f1", pytest.approx(0.2), 9, 0.5] and len(rows) == 3
    assert offline.table("eval/by_task_table") == (["task", "score"], [[f"T {i}", 0.5] for i in range(3)])
    columns, rows = offline.table("routing/depth_table")
    assert [row for row in rows if row[1] == "effective experts at the start"] == [
        [i, "effective experts at the start", pytest.approx(4.0)] for i in range(2)
    ]
    charts = offline.config["_wandb"]["visualize"]
    assert charts["routing/depth"]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
    assert charts["eval/by_task"]["panel_config"]["panelDefId"] == "wandb/bar/v0"


def test_the_offline_run_holds_the_images(offline: Any, checkpoint: Path) -> None:
    shares_THE = routing.shares(Snapshot.load(checkpoint / "routing.safetensors").gates["layers.1.q"])
    (shown,) = [line for line in offline.history if "routing/similarity" in line]
    assert shown["step"] == 3
    caption = shown["routing/layers.1.q/heat"]["caption"]
    order = caption.partition("rows: ")[2].split(", ")
    assert sorted(order) == ["T 0", "T 1", "T 2"] and order[1] != "T 1"  # those routed alike lie together
    image = Image.open(offline.file("routing/layers.1.q/heat")).convert("RGB")
    side = image.height // 3
    assert image.size == (9 * side, 3 * side)  # four experts of each head, and one column between
    top, viridis = float(shares_THE.max()), np.linspace(0, 1, 255)
    for row, name in enumerate(order):
        for h in range(2):
            for e in range(4):
                share = float(shares_THE[int(name[2:]), h, e]) / top
                colour = sample_colorscale("Viridis", [viridis[round(254 * share)]], colortype="tuple")[0]
                seen = image.getpixel(((5 * h + e) * side + side // 2, row * side + side // 2))
                assert seen == tuple(round(255 * c) for c in colour), (name, h, e)
    assert image.getpixel((4 * side + 1, 1)) == UNKNOWN[1]
    assert Image.open(offline.file("grad/conflict")).size[0] % 2 == 0


def test_the_offline_run_holds_what_is_documented(offline: Any) -> None:
    shown = {pattern_of(key) for line in offline.history for key in line if "/" in key}
    charts = {f"{key}_table" for key, kind in KEYS.items() if kind.kind == "chart"}
    media = {key for key, kind in KEYS.items() if kind.kind in ("table", "image")}
    assert media <= shown
    assert charts <= {key for line in offline.history for key in line}


def test_a_checkpoint_becomes_a_version_of_an_artifact(offline: Any) -> None:
    (artifact,) = [a for a in offline.artifacts if a.type == "model"]
    assert artifact.name == "adapter-abc12345" and set(artifact.aliases) == {"latest", "step-3"}
    assert json.loads(artifact.metadata) == {"step": 3}
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == {"routing.safetensors", "task_map.json", "adapter_config.json"}
    for entry in artifact.manifest.contents:
        assert Path(entry.local_path).stat().st_size == entry.size


def test_no_artifact_unless_asked_for(wandb: Any, said: list[str], tmp_path: Path, checkpoint: Path) -> None:
    start(said, tmp_path).log_checkpoint(3, checkpoint)  # the fake has no Artifact: it would warn
    assert len(said) == 1
    start(said, tmp_path, track=TrackConfig(log_artifacts=True)).log_checkpoint(3, checkpoint)
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
    log.summary({"a": 1})
    assert not said and not wandb.runs
