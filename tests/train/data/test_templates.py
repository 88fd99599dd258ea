from __future__ import annotations

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.templates import Template


def test_columns_are_placeholders_and_line_ends_stay() -> None:
    template = Template("{{ premise }} | {{ hypothesis | upper }}\n")
    assert template.render({"premise": "a < b", "hypothesis": "c"}, "f:1") == "a < b | C\n"


def test_a_missing_column_names_it_the_template_and_the_columns() -> None:
    with pytest.raises(DataError) as error:
        Template("{{ premise }} {{ hypotesis }}").render({"premise": "a", "hypothesis": "b"}, "f.jsonl:7")
    text = str(error.value)
    assert text.startswith("f.jsonl:7: template '{{ premise }} {{ hypotesis }}'")
    assert "'hypotesis' is undefined" in text
    assert "premise, hypothesis" in text


def test_a_syntax_error_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.template: .*line 1"):
        Template("{{ a ", "datasets[0].template")


@pytest.mark.parametrize(
    "source",
    ["{{ text.__class__.__mro__[1].__subclasses__() }}", "{{ turns.append('x') }}", "{{ 1 / 0 }}"],
)
def test_templates_reach_nothing_outside_the_row(source: str) -> None:
    turns: list[str] = []
    with pytest.raises(DataError, match="f:1"):
        Template(source).render({"text": "x", "turns": turns}, "f:1")
    assert turns == []
