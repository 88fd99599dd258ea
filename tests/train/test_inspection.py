"""``taskmoe inspect``: what it finds in planted routings, the same fields for all, and what it prints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taskmoe.train import cli
from taskmoe.train.inspection import ARMS, METHOD, describe, narrowed
from taskmoe.train.track.facts import FactsError, gather

# Tasks 0 and 1 share experts, tasks 2 and 3 share others; nobody uses expert 3 of the first layer.
LETTERS, DIGITS = [0.7, 0.3, 0.0, 0.0], [0.0, 0.2, 0.8, 0.0]
PLANTED = {
    "model.layers.0.q_proj": torch.tensor([LETTERS, LETTERS, DIGITS, DIGITS]).unsqueeze(1),
    "model.layers.1.q_proj": torch.tensor([LETTERS, LETTERS, DIGITS, DIGITS]).flip(-1).unsqueeze(1),
}
UNIFORM = {name: torch.full_like(gates, 0.25) for name, gates in PLANTED.items()}
HEADS = {"all": torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0))}
LOG = [
    (10, "train", {"train/loss": 2.0, "train/loss/task-0": 3.0, "train/tokens/task-0": 10}),
    (20, "train", {"train/loss": 1.0, "train/loss/task-0": 0.5, "train/tokens/task-0": 20,
                   "train/epochs/task-0": 1.5, "weight/task-0": 0.25, "train/weight/task-0": 0.9,
                   "grad/conflict_frac": 0.5, "grad/rows": [["task-0"], ["task-1", "task-2"], ["task-3"]],
                   "grad/cosine_matrix": [[1.0, -0.4, math.nan], [-0.4, 1.0, 0.3], [math.nan, 0.3, 1.0]]}),
    (20, "eval", {"eval/task-0/f1:yes/no": 0.5, "eval/task-0/metric": "f1:yes/no", "eval/task-0/loss": 0.7,
                  "eval/score": 0.5}),
]  # fmt: skip
SCORES = {f"Task {i}": 0.5 for i in range(4)}


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    return make_run("run", PLANTED, first=UNIFORM, log=LOG, scores=SCORES)


def shape(value: Any) -> Any:
    """The keys of an object, at any depth; items of lists and mappings by name alike."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return None


def test_the_planted_clusters_are_found(run: Path) -> None:
    found = describe(gather(run))
    assert {frozenset(names) for names in found["clusters"]["members"]} == {
        frozenset({"Task 0", "Task 1"}), frozenset({"Task 2", "Task 3"})}  # fmt: skip
    labels = found["clusters"]["labels"]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert [task["cluster"] for task in found["tasks"]] == labels
    assert found["clusters"]["silhouette"] == pytest.approx(1.0)
    assert found["clusters"]["against_groups"]["adjusted_rand_index"] == 1.0
    assert found["tasks"][0]["nearest"] == {"task": "Task 1", "cosine": pytest.approx(1.0)}


def test_tasks_that_are_routed_alike_are_one_cluster(make_run: Callable[..., Path]) -> None:
    found = describe(gather(make_run("run", UNIFORM)))
    assert found["clusters"]["members"] == [found["clusters"]["order"]]
    assert found["clusters"]["number"] == 1 and found["clusters"]["silhouette"] is None


def test_noise_is_no_clusters(make_run: Callable[..., Path]) -> None:
    noise = torch.rand(12, 20, 1, 8, generator=torch.Generator().manual_seed(0)) ** 2
    gates = {f"layer.{i}": gates for i, gates in enumerate(noise)}
    found = describe(gather(make_run("run", gates, groups=[None] * 20)))
    assert found["routing"]["between_tasks"] > 0.05 and found["clusters"]["number"] == 1
    assert 0 < found["clusters"]["silhouette"] < 0.25


def test_two_tasks_that_differ_are_two_clusters(make_run: Callable[..., Path]) -> None:
    gates = {"all": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])}
    found = describe(gather(make_run("run", gates, groups=(None, None))))
    assert found["clusters"]["number"] == 2 and found["clusters"]["against_groups"]["p_value"] is None


def test_experts_and_their_tasks(run: Path) -> None:
    found = describe(gather(run))
    first = found["groups"]["model.layers.0.q_proj"]
    assert [first[key] for key in ("num_experts", "num_heads", "heads", "dead_experts")] == [4, 1, [], 1]
    assert first["experts"][0]["share"] == pytest.approx(0.35)
    users = first["experts"][2]["tasks"]
    assert {user["task"] for user in users} == {"Task 2", "Task 3"}
    assert [user["share"] for user in users] == pytest.approx([0.8, 0.8])
    assert first["experts"][3] == {"share": 0.0, "tasks": []}
    tops = found["tasks"][3]["top_experts"]
    assert [(top["group"], top["expert"]) for top in tops[:2]] in (
        [("model.layers.0.q_proj", 2), ("model.layers.1.q_proj", 1)],
        [("model.layers.1.q_proj", 1), ("model.layers.0.q_proj", 2)],
    )
    assert [top["share"] for top in tops] == pytest.approx([0.8, 0.8, 0.2])


def test_of_equal_shares_those_come_first_that_others_do_not_use(make_run: Callable[..., Path]) -> None:
    alike, apart = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    gates = {"alike": alike.unsqueeze(1), "apart": apart.unsqueeze(1)}
    tops = describe(gather(make_run("run", gates)))["tasks"][3]["top_experts"]
    assert tops == [  # and none without a share
        {"group": "apart", "head": 0, "expert": 1, "share": 1.0},
        {"group": "alike", "head": 0, "expert": 0, "share": 1.0},
    ]


def test_what_the_log_says_of_a_task(run: Path) -> None:
    task, other = describe(gather(run))["tasks"][:2]
    assert (
        task["first_loss"] == 3.0 and task["loss"] == 0.5 and task["tokens"] == 20 and task["epochs"] == 1.5
    )
    assert task["effective_weight"] == 0.25 and task["loss_weight"] == 0.9
    assert task["metric"] == "f1:yes/no" and task["value"] == 0.5
    assert task["metrics"] == {"f1:yes/no": 0.5, "loss": 0.7}
    assert other["loss"] is None and other["metric"] is None and other["value"] is None


def test_conflicts_and_scores(run: Path) -> None:
    found = describe(gather(run))
    assert found["conflicts"]["pairs"] == [
        {"tasks": ["Task 0"], "others": ["Task 1", "Task 2"], "cosine": -0.4}
    ]
    assert found["conflicts"]["conflict_frac"] == 0.5 and found["conflicts"]["cosine"] is None
    assert found["scores"] == {"experts": 0.5, "disabled": None, "uniform": None}
    assert found["loss"] == 1.0 and found["routing"]["drift"] > 0.3
    assert any("Task 0 and Task 1 + Task 2 (-0.40)" in verdict for verdict in found["verdicts"])


def unseen(gates: Tensor) -> Tensor:
    return torch.cat([gates[:3], torch.full_like(gates[3:], torch.nan)])


CASES: dict[str, tuple[str, dict[str, Tensor]]] = {
    "task level": ("task", PLANTED),
    "heads": ("task", HEADS),
    "token level": ("token", {name: unseen(gates) for name, gates in PLANTED.items()}),
    "nothing seen": ("token", {"all": torch.full((4, 1, 3), torch.nan)}),
    "no routing": ("none", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_has_the_same_fields(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], run: Path, case: str
) -> None:
    level, gates = CASES[case]
    path = make_run("other", gates, level=level) / "checkpoint-20"
    expected = describe(gather(run))
    assert cli.main(["inspect", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found["level"] == level
    for key in expected.keys() | found.keys():  # groups go by names that differ
        assert key == "groups" or shape(found[key]) == shape(expected[key]), key
    assert [task.keys() for task in found["tasks"]] == [task.keys() for task in expected["tasks"]]
    some = expected["groups"]["model.layers.0.q_proj"]
    for group in found["groups"].values():
        assert group.keys() == some.keys()
        assert [expert.keys() for expert in group["experts"]] == [{"share", "tasks"}] * group["num_experts"]
    assert found["method"].keys() == set(METHOD) and found["scores"].keys() == set(ARMS)


def test_heads_have_numbers_of_their_own(make_run: Callable[..., Path]) -> None:
    group = describe(gather(make_run("run", HEADS)))["groups"]["all"]
    assert group["num_heads"] == 2 and len(group["heads"]) == 2
    entropies = [head["entropy"] for head in group["heads"]]
    assert entropies[0] != entropies[1] and sum(entropies) / 2 == pytest.approx(group["entropy"])


def test_a_task_that_was_not_seen(make_run: Callable[..., Path]) -> None:
    level, gates = CASES["token level"]
    found = describe(gather(make_run("run", gates, level=level)))
    last = found["tasks"][3]
    assert (last["cluster"], last["nearest"], last["top_experts"]) == (None, None, [])
    assert {name for names in found["clusters"]["members"] for name in names} == {
        "Task 0",
        "Task 1",
        "Task 2",
    }
    users = found["groups"]["model.layers.0.q_proj"]["experts"][2]["tasks"]
    assert all(user["task"] != "Task 3" for user in users)


# -- --layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["layers.1", "*.1.q_proj", "model.layers.[1]*"])
def test_one_layer(run: Path, pattern: str) -> None:
    facts = narrowed(gather(run), pattern)
    assert list(facts.snapshot.gates) == ["model.layers.1.q_proj"]
    assert facts.first is not None and list(facts.first.gates) == ["model.layers.1.q_proj"]


def test_a_layer_that_is_not_there(run: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(FactsError, match=r"'layers.7'; the nearest of 2 are model\.layers"):
        narrowed(gather(run), "layers.7")
    with pytest.raises(FactsError, match=r"no routing group of .* it has none"):
        narrowed(gather(make_run("bare", {}, level="none")), "layers.7")


# -- the page of text -------------------------------------------------------------------------------------


def page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["inspect", *argv]) == 0
    return capsys.readouterr().out


def test_the_page_begins_with_what_it_means(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = page(capsys, monkeypatch, str(run)).splitlines()
    assert lines[0].endswith("run (run, step 20)")
    summary = "router task_table; gate softmax; 4 tasks, 2 routing groups; training loss 1.0000"
    assert lines[1] == f"{summary}; 50 % of pairs of tasks conflict; score: experts 0.5000"
    assert lines[2].startswith("- Routing is not uniform")
    text = "\n".join(lines)
    for heading in ("routing groups", "experts", "tasks", "clusters of tasks", "tasks that disagree most"):
        assert re.search(rf"^{heading}", text, re.MULTILINE)
    assert re.search(r"Task 3 .* Task 2 1\.00 .*0/2 0\.80", text)


def test_names_are_text_and_not_markup(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run", {"[red]all": torch.rand(4, 1, 3)}, groups=("[bold]", "[/]", None, None))
    text = page(capsys, monkeypatch, str(run))
    assert "[red]all" in text and "[bold]" in text and "[/]" in text


def test_many_groups_and_tasks_are_put_together(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{i}.{part}" for i in range(30) for part in ("q_proj", "v_proj")]
    gates = {name: torch.rand(50, 1, 3) for name in names}
    text = page(capsys, monkeypatch, str(make_run("run", gates, groups=[None] * 50)))
    assert "60 routing groups put together: means" in text and "tasks: 40 of 50" in text
    assert re.search(r"│ model\.layers\.29 +│", text) and "q_proj │" not in text


# -- errors and files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["inspect"], "inspect: RUN is missing"),
        (["inspect", "{run}", "{run}"], "inspect: unexpected argument"),
        (["inspect", "{run}", "--jsn"], "inspect: unexpected argument '--jsn'"),
        (["inspect", "{run}", "--layer"], "--layer: a value is missing"),
        (["inspect", "{run}s"], "runs: no such folder; the nearest is"),
        (["inspect", "{run}", "--layer", "none"], "--layer: no routing group"),
        (["inspect", "{run}", "--html", "far/away.html"], "--html: far/away.html lies in a folder that does"),
        (["inspect", "{run}", "--html", "{run}"], "is a folder; give the path of a file"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_user_errors(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert cli.main([token.replace("{run}", str(run)) for token in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def fields(value: Any, free: frozenset[str]) -> set[str]:
    """All names of fields of an object at any depth; what stands under ``free`` ones goes by other names."""
    if isinstance(value, list):
        return {name for item in value for name in fields(item, free)}
    if not isinstance(value, dict):
        return set()
    below = [item for key, item in value.items() if key not in free]
    return set(value).union(*(fields(item, free) for item in below))


def test_every_field_is_documented(run: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "TRACKING.md").read_text(encoding="utf-8")
    section = text.partition("## inspect --json")[2].partition("\n## ")[0]
    documented = set(re.findall(r"[`.]([a-z_]+)(?:\[\])?`", section))
    documented |= set(
        re.findall(r"`(?:routing/)?([a-z_]+)`", text.partition("## Keys")[2].partition("\n## ")[0])
    )
    found = describe(gather(run))
    names = fields(found, frozenset({"groups", "metrics"})) | fields(
        list(found["groups"].values()), frozenset()
    )
    assert len(names) > 50 and names <= documented, names - documented
