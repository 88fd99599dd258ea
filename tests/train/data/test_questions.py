"""Rows without answers: the prompts that training rows have, and where format and template come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from taskmoe.moe import ConfigError
from taskmoe.train.config import Config, DataConfig, DatasetConfig, SkillGymConfig
from taskmoe.train.data.encode import encode_messages
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.formats import parse_row
from taskmoe.train.data.questions import QuestionReader, dataset_of, detect_question, parse_question
from taskmoe.train.data.skill_gym import SkillGym
from taskmoe.train.data.templates import Template

ROWS = [
    ("text_label", {"text": "a b"}, {"label": "x"}),
    ("input_output", {"input": "a b"}, {"output": "x"}),
    ("instruction", {"instruction": "say", "input": "a"}, {"output": "x"}),
    ("instruction", {"instruction": "say"}, {"output": "x"}),
    ("prompt_completion", {"prompt": "a b >"}, {"completion": "x"}),
    ("pairs", {"query": "a b"}, {"positive": "x"}),
]


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("form, question, answer", ROWS)
def test_the_prompt_of_a_row_with_an_answer(form: str, question: dict, answer: dict, task_type: str) -> None:
    expected = parse_row({**question, **answer}, "f:1", form, None, task_type, False)["prompt"]
    assert detect_question(list(question), False, "f:1") == form
    for row in (question, {**question, **answer}):
        found = parse_question(row, "f:1", form, None, task_type)
        assert (found["prompt"], found["target"], found["messages"]) == (expected, "", None)


def test_a_template_takes_any_column() -> None:
    assert detect_question(["premise"], True, "f:1") == "instruction"
    found = parse_question({"premise": "a"}, "f:1", "instruction", Template("{{ premise }}?"), "CAUSAL_LM")
    assert found["prompt"] == "a?"
    with pytest.raises(DataError, match=r"f:1: .*premise"):
        parse_question({"x": "a"}, "f:1", "instruction", Template("{{ premise }}?"), "CAUSAL_LM")


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_turns_up_to_the_question(form: str, char_tokenizer: Any) -> None:
    role, text, user, said = (
        ("role", "content", "user", "assistant") if form == "messages" else ("from", "value", "human", "gpt")
    )
    turns = [{role: user, text: "a"}, {role: said, text: "b"}, {role: user, text: "c"}]
    config = Config(model={"type": "llama"}, datasets=(DatasetConfig(name="t", path="x.jsonl"),))
    reader = QuestionReader(config, char_tokenizer, "t")
    plain = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    ids, _, length = encode_messages(char_tokenizer, [*plain, {"role": "assistant", "content": "dd"}])
    for given in (turns, [*turns, {role: said, text: "an answer"}]):
        _, tokens = reader({form: given}, "f:1")
        assert tokens["input_ids"][: tokens["prompt_length"]] == ids[:length]
    with pytest.raises(DataError, match=r"f:2: .* nothing before the assistant"):
        reader({form: [{role: said, text: "b"}]}, "f:2")


def config_of(*entries: DatasetConfig, **data: Any) -> Config:
    return Config(model={"type": "llama"}, datasets=entries, data=DataConfig(**data))


def test_where_the_template_comes_from() -> None:
    a = DatasetConfig(name="a", path="a.jsonl", template="A {{ x }}")
    b = DatasetConfig(path="b/train.jsonl", format="input_output")
    config = config_of(a, b, template="all {{ x }}")
    assert dataset_of(config, "a").template == "A {{ x }}"
    assert dataset_of(config, "b") == DatasetConfig(format="input_output", template="all {{ x }}")
    with pytest.raises(
        ConfigError, match=r"task 'c' may come from datasets\.0 or datasets\.1.*--datasets\.0\.name"
    ):
        dataset_of(config, "c")
    only = config_of(a, replace(b, task_column=""))
    assert dataset_of(only, "c").template == "A {{ x }}", "the other has no column of tasks"
    assert dataset_of(config_of(a, root="data"), "c") == DatasetConfig()
    assert dataset_of(config_of(a, root="data"), "a").template == "A {{ x }}"


def test_built_in_tasks_have_no_template() -> None:
    gym = SkillGymConfig(num_tasks=3, num_skills=3)
    config = config_of(DatasetConfig(name="a", path="a.jsonl"), skill_gym=gym, template="{{ x }}")
    for task in SkillGym(gym).tasks:
        assert dataset_of(config, task.name) == DatasetConfig(format="prompt_completion")
