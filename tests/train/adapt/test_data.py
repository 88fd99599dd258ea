"""Which rows are shots, and which tasks are new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from taskmoe.train.adapt.data import draw_shots, read_new_tasks
from taskmoe.train.adapt.settings import AdaptError, AdaptSettings
from taskmoe.train.config import DatasetConfig, SkillGymConfig
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.skill_gym import SkillGym
from taskmoe.train.trained_run import open_run


def split_of(labels: list[str | None]) -> TaskSplit:
    raw = [{"prompt": f"p{i}", "label": label} for i, label in enumerate(labels)]
    return TaskSplit(0, datasets.Dataset.from_dict({"length": [1] * len(labels)}), raw)


def test_fewer_shots_are_among_more_and_seeds_differ():
    split = split_of([None] * 40)
    few, many = (draw_shots(split, "a", n, 3, validation=0.0).train for n in (8, 32))
    assert many[:8] == few and len(set(many)) == 32
    assert draw_shots(split, "a", 8, 4, validation=0.0).train != few
    assert draw_shots(split, "b", 8, 3, validation=0.0).train != few
    assert sorted(draw_shots(split, "a", None, 3).all) == list(range(40))


@pytest.mark.parametrize(
    ("shots", "share", "kept"), [(16, 0.25, 4), (2, 0.1, 1), (2, 0.9, 1), (1, 0.25, 0), (16, 0.0, 0)]
)
def test_a_share_is_kept_apart(shots, share, kept):
    found = draw_shots(split_of([None] * 20), "a", shots, 0, share)
    assert len(found.validation) == kept and len(found.train) == shots - kept
    assert not set(found.train) & set(found.validation)


def test_labels_come_by_turns_as_far_as_they_go():
    split = split_of(["yes"] * 30 + ["no"] * 30 + ["rare"] * 2)
    found = [split.raw[i]["label"] for i in draw_shots(split, "a", 12, 0).all]
    assert {label: found.count(label) for label in ("yes", "no", "rare")} == {"yes": 5, "no": 5, "rare": 2}


def test_more_shots_than_rows():
    with pytest.raises(AdaptError, match="--shots 9: task 'a' has 8 training rows"):
        draw_shots(split_of([None] * 8), "a", 9, 0)


def test_new_tasks_stand_behind_those_of_the_run(run, settings):
    new = read_new_tasks(open_run(run), settings())
    assert new.table.names == ["apple", "berry", "citrus", "date"] and new.ids == [2, 3]
    assert [len(s.tokens) for s in new.bundle.splits["train"]] == [0, 0, 12, 12]
    assert [d.name for d in new.config.datasets] == ["apple", "berry", "citrus", "date"]
    assert new.config.data.root is None and new.eval_split == "test"


def test_a_folder_of_tasks(run, new_tasks, settings):
    root = str(Path(new_tasks[0].path).parent)
    new = read_new_tasks(open_run(run), settings(datasets=(), root=root))
    assert new.table.names[2:] == ["citrus", "date"]


def test_a_task_of_the_run_is_not_new(run, new_tasks, settings):
    with pytest.raises(AdaptError, match="'apple' is a task of the run"):
        read_new_tasks(open_run(run), settings(datasets=(replace(new_tasks[0], name="apple"), new_tasks[1])))


def test_rows_to_score_are_needed(run, new_tasks, settings):
    only = DatasetConfig(name="citrus", path=f"{new_tasks[0].path}/train.jsonl")
    with pytest.raises(AdaptError, match="a test split, nor a validation split"):
        read_new_tasks(open_run(run), settings(datasets=(only,)))


def test_unseen_compositions_of_the_gym(run):
    opened = open_run(run)
    gym = SkillGymConfig(num_tasks=3, num_skills=4, alphabet_size=4, max_string_length=4, train_rows=6,
                         validation_rows=0, test_rows=4, unseen_tasks=2)  # fmt: skip
    names = [task.name for task in SkillGym(gym).tasks]
    data = replace(opened.config.data, root=None, skill_gym=gym, on_long_row="truncate")
    table = type(opened.tasks).from_names(names)
    gym_run = replace(opened, config=replace(opened.config, data=data), tasks=table)
    new = read_new_tasks(gym_run, AdaptSettings(skill_gym_unseen=2))
    assert new.table.names[3:] == [task.name for task in SkillGym(gym).unseen]
    assert new.config.data.skill_gym.num_tasks == 5 and new.config.data.skill_gym.unseen_tasks == 0
    with pytest.raises(AdaptError, match=r"the run has no data\.skill_gym"):
        read_new_tasks(opened, AdaptSettings(skill_gym_unseen=2))
