"""What commands print: one JSON object for programs, pages of text for people."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140  # where nothing says how wide the lines may be


def print_json(found: Any) -> None:
    """Print ``found`` as one line of JSON; null stands for numbers that JSON lacks."""
    print(json_line(found))


def json_line(found: Any) -> str:
    """``found`` as JSON; null stands for numbers that JSON lacks, and half characters are escaped."""
    line = json.dumps(finite(found), ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(finite(found), allow_nan=False)
    return line


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page() -> Console:
    """Stdout for text and tables, as wide as the terminal."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if wide else PIPED_WIDTH, highlight=False)


def print_table(
    console: Console, title: str, columns: list[str], rows: list[list[str]], names: int = 1
) -> None:
    """Print a table of texts, none of which is taken for markup; the first ``names`` columns stand left."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", justify="left" if i < names else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)
