"""The table of tasks: ids, slugs, nearest names, prefixes, the file."""

from __future__ import annotations

import json
import re

import pytest

from taskmoe.moe import Task, TaskError, TaskTable
from taskmoe.moe.tasks import slugify


def labelled(*rows):
    table = TaskTable()
    for name, labels in rows:
        table.add(name, labels)
    return table


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("sum", "sum"),
        ("Boolean QA", "boolean-qa"),
        ("stance/abortion", "stance-abortion"),
        ("../../etc/passwd", "etc-passwd"),
        ("a_b-c", "a_b-c"),
        ("  spaced  ", "spaced"),
        ("情感", "task"),
        ("Überprüfung", "berpr-fung"),
        ("x" * 200, "x" * 56),
    ],
)
def test_slugs_are_safe_in_paths_and_metric_keys(name, slug):
    assert slugify(name) == slug
    assert re.fullmatch(r"[a-z0-9_-]{1,64}", slug)


def test_slugs_are_unique():
    table = TaskTable.from_names(["QA", "qa", "q a", "q-a", "情感", "感情", "x" * 100, "x" * 101])
    slugs = [t.slug for t in table]
    assert slugs == ["qa", "qa-2", "q-a", "q-a-2", "task", "task-2", "x" * 56, "x" * 56 + "-2"]


def test_no_slug_is_a_word_that_stands_beside_tasks():
    table = TaskTable.from_names(["Macro", "score", "scores"])
    assert [t.slug for t in table] == ["macro-2", "score-2", "scores"]


def test_ids_are_positions():
    table = TaskTable.from_names(["a", "b"])
    assert table.add("c", ["no", "yes"], group="g") == 2
    assert [table.id(n) for n in "abc"] == [0, 1, 2]
    assert table[2] == Task("c", "c", ("no", "yes"), "g")
    assert table.names == ["a", "b", "c"]
    assert "b" in table
    assert "d" not in table
    assert len(table) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a"], "'a' is in the table twice"),
        (["a", ""], "task name '' is not a text"),
        (["  "], "not a text with letters"),
        (["half \ud800"], "holds half a character"),
        ([3], "task name 3 is not a text"),
        ([None], "task name None is not a text"),
        ("qa", "tasks are 'qa', one string; give a list"),
    ],
)
def test_names_that_cannot_be_used(names, message):
    with pytest.raises(TaskError, match=message):
        TaskTable.from_names(names)


def test_an_unknown_task_offers_the_nearest():
    table = TaskTable.from_names(["sentiment", "emotion", "hate"])
    with pytest.raises(TaskError, match="unknown task 'sentimant'; the nearest of 3 are sentiment"):
        table.id("sentimant")
    with pytest.raises(TaskError, match="sentiment, emotion, hate"):
        table.id("zzz")
    with pytest.raises(TaskError, match="none"):
        TaskTable().id("a")


OLD = (("a", None), ("b", ["x", "y"]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (OLD, None),
        ((*OLD, ("c", None)), None),
        ((("a", ["l"]), OLD[1]), None),  # labels that the checkpoint did not have
        (OLD[:1], "tasks that are missing here: b; tasks only grow"),
        ((), "missing here: a, b"),
        ((OLD[1], OLD[0]), "task 0 is 'b' here but 'a' in the checkpoint"),
        ((OLD[0], ("renamed", ["x", "y"])), "task 1 is 'renamed' here but 'b'"),
        ((OLD[0], ("b", ["y", "x"])), r"task 'b' has labels \('y', 'x'\) here but \('x', 'y'\)"),
        ((OLD[0], ("b", ["x", "y", "z"])), "task 'b' has labels"),
        ((OLD[0], ("b", None)), "task 'b' has labels None here"),
    ],
)
def test_a_checkpoints_table_must_come_first(rows, message):
    old, new = labelled(*OLD), labelled(*rows)
    if message is None:
        old.require_prefix_of(new)
        return
    with pytest.raises(TaskError, match=message):
        old.require_prefix_of(new)


def test_the_file_brings_the_table_back(tmp_path):
    table = labelled(("Boolean QA", None), ("情感", ["负面", "正面"]))
    table.add("c", group="family")
    table.save(tmp_path / "task_map.json")
    again = TaskTable.load(tmp_path / "task_map.json")
    assert again == table
    assert [t.slug for t in again] == ["boolean-qa", "task", "c"]
    assert "情感" in (tmp_path / "task_map.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"3",
        b'{"name": "a"}',
        b'[{"name": "a"}]',
        b'[{"slug": "a"}]',
        b'["a"]',
        b'[{"name": "a", "slug": 3}]',
        b'[{"name": "a", "slug": "../a"}]',
        b'[{"name": "a", "slug": "a", "labels": 3}]',
        b'[{"name": "a", "slug": "s"}, {"name": "b", "slug": "s"}]',
        b"\xff\xfe",
    ],
)
def test_a_broken_file_is_one_clear_error(content, tmp_path):
    path = tmp_path / "task_map.json"
    path.write_bytes(content)
    with pytest.raises(TaskError):
        TaskTable.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"nowhere\.json: not a readable task table"):
        TaskTable.load(tmp_path / "nowhere.json")


def test_tables_differ_by_their_tasks():
    assert labelled(*OLD) == labelled(*OLD)
    assert labelled(*OLD) != labelled(("a", None), ("b", ["x"]))
    with pytest.raises(TypeError):
        hash(TaskTable())


def test_the_file_is_plain_json(tmp_path):
    labelled(*OLD).save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())[1] == {
        "name": "b", "slug": "b", "labels": ["x", "y"], "group": None,
    }  # fmt: skip
