from __future__ import annotations

from typing import Any

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.formats import FORMATS, check_settings, detect, parse_row
from taskmoe.train.data.templates import Template

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]

ROWS: dict[str, dict[str, Any]] = {
    "text_label": {"text": "good", "label": "pos"},
    "input_output": {"input": "one", "output": "1", "accepted": ["1", "1.0", "", "1.0"]},
    "instruction": {"instruction": "add", "input": "1 2", "output": "3"},
    "prompt_completion": {"prompt": "a ->", "completion": " b"},
    "messages": {"messages": TURNS},
    "conversations": {"conversations": SHAREGPT},
    "pairs": {"query": "who", "positive": "he", "negatives": ["she", "", "she", "it"]},
}


def parse(form: str, row: dict[str, Any], task_type: str = "CAUSAL_LM", template: str | None = None) -> Any:
    compiled = None if template is None else Template(template)
    return parse_row(row, "f:3", form, compiled, task_type, labelled=form == "text_label")


@pytest.mark.parametrize("form", FORMATS)
def test_auto_finds_every_format(form: str) -> None:
    assert detect([*ROWS[form], "extra"], False, "f:1") == form


@pytest.mark.parametrize(
    ("form", "prompt", "target", "accepted", "label"),
    [
        ("text_label", "good\n", "pos", ["pos"], "pos"),
        ("input_output", "one\n", "1", ["1", "1.0"], None),
        ("instruction", "add\n1 2\n", "3", ["3"], None),
        ("prompt_completion", "a ->", " b", [" b"], None),
        ("messages", "user: hi\n", "yes?", ["yes?"], None),
        ("conversations", "user: hi\n", "yes?", ["yes?"], None),
    ],
)
def test_every_format_becomes_the_same_row(
    form: str, prompt: str, target: str, accepted: list[str], label: str | None
) -> None:
    messages = TURNS if form in ("messages", "conversations") else None
    assert parse(form, ROWS[form]) == {
        "prompt": prompt, "target": target, "accepted": accepted, "messages": messages, "label": label,
        "where": "f:3",
    }  # fmt: skip


def test_a_line_break_ends_the_prompt_of_a_causal_lm_alone() -> None:
    assert parse("input_output", ROWS["input_output"], "SEQ_2_SEQ_LM")["prompt"] == "one"
    assert parse("input_output", {"input": "one ", "output": "1"})["prompt"] == "one "


def test_an_instruction_needs_no_input() -> None:
    for row in ({"instruction": "go", "output": "x"}, {"instruction": "go", "input": "", "output": "x"}):
        assert parse("instruction", row)["prompt"] == "go\n"


def test_a_template_replaces_the_prompt_and_frees_its_columns() -> None:
    row = {"premise": "a", "hypothesis": "b", "label": 1}
    assert detect(list(row), True, "f:1") == "text_label"
    parsed = parse("text_label", row, template="{{ premise }}? {{ hypothesis }}")
    assert (parsed["prompt"], parsed["label"]) == ("a? b", "1")


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (2.0, "2"), (2.5, "2.5"), (True, "true"), (" pos ", "pos"), (-1, "-1")]
)
def test_labels_become_text(value: Any, text: str) -> None:
    assert parse("text_label", {"text": "x", "label": value})["label"] == text


def test_accepted_may_be_a_cell_of_a_table() -> None:
    row = {"input": "x", "output": "a", "accepted": '["b", "a"]'}
    assert parse("input_output", row)["accepted"] == ["a", "b"]
    assert parse("input_output", {**row, "accepted": ""})["accepted"] == ["a"]


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        ("text_label", {"txt": "x", "label": 1}, "no column 'text' (did you mean 'txt'?)"),
        ("text_label", {"text": "x"}, "no column 'label'; format text_label needs text+label"),
        ("text_label", {"text": "  \n", "label": 1}, "column 'text' is empty"),
        ("text_label", {"text": None, "label": 1}, "column 'text' is null"),
        ("text_label", {"text": "x", "label": " "}, "column 'label' is empty"),
        ("text_label", {"text": "x", "label": float("nan")}, "column 'label' holds float nan"),
        ("text_label", {"text": ["x"], "label": 1}, "column 'text' holds list ['x']"),
        ("text_label", {"text": "x\ud800", "label": 1}, "half a character (U+D800 at 2)"),
        ("input_output", {"input": "x", "output": ""}, "column 'output' is empty"),
        ("input_output", {"input": "x", "output": "y", "accepted": "y"}, "'accepted' must be a list"),
        ("input_output", {"input": "x", "output": "y", "accepted": [["y"]]}, "'accepted' holds list"),
        ("instruction", {"instruction": "x", "input": ["y"], "output": "z"}, "column 'input' holds list"),
        ("messages", {"message": TURNS}, "no column 'messages' (did you mean 'message'?)"),
        ("messages", {"messages": "hi"}, "must be a non-empty list"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] needs the keys 'role' and 'content'"),
        ("messages", {"messages": [{"role": "asistant", "content": "x"}]}, "nearest known is 'assistant'"),
        ("messages", {"messages": TURNS[:1]}, "ends with a turn of 'user'"),
        ("messages", {"messages": TURNS[1:]}, "nothing before the assistant's turn"),
        ("messages", {"messages": [{"role": "user", "content": ""}]}, "messages[0].content is empty"),
        ("conversations", {"conversations": [{"from": "me", "value": "x"}]}, "conversations[0].from is 'me'"),
        ("conversations", {"conversations": [{"from": [1], "value": "x"}]}, "conversations[0].from is [1]"),
        ("conversations", {"conversations": TURNS}, "conversations[0] needs the keys 'from' and 'value'"),
    ],
)  # fmt: skip
def test_bad_rows_say_where_and_what(form: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        parse(form, row)
    assert str(error.value).startswith("f:3: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_rendering_is_an_empty_text() -> None:
    with pytest.raises(DataError, match="f:3: the rendered template is empty"):
        parse("text_label", {"text": "x", "label": 1}, template="{% if false %}x{% endif %}")


def test_columns_of_no_format_list_the_formats() -> None:
    with pytest.raises(DataError, match=r"f:1: columns sentence, label fit no .*text_label \(text\+label\)"):
        detect(["sentence", "label"], False, "f:1")


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.format: 'text_lable' .*did you mean 'text_label'"):
        check_settings("text_lable", False, "CAUSAL_LM", "datasets[0]")
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.template: has no effect"):
        check_settings("messages", True, "CAUSAL_LM", "datasets[0]")
    with pytest.raises(ConfigError, match="SEQ_CLS needs text_label"):
        check_settings("conversations", False, "SEQ_CLS", "datasets[0]")


def test_pairs_keep_their_negatives():
    row = parse("pairs", ROWS["pairs"], "FEATURE_EXTRACTION")
    assert (row["prompt"], row["target"], row["negatives"]) == ("who", "he", ["she", "it"])
    assert "negatives" not in parse("pairs", {"query": "who", "positive": "he"}, "FEATURE_EXTRACTION")
    with pytest.raises(DataError, match="'negatives' has no use for task_type CAUSAL_LM"):
        parse("pairs", ROWS["pairs"])
    with pytest.raises(DataError, match="column 'negatives' must be a list of strings"):
        parse("pairs", {"query": "who", "positive": "he", "negatives": "she"}, "FEATURE_EXTRACTION")


def test_turns_are_no_pairs():
    with pytest.raises(ConfigError, match="messages has no query; task_type FEATURE_EXTRACTION needs pairs"):
        check_settings("messages", False, "FEATURE_EXTRACTION", "datasets[0]")
