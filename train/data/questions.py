"""Rows whose answers are asked for, one at a time: read as the training rows of a task were.

Settings come from the run: its data need not be there any more.
"""

from __future__ import annotations

import json
from typing import Any

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config, DatasetConfig
from taskmoe.train.data.encode import Encoder
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.formats import (
    FORMATS,
    TURNS,
    Row,
    canonical,
    check_settings,
    prompt_of,
    render_turns,
    turns_of,
)
from taskmoe.train.data.skill_gym import SkillGym
from taskmoe.train.data.sources import default_name
from taskmoe.train.data.templates import Template


def dataset_of(config: Config, task: str) -> DatasetConfig:
    """The format and template with which the rows of a task were read; the defaults where nothing says.

    Raises:
        ConfigError: it may be one of several that differ.
    """
    gym = config.data.skill_gym if config.data.root is None else None
    if gym is not None and task in [t.name for t in SkillGym(gym).tasks]:
        return DatasetConfig(format="prompt_completion")
    entries = [(f"datasets.{i}", entry) for i, entry in enumerate(config.datasets)]
    named = [(key, entry) for key, entry in entries if (entry.name or default_name(entry)) == task]
    # A task of another name comes from a column of the rows.
    rest = [] if config.data.root is not None else [(k, e) for k, e in entries if e.task_column != ""]
    differ = {(e.format, e.template or config.data.template): (key, e) for key, e in named or rest}
    if len(differ) > 1:
        keys = [key for key, _ in differ.values()]
        raise ConfigError(
            f"task {task!r} may come from {' or '.join(keys)}, which have other formats or templates; say "
            f"which with --{keys[0]}.name {task!r}"
        )
    found = next((entry for _, entry in differ.values()), DatasetConfig())
    template = found.template if found.template is not None else config.data.template
    return DatasetConfig(format=found.format, template=template)


class QuestionReader:
    """Rows of one task, without answers, to canonical rows and token rows.

    Args:
        config: of the run. tokenizer: its own.
        task: name of the task.

    Raises:
        ConfigError: as :func:`dataset_of`, or a template that cannot be used.
    """

    def __init__(self, config: Config, tokenizer: Any, task: str) -> None:
        self.config, self.tokenizer, self.task = config, tokenizer, task
        found = dataset_of(config, task)
        self.form = found.format
        self.template = None if found.template is None else Template(found.template, f"template of {task!r}")
        self.truncated = 0  # rows so far

    def __call__(self, row: Row, where: str) -> tuple[Row, dict[str, Any]]:
        """(canonical row, token row); the first row decides on the format.

        Raises:
            DataError: a row that cannot be read, or is too long where ``data.on_long_row`` does not cut.
            ConfigError: turns, where the model reads single texts.
        """
        if self.form == "auto":
            self.form = detect_question(list(row), self.template is not None, where)
            check_settings(self.form, False, self.config.task_type, "the rows")
        question = parse_question(
            {"task": self.task, **row} if self.template is not None else row,
            where,
            self.form,
            self.template,
            self.config.task_type,
        )
        return question, self._tokens(question)

    def _tokens(self, question: Row) -> dict[str, Any]:
        data, where = self.config.data, question["where"]
        cut = data.on_long_row == "truncate"
        encoder = Encoder(
            self.tokenizer, self.config.task_type, data.max_length, data.max_target_length, cut, [where]
        )
        turns = json.dumps(question["messages"]) if question["messages"] else ""
        columns = {"prompt": [question["prompt"]], "target": [""], "messages": [turns], "negatives": ["[]"]}
        tokens = {name: values[0] for name, values in encoder({**columns, "label": [0]}, [0]).items()}
        if tokens["full_length"] > data.max_length:
            if not cut:
                raise DataError(
                    f"{tokens['full_length']} tokens, over data.max_length {data.max_length}; shorten it, or "
                    "set --data.on_long_row truncate",
                    where,
                    f"longer than data.max_length {data.max_length}",
                )
            self.truncated += 1
        if not tokens.get("prompt_length", len(tokens["input_ids"])):
            raise DataError("the tokenizer knows none of the text", where, "without tokens")
        return tokens


def parse_question(row: Row, where: str, form: str, template: Template | None, task_type: str) -> Row:
    """One canonical row whose answer is not known: ``target`` is empty. An answer in the row is not read.

    Args:
        row, where, form, template, task_type: as for :func:`taskmoe.train.data.formats.parse_row`.

    Raises:
        DataError: a column is missing, empty or of a wrong type.
    """
    if form not in TURNS:
        prompt = prompt_of(row, where, form, template, task_type, FORMATS[form].prompt[0])
        return canonical(prompt, "", [""], None, None, where)
    turns = turns_of(row, where, form)
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise DataError(f"{form} has nothing before the assistant's turn", where, "empty text")
    answer = {"role": "assistant", "content": ""}
    return canonical(render_turns(turns), "", [""], [*turns, answer], None, where)


def detect_question(columns: list[str], has_template: bool, where: str) -> str:
    """The first format whose prompt is there; a template takes any column, so turns or the first other.

    Raises:
        DataError: none fits.
    """
    for name, form in FORMATS.items():
        if form.prompt[0] in columns or (has_template and name not in TURNS):
            return name
    known = ", ".join(form.prompt[0] for form in FORMATS.values())
    raise DataError(
        f"columns {', '.join(map(str, columns)) or '(none)'} hold no prompt; known are {known}; rename the "
        "columns as in the training data",
        where,
        "missing column",
    )
