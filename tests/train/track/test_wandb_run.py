"""A run as a user starts it, read back from its wandb folder: what is there equals log and checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plotly.colors import sample_colorscale

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track import routing
from taskmoe.train.track.keys import KEYS, pattern_of
from taskmoe.train.track.log import read_log
from taskmoe.train.track.verdicts import verdicts

CONFIG = """\
model: {type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 2, num_attention_heads: 1}
tokenizer: {kind: wordlevel, vocab_size: 32}
moe: {r: 1, num_experts: 4, router_scope: layer, router_init_std: 1.0, regularisers: {entropy: 0.01}}
data:
  skill_gym: {num_tasks: 3, num_skills: 3, alphabet_size: 8, train_rows: 40, validation_rows: 2, test_rows: 1}
  max_length: 24
mixing: {strategy: equal}
surgery: {method: cagrad, matrix_steps: 2}
deepspeed: zero1.json
output_dir: run
max_steps: 4
learning_rate: 0.1
per_device_train_batch_size: 12
logging_steps: 1
eval_steps: 2
save_steps: 4
evaluation: {max_new_tokens: 2}
track: {detail: detailed, log_artifacts: true}
run_name: tracked
"""
OTHER_SETTINGS = {"routing/<group>/<head>/<number>"}  # keys that this run has not


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of a user without an account: its home, and what it printed."""
    home = tmp_path_factory.mktemp("tracked")
    (home / "cfg.yaml").write_text(CONFIG)
    (home / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    run = subprocess.run(
        [sys.executable, "-m", "taskmoe.train.cli", "train", "cfg.yaml"],
        env={**environ, "HOME": str(home), "TMPDIR": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return SimpleNamespace(home=home, stdout=run.stdout)


@pytest.fixture(scope="module")
def run(done: SimpleNamespace) -> Path:
    return done.home / "run"


@pytest.fixture(scope="module")
def offline(run: Path, read_offline: Any) -> Any:
    return read_offline(run)


@pytest.fixture(scope="module")
def snapshot(run: Path) -> Snapshot:
    """The routing at the end."""
    return Snapshot.load(run / "checkpoint-4" / "routing.safetensors")


@pytest.fixture(scope="module")
def tasks(run: Path) -> TaskTable:
    return TaskTable.load(run / "task_map.json")


def logged(run: Path) -> list[tuple[int, str, Any]]:
    """[(step, key, value)] of the log, those that measure the clock too."""
    lines = read_log(run / "trainer_log.jsonl")
    flat = [(line["step"], {**line, **line.get("time", {})}) for line in lines if line["kind"] != "end"]
    return [(step, key, value) for step, line in flat for key, value in line.items() if "/" in key]


def test_it_says_one_line_and_stays_in_its_folder(done: SimpleNamespace) -> None:
    said = [line for line in done.stdout.splitlines() if "wandb" in line]
    assert len(said) == 1 and said[0].startswith("wandb: offline in run/wandb; upload with `wandb sync ")
    assert not (done.home / ".local").exists()  # where wandb would put tables and artifacts
    assert list((done.home / "run" / "wandb" / "data").rglob("staging"))


def test_every_key_of_the_log_is_documented_and_every_documented_key_is_logged(run: Path) -> None:
    found = {pattern_of(key) for _, key, _ in logged(run)}
    assert None not in found, [key for _, key, _ in logged(run) if pattern_of(key) is None]
    expected = {pattern for pattern, key in KEYS.items() if key.kind in ("curve", "log")}
    assert expected - found == OTHER_SETTINGS


def test_wandb_has_the_numbers_of_the_log(run: Path, offline: Any) -> None:
    expected = [(s, k, v) for s, k, v in logged(run) if KEYS[pattern_of(k) or ""].kind == "curve"]
    assert len(expected) > 100
    for step, key, value in expected:
        assert (step, pytest.approx(value)) in offline.curve(key), key
    losses = [value for _, value in offline.curve("train/loss")]
    scores = [value for _, value in offline.curve("eval/score")]
    assert len(losses) == 4 and len(scores) == 2
    assert offline.summary["train/loss"] == {"min": min(losses), "last": losses[-1]}
    assert offline.summary["eval/score"] == {"max": max(scores), "last": scores[-1]}
    assert offline.summary["routing/entropy"] == offline.curve("routing/entropy")[-1][1]
    assert {f"{key.partition('/')[0]}/*" for key in KEYS} <= offline.metrics.keys()
    assert all(m.step_metric == "step" for name, m in offline.metrics.items() if name != "step")
    assert offline.config["track"]["detail"] == "detailed"


def test_wandb_has_all_tables_images_and_charts(offline: Any) -> None:
    keys = {key for line in offline.history for key in line}
    kinds = {pattern: key.kind for pattern, key in KEYS.items()}
    assert {p for p, kind in kinds.items() if kind in ("table", "image")} <= {pattern_of(key) for key in keys}
    charts = {p for p, kind in kinds.items() if kind == "chart"}
    assert {f"{p}_table" for p in charts} <= keys
    assert charts == offline.config["_wandb"]["visualize"].keys()


def test_tables_of_the_routing(run: Path, offline: Any, snapshot: Snapshot, tasks: TaskTable) -> None:
    columns, rows = offline.table("routing/gates")
    assert columns == ["layer", "head", "task", "expert", "gate"] and len(rows) == 2 * 1 * 3 * 4
    for group, h, task, e, gate in rows:
        assert gate == pytest.approx(float(snapshot.gates[group][tasks.id(task), h, e]))
    similarity_TT = routing.similarity(snapshot)
    columns, rows = offline.table("routing/similarity_table")
    assert columns == ["task", "other", "cosine"] and len(rows) == 3
    for task, other, cosine in rows:
        assert cosine == pytest.approx(float(similarity_TT[tasks.id(task), tasks.id(other)]))
    first = Snapshot.load(run / "routing" / "step-0.safetensors")
    _, rows = offline.table("routing/depth_table")
    shown = {(place, series): value for place, series, value in rows}
    for series, then in (("effective experts", snapshot), ("effective experts at the start", first)):
        for place, gates_THE in enumerate(then.gates.values()):
            expected = routing.group_metrics(gates_THE)["effective_experts"]
            assert shown[place, series] == pytest.approx(expected)


def test_tables_of_tasks(run: Path, offline: Any, tasks: TaskTable) -> None:
    names = {task.slug: task.name for task in tasks}
    line = [line for line in read_log(run / "trainer_log.jsonl") if "grad/cosine_matrix" in line][-1]
    owners = [" + ".join(names[slug] for slug in slugs) for slugs in line["grad/rows"]]
    _, rows = offline.table("grad/conflict_table")
    assert len(rows) == 3 and [row[2] for row in rows] == sorted(row[2] for row in rows)
    for task, other, cosine in rows:
        assert cosine == line["grad/cosine_matrix"][owners.index(task)][owners.index(other)]
    columns, rows = offline.table("eval/table")
    assert columns[:6] == ["task", "group", "score", "metric", "loss", "rows"]
    assert [row[0] for row in rows] == tasks.names and {row[5] for row in rows} == {2}
    last = {key: value for _, key, value in logged(run)}
    for row, task in zip(rows, tasks, strict=True):
        assert row[1] == task.group and row[2] == last[f"eval/{task.slug}/{row[3]}"]
        for metric, value in zip(columns[6:], row[6:], strict=True):
            assert value == last[f"eval/{task.slug}/{metric}"]


def test_images_are_the_shares_in_the_order_of_their_caption(
    offline: Any, snapshot: Snapshot, tasks: TaskTable
) -> None:
    group = next(iter(snapshot.gates))
    shares_THE = routing.shares(snapshot.gates[group])
    (*_, shown) = [
        line[f"routing/{group}/heat"] for line in offline.history if f"routing/{group}/heat" in line
    ]
    order = shown["caption"].partition("rows: ")[2].split(", ")
    assert order == [tasks[t].name for t in routing.cluster(routing.similarity(snapshot)).order]
    image = Image.open(offline.file(f"routing/{group}/heat")).convert("RGB")
    side = image.height // 3
    assert image.size == (4 * side, 3 * side)
    top, scale = float(shares_THE.max()), np.linspace(0, 1, 255)
    for row, name in enumerate(order):
        for e in range(4):
            share = float(shares_THE[tasks.id(name), 0, e])
            colour = sample_colorscale("Viridis", [scale[round(254 * share / top)]], colortype="tuple")[0]
            seen = image.getpixel((e * side + side // 2, row * side + side // 2))
            assert seen == tuple(round(255 * c) for c in colour), (name, e)


def test_the_last_word_is_in_the_summary(
    run: Path, offline: Any, snapshot: Snapshot, tasks: TaskTable
) -> None:
    line = [line for line in read_log(run / "trainer_log.jsonl") if "grad/cosine_matrix" in line][-1]
    first = Snapshot.load(run / "routing" / "step-0.safetensors")
    expected = verdicts(snapshot, tasks, first, (line["grad/rows"], line["grad/cosine_matrix"]))
    assert offline.summary["routing/verdicts"].splitlines() == expected and len(expected) > 2


def test_a_checkpoint_is_a_version_of_an_artifact(run: Path, offline: Any) -> None:
    artifact = [a for a in offline.artifacts if a.type == "model"][-1]
    assert artifact.name == f"adapter-{offline.folder.name.rpartition('-')[2]}"
    assert set(artifact.aliases) == {"latest", "step-4"} and artifact.metadata == '{"step":4}'
    files = {entry.path: entry for entry in artifact.manifest.contents}
    assert files.keys() == {
        "adapter_config.json", "adapter_model.safetensors", "task_map.json", "routing.safetensors"
    }  # fmt: skip
    for name, entry in files.items():
        assert Path(entry.local_path).read_bytes() == (run / "checkpoint-4" / name).read_bytes()
