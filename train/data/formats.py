"""Rows of seven layouts to one canonical row.

A canonical row is a dict:
    prompt    what the model reads (after the template); for messages all turns but the last, as text
    target    the right answer; for a classification row the label's text
    accepted  all right answers, the target first
    messages  [{role, content}] ending in an assistant turn, or None
    label     the label's text, or None when the row is no classification row
    negatives texts that the query must not find (format pairs, where the row has any)
    where     file:line
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.errors import DataError, shorten
from taskmoe.train.data.templates import Template

Row = dict[str, Any]

TURNS = ("messages", "conversations")  # formats of several turns
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Format:
    """``prompt``: columns that make the prompt (the first is required), ``target``: column of the answer."""

    prompt: tuple[str, ...]
    target: str | None
    separator: str = "\n"  # between prompt and target of a causal LM, where no template says otherwise


def detect(columns: list[str], has_template: bool, where: str) -> str:
    """The first format whose columns are all there; with a template only the target's column counts.

    Raises:
        DataError: none fits.
    """
    for name, form in FORMATS.items():
        needed = [form.prompt[0]] if form.target is None else [form.target]
        if form.target is not None and not has_template:
            needed.append(form.prompt[0])
        if all(column in columns for column in needed):
            return name
    known = ", ".join(f"{n} ({_describe(f)})" for n, f in FORMATS.items())
    raise DataError(
        f"columns {', '.join(map(str, columns)) or '(none)'} fit no row format; known are {known}; "
        "rename the columns or give a template",
        where,
        "missing column",
    )


def _describe(form: Format) -> str:
    return "+".join([form.prompt[0]] + ([form.target] if form.target else []))


def parse_row(
    row: Row, where: str, form: str, template: Template | None, task_type: str, labelled: bool
) -> Row:
    """One canonical row.

    Args:
        row: as read.
        where: file:line.
        form: a key of :data:`FORMATS`.
        template: renders the prompt; None: the format's own prompt.
        task_type: CAUSAL_LM | SEQ_2_SEQ_LM | SEQ_CLS.
        labelled: the target is a label (of a closed set).

    Raises:
        DataError: a column is missing, empty or of a wrong type.
    """
    if form in TURNS:
        return _parse_turns(row, where, form)
    spec = FORMATS[form]
    assert spec.target is not None
    prompt = prompt_of(row, where, form, template, task_type, _describe(spec))
    target = _column(row, spec.target, where, form, _describe(spec), strip=labelled)
    accepted = [target, *(a for a in _accepted(row, where) if a != target)]
    wrong = _texts(row, "negatives", where) if form == "pairs" else []
    if wrong and task_type != "FEATURE_EXTRACTION":
        raise DataError(
            f"column 'negatives' has no use for task_type {task_type}; remove it, or use FEATURE_EXTRACTION",
            where,
        )
    found = {"negatives": wrong} if wrong else {}
    return found | canonical(prompt, target, accepted, None, target if labelled else None, where)


def prompt_of(row: Row, where: str, form: str, template: Template | None, task_type: str, needs: str) -> str:
    """What the model reads of a row without turns. needs: the columns of the format, for errors.

    Raises:
        DataError: as :func:`parse_row`.
    """
    if template is not None:
        prompt = template.render(row, where)
        _check_text(prompt, "the rendered template", where)
        return prompt
    spec = FORMATS[form]
    prompt = _column(row, spec.prompt[0], where, form, needs)
    # The second part is the optional input of an instruction, often the empty string.
    extra = [to_text(row[c], f"column {c!r}", where) for c in spec.prompt[1:] if row.get(c) is not None]
    prompt = "\n".join([prompt, *(e for e in extra if e.strip())])
    if task_type == "CAUSAL_LM" and not prompt[-1].isspace():
        prompt += spec.separator
    return prompt


def canonical(
    prompt: str,
    target: str,
    accepted: list[str],
    messages: list[dict[str, str]] | None,
    label: str | None,
    where: str,
) -> Row:
    """Its columns in order, without negatives."""
    return {
        "prompt": prompt,
        "target": target,
        "accepted": accepted,
        "messages": messages,
        "label": label,
        "where": where,
    }


def _column(row: Row, column: str, where: str, form: str, needs: str, strip: bool = False) -> str:
    if column not in row:
        near = difflib.get_close_matches(column, [str(c) for c in row], n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"no column {column!r}{hint}; format {form} needs {needs}, "
            f"the row has {', '.join(map(str, row)) or 'no columns'}",
            where,
            "missing column",
        )
    text = to_text(row[column], f"column {column!r}", where)
    if strip:
        text = text.strip()
    _check_text(text, f"column {column!r}", where)
    return text


def to_text(value: Any, what: str, where: str) -> str:
    """A string; numbers become text (1.0 becomes "1": tables turn integer labels into floats).

    Raises:
        DataError: null, not a number, or another type.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if value is None:
        raise DataError(f"{what} is null; give it a value or remove the row", where, "empty text")
    raise DataError(
        f"{what} holds {type(value).__name__} {shorten(value)}; expected a string or a number",
        where,
        "wrong type",
    )


def _check_text(text: str, what: str, where: str) -> None:
    if not text.strip():
        raise DataError(f"{what} is empty; give it a value or remove the row", where, "empty text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} holds half a character (U+{ord(text[error.start]):04X} at {error.start + 1}); "
                "repair the escape sequence",
                where,
                "wrong encoding",
            ) from error


def _accepted(row: Row, where: str) -> list[str]:
    return _texts(row, "accepted", where)


def _texts(row: Row, column: str, where: str) -> list[str]:
    """A column that holds a list of texts, without empty ones and repeats; [] where it is missing."""
    value = row.get(column)
    if value is None or value == "":
        return []
    if isinstance(value, str):  # a table's cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or not value:
        raise DataError(
            f"column {column!r} must be a list of strings, found {shorten(row[column])}",
            where,
            "wrong type",
        )
    # Word lists hold empty alternatives; an empty answer is never right.
    answers = [a for a in (to_text(v, f"column {column!r}", where) for v in value) if a.strip()]
    for answer in answers:
        _check_text(answer, f"column {column!r}", where)
    return list(dict.fromkeys(answers))


def _parse_turns(row: Row, where: str, form: str) -> Row:
    messages = turns_of(row, where, form)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{form} ends with a turn of {messages[-1]['role']!r}; the last one must be the assistant's",
            where,
            "no assistant turn",
        )
    if len(messages) == 1:
        raise DataError(f"{form} has nothing before the assistant's turn", where, "empty text")
    prompt, target = render_turns(messages[:-1]), messages[-1]["content"]
    return canonical(prompt, target, [target], messages, None, where)


def turns_of(row: Row, where: str, form: str) -> list[dict[str, str]]:
    """The turns of a row, at least one, as ``{role, content}``.

    Raises:
        DataError: as :func:`parse_row`.
    """
    role_key, text_key = ("role", "content") if form == "messages" else ("from", "value")
    if form not in row:
        _column(row, form, where, form, form)
    turns = row[form]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"column {form!r} must be a non-empty list, found {shorten(turns)}", where, "wrong type"
        )
    messages = []
    for i, turn in enumerate(turns):
        what = f"{form}[{i}]"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise DataError(
                f"{what} needs the keys {role_key!r} and {text_key!r}, found {shorten(turn)}",
                where,
                "missing column",
            )
        role = turn[role_key]
        if form == "conversations" and isinstance(role, str):
            role = _SHAREGPT.get(role, role)
        if role not in ROLES:
            known = sorted({*ROLES, *(_SHAREGPT if form == "conversations" else ())})
            near = difflib.get_close_matches(str(role), known, n=1)
            hint = f"; the nearest known is {near[0]!r}" if near else f"; known are {', '.join(known)}"
            raise DataError(f"{what}.{role_key} is {shorten(role)}{hint}", where, "unknown role")
        content = to_text(turn[text_key], f"{what}.{text_key}", where)
        _check_text(content, f"{what}.{text_key}", where)
        messages.append({"role": role, "content": content})
    return messages


def render_turns(messages: list[dict[str, str]]) -> str:
    """Plain ``role: content`` lines."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


# What turns do not have, and formats that do.
TWO_TEXTS = {
    "SEQ_CLS": ("label", "text_label or input_output"),
    "FEATURE_EXTRACTION": ("query", "pairs, input_output or text_label"),
}


def check_settings(form: str, has_template: bool, task_type: str, key: str) -> None:
    """Settings that cannot go together.

    Raises:
        ConfigError: unknown format, a template without effect, or turns for a classifier.
    """
    if form != "auto" and form not in FORMATS:
        near = difflib.get_close_matches(form, FORMATS, n=1)
        raise ConfigError(
            f"{key}.format: {form!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''}"
            f"; known are auto, {', '.join(FORMATS)}"
        )
    if form in TURNS:
        if has_template:
            raise ConfigError(f"{key}.template: has no effect on format {form}; remove it")
        if task_type in TWO_TEXTS:
            lacks, fit = TWO_TEXTS[task_type]
            raise ConfigError(f"{key}.format: {form} has no {lacks}; task_type {task_type} needs {fit}")


# In the order in which "auto" tries them.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), None),
    "conversations": Format(("conversations",), None),
    "instruction": Format(("instruction", "input"), "output"),
    "input_output": Format(("input",), "output"),
    "prompt_completion": Format(("prompt",), "completion", separator=""),
    "text_label": Format(("text",), "label"),
    "pairs": Format(("query",), "positive"),
}
