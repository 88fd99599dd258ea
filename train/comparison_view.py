"""``taskmoe compare RUN1 RUN2 ...``: what :mod:`taskmoe.train.comparison` finds, as text, markdown, HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from taskmoe.train.comparison import compare_runs
from taskmoe.train.output import page, print_json, print_table

MOST_TASKS = 40  # lines of a table on the terminal; markdown, HTML and JSON have all
ROW_PX, ARM_PX, MOST_PX = 12, 14, 6000  # height of the plot: of a task, of an arm in it, of all
BUTTONS = {"displaylogo": False, "modeBarButtons": [["toImage", "zoom2d", "resetScale2d"]]}
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
</style></head><body>
<h1>{{ title }}</h1>
{% for table in tables %}<h2>{{ table.title }}</h2><p>{{ table.reading }}</p>
<table><tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% if figure %}<h2>Differences to {{ baseline }}</h2><p>{{ reading }}</p>{{ figure }}{% endif %}
{% if remarks %}<h2>Notes</h2><ul>{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""


class Sheet(NamedTuple):
    """A table of texts; its first columns are names, the others numbers."""

    title: str
    reading: str
    names: int
    columns: list[str]
    rows: list[list[str]]


def compare(runs: Sequence[str], as_json: bool, html: str | None, markdown: str | None) -> int:
    """Print the comparison, with ``as_json`` as one JSON object.

    html, markdown: files to write it to.

    Returns:
        The exit code, 0.

    Raises:
        FactsError, ConfigError: as :func:`compare_runs`.
    """
    found = compare_runs(runs)
    if html is not None:
        Path(html).write_text(as_html(found), encoding="utf-8")
    if markdown is not None:
        Path(markdown).write_text(as_markdown(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        show(found, page())
    return 0


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the tables; of many tasks those that differ most."""
    tasks = sorted(found["tasks"], key=_largest, reverse=True)
    shown = {**found, "tasks": tasks[:MOST_TASKS]} if len(tasks) > MOST_TASKS else found
    for sheet in sheets(shown):
        print_table(console, sheet.title, sheet.columns, sheet.rows, sheet.names)
        console.print(Text(sheet.reading))
    if len(tasks) > MOST_TASKS:
        console.print(f"\n{MOST_TASKS} of {len(tasks)} tasks, those that differ most; --json has all")
    for remark in found["remarks"]:
        console.print(Text(f"note: {remark}"))


def _largest(task: Mapping[str, Any]) -> float:
    return max(abs(arm["difference"] or 0.0) for arm in task["arms"])


def as_markdown(found: Mapping[str, Any]) -> str:
    """The tables and remarks as markdown."""
    parts = [f"# {_title(found)}"]
    for sheet in sheets(found):
        lines = [
            sheet.columns,
            [*["---"] * sheet.names, *["---:"] * (len(sheet.columns) - sheet.names)],
            *sheet.rows,
        ]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        parts += [f"## {sheet.title}", sheet.reading, table]
    if found["remarks"]:
        parts += ["## Notes", "\n".join(f"- {_cell(remark)}" for remark in found["remarks"])]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Names are text: they neither end a cell nor mark anything up."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def as_html(found: Mapping[str, Any]) -> str:
    """One page that opens from disk: tables, the plot of differences, remarks."""
    drawn = len(found["arms"]) > 1
    figure = plot(found).to_html(BUTTONS, full_html=False) if drawn else ""
    reading = (
        "To the right of zero an arm is better than the baseline on that task. Bars are "
        f"{_percent(found['confidence'])} intervals over seeds, where there are any: one that spans zero may "
        "be chance, and of many tasks some miss zero by chance."
    )
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=_title(found),
            tables=sheets(found),
            figure=Markup(figure),
            baseline=found["baseline"],
            reading=reading,
            remarks=found["remarks"],
        )
    )


def plot(found: Mapping[str, Any]) -> go.Figure:
    """Each arm's difference to the baseline, task by task, in the order of the first arm's."""
    tasks = sorted(found["tasks"], key=lambda task: task["arms"][1]["difference"])
    names = [escape(task["name"]) for task in tasks]  # plotly takes tags in labels for markup
    figure = go.Figure()
    for a, arm in enumerate(found["arms"][1:], start=1):
        cells = [task["arms"][a] for task in tasks]
        bars = {
            "array": [None if c["high"] is None else c["high"] - c["difference"] for c in cells],
            "arrayminus": [None if c["low"] is None else c["difference"] - c["low"] for c in cells],
        }
        figure.add_scatter(
            x=[c["difference"] for c in cells],
            y=names,
            mode="markers",
            orientation="h",
            name=escape(arm["name"]),
            error_x={"type": "data", "symmetric": False, **bars},
            customdata=[[task["metric"], c["mean"]] for task, c in zip(tasks, cells, strict=True)],
            hovertemplate="%{y}<br>%{customdata[0]} %{customdata[1]:.4f}<br>difference %{x:+.4f}",
        )
    figure.add_vline(x=0, line_dash="dot")
    figure.update_layout(
        template="plotly_white",
        scattermode="group",  # arms side by side, not on top of each other
        height=min(160 + (ROW_PX + ARM_PX * len(figure.data)) * len(tasks), MOST_PX),
        xaxis_title=f"difference to {escape(found['baseline'])}, each task's own metric",
        yaxis={"automargin": True, "type": "category"},
        showlegend=True,
    )
    return figure


def sheets(found: Mapping[str, Any]) -> list[Sheet]:
    """The table of arms and that of tasks."""
    base, others = found["baseline"], found["arms"][1:]
    interval = f"[{_percent(found['confidence'])} interval over seeds]"
    rows = []
    for arm in found["arms"]:
        mean, gain = arm["mean"], arm["relative_gain"]
        score = _number(mean["value"]) + ("" if mean["std"] is None else f" ± {_number(mean['std'])}")
        differs = ", ".join(f"{key}: {new}" for key, (_, new) in arm["differs"].items())
        changes = [_change(arm["difference"], _signed), _change(gain, _gain)]
        changes += [_gain(gain["median"]) if gain else "", _wins(arm["wins"])]
        rows.append([arm["name"], differs, str(len(arm["runs"])), score, _number(arm["median"]), *changes])
    reading = (
        f"Mean of the tasks' own metrics ± standard deviation over seeds, and their median; difference to "
        f"{base} and average relative gain over tasks {interval}, and the median of these gains; tasks on "
        "which the arm is better, the same and worse."
    )
    columns = ["arm", f"differs from {base} in", "runs", "mean", "median"]
    columns += ["difference", "relative gain", "median gain", "better/same/worse"]
    arms = Sheet("arms", reading, 2, columns, rows)
    columns = ["task", "metric", base]
    for arm in others:
        columns += [arm["name"], "difference", "relative"]
    lines = []
    for task in found["tasks"]:
        line = [task["name"], task["metric"], _number(task["arms"][0]["mean"])]
        for cell in task["arms"][1:]:
            moved = {"value": cell["difference"], "low": cell["low"], "high": cell["high"]}
            line += [_number(cell["mean"]), _change(moved, _signed), _gain(cell["relative"])]
        lines.append(line)
    return [arms, Sheet("tasks", f"Means over seeds; difference to {base} {interval}.", 2, columns, lines)]


def _title(found: Mapping[str, Any]) -> str:
    return f"{', '.join(arm['name'] for arm in found['arms'][1:]) or 'seeds'} against {found['baseline']}"


def _change(of: Mapping[str, Any] | None, write: Any) -> str:
    if of is None or of["value"] is None:
        return ""
    ends = "" if of["low"] is None else f" [{write(of['low'])}, {write(of['high'])}]"
    return f"{write(of['value'])}{ends}"


def _wins(wins: Mapping[str, int] | None) -> str:
    return "" if wins is None else "/".join(map(str, wins.values()))


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _gain(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def _percent(value: float) -> str:
    return f"{100 * value:g} %"
