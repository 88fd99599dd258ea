from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import SkillGymConfig
from taskmoe.train.data.skill_gym import ALPHABET, SKILLS, SkillGym

SMALL = SkillGymConfig(train_rows=200, validation_rows=40, test_rows=40)


def gym(**settings: Any) -> SkillGym:
    return SkillGym(dataclasses.replace(SMALL, **settings))


def text(row: dict[str, Any]) -> str:
    return row["prompt"].removesuffix(" >").replace(" ", "")


def digest(one: SkillGym) -> str:
    content = [[t.name, t.skills, t.family, one.rows(t, "train"), one.rows(t, "test")] for t in one.tasks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@pytest.mark.parametrize(
    ("skill", "answers"),
    [
        ("reverse", {"abc": "cba", "ab": "ba"}),
        ("rotate", {"abcd": "bcda"}),
        ("swap", {"abcde": "badce", "abcd": "badc"}),
        ("halves", {"abcd": "cdab", "abcde": "cdeab"}),
        ("drop", {"abc": "bc"}),
        ("double", {"abc": "abcc"}),
        ("ends", {"abcd": "dbca", "ab": "ba"}),
        ("shift", {"apo": "bap"}),
        ("mirror", {"apb": "pao"}),
        ("pair", {"abcdp": "badco"}),
        ("jump", {"ahip": "ipah"}),
        ("triple", {"adp": "nam"}),
    ],
)
def test_skills_on_sixteen_letters(skill: str, answers: dict[str, str]) -> None:
    one = gym()
    for question, answer in answers.items():
        assert one.apply([skill], question) == answer


def test_an_odd_letter_of_an_odd_alphabet_has_no_pair() -> None:
    assert gym(alphabet_size=5).apply(["pair"], "abcde") == "badce"


def test_every_skill_is_tested() -> None:
    tested = test_skills_on_sixteen_letters.pytestmark[0].args[1]
    assert {skill for skill, _ in tested} == set(SKILLS)


def test_compositions_apply_from_left_to_right() -> None:
    """Two operations written again, in another way: rotate, then reverse; and shift, then mirror."""
    one = gym()
    for task in (("rotate", "reverse"), ("shift", "mirror")):
        for question in ("abcdefgh", "pon", "aabbc"):
            answer = question
            for skill in task:
                if skill == "rotate":
                    answer = "".join(answer[(i + 1) % len(answer)] for i in range(len(answer)))
                elif skill == "reverse":
                    answer = "".join(reversed(answer))
                elif skill == "shift":
                    answer = answer.translate(str.maketrans(ALPHABET[:16], ALPHABET[1:16] + "a"))
                else:
                    answer = answer.translate(str.maketrans(ALPHABET[:16], ALPHABET[:16][::-1]))
            assert one.apply(task, question) == answer
    assert one.apply(("rotate", "reverse"), "abcd") != one.apply(("reverse", "rotate"), "abcd")


def test_rows_hold_the_tasks_answers() -> None:
    one = gym()
    for task in one.tasks:
        for row in one.rows(task, "validation"):
            assert row["prompt"].endswith(" >")
            assert str(row["target"]).replace(" ", "") == one.apply(task, text(row))
            assert 3 <= len(text(row)) <= 8
            assert set(text(row)) <= set(ALPHABET[:16])


def test_no_string_stands_in_two_splits() -> None:
    one = gym(num_tasks=12, min_string_length=2, max_string_length=3)  # few strings: tasks do share some
    strings = {
        split: [text(row) for task in one.tasks for row in one.rows(task, split)]
        for split in ("train", "validation", "test")
    }
    for a, b in itertools.combinations(strings, 2):
        assert not set(strings[a]) & set(strings[b])
    assert len(set(strings["train"])) < len(strings["train"])
    for task in one.tasks:
        train = [text(row) for row in one.rows(task, "train")]
        assert len(set(train)) == len(train) == 200


def test_tasks_are_distinct_functions_and_no_single_skill() -> None:
    for settings in ({}, {"num_tasks": 20}, {"num_skills": 12, "num_tasks": 64}, {"correlation": 1.0}):
        one = gym(**settings)
        probes = [text(row) for row in one.rows(one.tasks[0], "train")]
        answers = {t.name: [one.apply(t, p) for p in probes] for t in one.tasks}
        answers |= {skill: [one.apply([skill], p) for p in probes] for skill in one.skills}
        answers["nothing"] = probes
        for task in one.tasks:
            assert len(set(task.skills)) == 2
            for name, other in answers.items():
                same = sum(x == y for x, y in zip(answers[task.name], other, strict=True))
                assert name == task.name or same < 0.85 * len(probes), (task.name, name)


def test_the_default_has_twelve_tasks_that_use_all_skills() -> None:
    one = SkillGym(SkillGymConfig())
    matrix = one.skill_matrix()
    assert (len(matrix), len(matrix[0])) == (12, 6)
    assert all(sum(row) == 2 for row in matrix)
    assert all(sum(column) > 0 for column in zip(*matrix, strict=True))
    for task, row in zip(one.tasks, matrix, strict=True):
        assert {skill for skill, used in zip(one.skills, row, strict=True) if used} == set(task.skills)
    assert one.families == {"order": ["reverse", "rotate", "swap"], "letters": ["shift", "mirror", "pair"]}
    assert {t.family for t in one.tasks} == set(one.families)


def test_correlation_makes_families_share_skills() -> None:
    def own_share(correlation: float) -> float:
        shares = []
        for seed in range(5):
            one = gym(num_skills=8, num_tasks=16, correlation=correlation, seed=seed)
            shares += [sum(s in one.families[t.family] for s in t.skills) / 2 for t in one.tasks]
        return sum(shares) / len(shares)

    low, middle, high = own_share(0.0), own_share(0.6), own_share(1.0)
    assert 0.35 < low < 0.65
    assert low + 0.1 < middle < high - 0.05
    assert high > 0.9


def test_large_families_are_split() -> None:
    one = gym(num_skills=12)
    assert sorted(skill for family in one.families.values() for skill in family) == sorted(one.skills)
    assert set(one.families) == {"order-1", "order-2", "letters-1", "letters-2"}


def test_the_same_in_another_process_and_another_with_another_seed() -> None:
    code = (
        "import dataclasses, hashlib, json\n"
        "from taskmoe.train.config import SkillGymConfig\n"
        "from taskmoe.train.data.skill_gym import SkillGym\n"
        "one = SkillGym(SkillGymConfig(train_rows=200, validation_rows=40, test_rows=40))\n"
        "content = [[t.name, t.skills, t.family, one.rows(t, 'train'), one.rows(t, 'test')]\n"
        "           for t in one.tasks]\n"
        "print(hashlib.sha256(json.dumps(content).encode()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest(gym())
    assert digest(gym(seed=1)) != digest(gym())


def test_the_task_is_shown_or_hidden() -> None:
    hidden, shown = gym(), gym(task_visible=True)
    for a, b in zip(hidden.tasks, shown.tasks, strict=True):
        first, second = hidden.rows(a, "test")[0], shown.rows(b, "test")[0]
        assert second["prompt"] == f"{b.name} {first['prompt']}"
        assert second["target"] == first["target"]
        assert not set(str(first["prompt"])) - set(ALPHABET[:16] + " >")


def test_without_rivals_every_byte_is_as_it_was_before_there_were_any() -> None:
    was = "ad46d66f4eae3d86498cce23309a033e1079955facec92f36a64bed1a5c3d679"
    assert digest(gym()) == digest(gym(rivals=1, conflict=0.25)) == was


@pytest.mark.parametrize(("conflict", "apart"), [(1.0, 6), (0.5, 3), (0.2, 1), (0.0, 0)])
def test_rivals_answer_differently_in_exactly_the_first_letters(conflict: float, apart: int) -> None:
    one = gym(num_tasks=6, rivals=3, conflict=conflict, max_string_length=6, min_string_length=6)
    assert [t.places for t in one.tasks] == [0, 5, 10, 0, 5, 10]
    assert len({t.name for t in one.tasks}) == 6
    for first in (0, 3):
        tasks = one.tasks[first : first + 3]
        assert len({t.skills for t in tasks}) == len({t.family for t in tasks}) == 1
        for row in one.rows(tasks[0], "test"):
            answers = [one.apply(t, text(row)) for t in tasks]
            assert answers[0] == one.apply(tasks[0].skills, text(row))
            for a, b in itertools.combinations(answers, 2):
                assert [x != y for x, y in zip(a, b, strict=True)] == [True] * apart + [False] * (6 - apart)
    assert one.tasks[0].skills != one.tasks[3].skills


def test_rivals_come_as_far_as_there_are_tasks_and_no_other_task_is_one_of_them() -> None:
    one = gym(num_tasks=7, unseen_tasks=1, rivals=3, num_skills=8, skills_per_task=1)
    assert [t.places for t in [*one.tasks, *one.unseen]] == [0, 5, 10, 0, 5, 10, 0, 5]
    probes = [text(row) for row in one.rows(one.tasks[0], "train")]
    answers = [[one.apply(t, p) for p in probes] for t in one.tasks]
    for a, b in itertools.combinations(answers, 2):
        assert sum(x != y for x, y in zip(a, b, strict=True)) > 0.2 * len(probes)


def test_unseen_tasks_are_further_compositions_on_the_same_split() -> None:
    one = gym(unseen_tasks=4)
    assert (len(one.tasks), len(one.unseen)) == (12, 4)
    assert [t.name for t in one.tasks] == [t.name for t in gym().tasks]
    assert not {t.skills for t in one.tasks} & {t.skills for t in one.unseen}
    trained = {text(row) for t in one.tasks for row in one.rows(t, "train")}
    assert not trained & {text(row) for t in one.unseen for row in one.rows(t, "test")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tasks": 40}, "data.skill_gym: 40 tasks, but 6 skills give only"),
        ({"num_skills": 99}, "data.skill_gym.num_skills: 99 is out of range; give a value from 1 to 12"),
        ({"skills_per_task": 7}, "data.skill_gym.skills_per_task: 7 is out of range"),
        (
            {"alphabet_size": 60},
            "data.skill_gym.alphabet_size: 60 is out of range; give a value from 2 to 52",
        ),
        ({"min_string_length": 1}, "data.skill_gym.min_string_length: 1 is out of range"),
        ({"min_string_length": 9}, "data.skill_gym.min_string_length: 9 is out of range"),
        ({"rivals": 17}, "data.skill_gym.rivals: 17 is out of range; give a value from 1 to 16"),
        ({"rivals": 2, "conflict": 1.5}, "data.skill_gym.conflict: 1.5 is out of range"),
        ({"correlation": 1.5}, "data.skill_gym.correlation: 1.5 is out of range"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        gym(**settings)
    assert str(error.value).startswith(words)


def test_too_few_strings_for_the_rows() -> None:
    one = gym(alphabet_size=3, max_string_length=3, num_tasks=2)
    with pytest.raises(ConfigError, match=r"data\.skill_gym\.train_rows: 200 rows, but only about"):
        one.rows(one.tasks[0], "train")
