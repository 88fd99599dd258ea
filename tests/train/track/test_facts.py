"""What a folder tells: a run, a checkpoint in it or outside it, a saved adapter; what is none of these."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taskmoe.moe.snapshot import SnapshotError
from taskmoe.train.track.facts import FactsError, gather, latest

GATES = {"layer.0": torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]] * 2).unsqueeze(1)}
FIRST = {"layer.0": torch.full((4, 1, 3), 1 / 3)}
LOG = [
    (10, "train", {"train/loss": 2.0, "train/loss/task-0": math.nan, "grad/rows": [["task-0"], ["task-1"]],
                   "grad/cosine_matrix": [[1.0, -0.5], [-0.5, 1.0]]}),
    (20, "train", {"train/loss": 1.0, "grad/rows": [["task-0", "task-2"], ["task-1"]],
                   "grad/cosine_matrix": [[1.0, math.nan], [math.nan, math.nan]]}),
    (30, "train", {"train/loss": 0.5}),
]  # fmt: skip
SCORES = {"Task 0": 0.5, "Task 1": 0.75}


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    config = "model: {type: llama}\nmoe: {num_experts: 3}\nhub: {hf_token: hush, size: 3}\n"
    return make_run("run", GATES, first=FIRST, log=LOG, scores=SCORES, config=config)


def test_a_run_tells_of_its_newest_checkpoint(run: Path) -> None:
    facts = gather(run)
    assert (facts.source, facts.kind, facts.step) == (run, "run", 20)
    assert torch.equal(facts.snapshot.gates["layer.0"], GATES["layer.0"]) and facts.snapshot.level == "task"
    assert facts.first is not None and torch.equal(facts.first.gates["layer.0"], FIRST["layer.0"])
    assert facts.tasks.names == [f"Task {i}" for i in range(4)] and facts.tasks[2].group == "digits"
    assert [line["step"] for line in facts.log] == [10, 20, 30]
    assert facts.results is not None and facts.results["experts"]["score"] == 0.625
    assert facts.config["moe"] == {"num_experts": 3}


def test_secrets_stay_where_they_are(run: Path) -> None:
    assert gather(run).config["hub"] == {"size": 3}


def test_numbers_that_are_not_finite(run: Path) -> None:
    facts = gather(run)
    assert math.isnan(facts.log[0]["train/loss/task-0"])
    assert facts.conflict is not None
    rows, cosines = facts.conflict
    assert rows == [["task-0", "task-2"], ["task-1"]]
    assert cosines[0][0] == 1.0 and math.isnan(cosines[0][1]) and math.isnan(cosines[1][1])


def test_a_checkpoint_tells_of_its_own_time(run: Path, make_run: Callable[..., Path]) -> None:
    early = make_run("other", GATES, step=10)
    shutil.copytree(early / "checkpoint-10", run / "checkpoint-10")
    facts = gather(run / "checkpoint-10")
    assert (facts.kind, facts.step) == ("checkpoint", 10)
    assert [line["step"] for line in facts.log] == [10]
    assert facts.results is None  # those of step 20
    assert facts.first is not None and facts.config["moe"] == {"num_experts": 3}
    assert facts.conflict is not None and facts.conflict[1] == [[1.0, -0.5], [-0.5, 1.0]]
    assert gather(run / "checkpoint-20").results is not None


@pytest.mark.parametrize("name", ["checkpoint-20", "kept"])
def test_a_checkpoint_outside_its_run(run: Path, tmp_path: Path, name: str) -> None:
    copied = shutil.copytree(run / "checkpoint-20", tmp_path / "elsewhere" / name)
    facts = gather(copied)
    assert (facts.kind, facts.step) == ("checkpoint", 20)
    assert facts.log == [] and facts.results is None and facts.first is None and facts.conflict is None
    assert facts.config["moe"]["gate"] == "softmax"
    assert torch.equal(facts.snapshot.gates["layer.0"], GATES["layer.0"])


def test_a_saved_adapter_even_beside_a_run(run: Path) -> None:
    saved = run / "saved"
    shutil.copytree(run / "checkpoint-20", saved)
    for name in ("manifest.json", "trainer_state.json"):
        (saved / name).unlink()
    facts = gather(saved)
    assert (facts.kind, facts.step, facts.log, facts.first) == ("adapter", None, [], None)
    assert facts.config["moe"]["router"] == "task_table"


def test_results_of_an_earlier_end_are_not_shown(run: Path) -> None:
    results = run / "eval_results.json"
    results.write_text(results.read_text().replace('"step": 20', '"step": 10'))
    assert gather(run).results is None


def test_the_last_values_of_a_log(run: Path) -> None:
    last = latest(gather(run).log)
    assert last["train/loss"] == 0.5 and last["step"] == 30 and math.isnan(last["train/loss/task-0"])


def damage(run: Path) -> Path:
    path = run / "checkpoint-20" / "routing.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    return run


def half_written(run: Path) -> Path:
    return (run / "checkpoint-20").rename(run / "checkpoint-20.tmp")


def old(run: Path) -> Path:
    saved = run.parent / "saved"
    shutil.copytree(run / "checkpoint-20", saved)
    for name in ("manifest.json", "routing.safetensors"):
        (saved / name).unlink()
    return saved


def empty(run: Path) -> Path:
    (run / "empty").mkdir()
    return run / "empty"


def broken_results(run: Path) -> Path:
    (run / "eval_results.json").write_text('{"step"')
    return run


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: run.parent / "rum", "rum: no such folder; the nearest is .*run$"),
        (lambda run: run.parent / "far" / "away", "away: no such folder$"),
        (lambda run: run / "config.yaml", "config.yaml: a file; give the folder"),
        (lambda run: run.parent, "neither a run folder .*; there are run$"),
        (empty, r"empty: neither a run folder \(config.yaml\), a checkpoint .* nor a saved adapter"),
        (half_written, "checkpoint-20.tmp: a checkpoint that was not written to its end$"),
        (lambda run: half_written(run).parent, "has not saved a checkpoint yet; checkpoint-20.tmp was not"),
        (damage, "no whole checkpoint in .*: .*checkpoint-20: routing.safetensors is not as it was written"),
        (lambda run: damage(run) / "checkpoint-20", "checkpoint-20 is damaged: routing.safetensors is not"),
        (old, "saved: it has no routing.safetensors: an older version saved it"),
        (broken_results, "eval_results.json: not a readable JSON object"),
    ],
)  # fmt: skip
def test_folders_that_tell_nothing(run: Path, spoil: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(FactsError, match=message) as error:
        gather(spoil(run))
    assert "\n" not in str(error.value) and "resume" not in str(error.value)


def test_a_file_that_is_no_routing_is_named(run: Path) -> None:
    (run / "routing" / "step-0.safetensors").write_bytes(b"no")
    with pytest.raises(SnapshotError, match=r"step-0\.safetensors"):
        gather(run)
