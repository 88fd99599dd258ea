"""Prompts from Jinja templates whose placeholders are the row's columns and ``task``."""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.errors import DataError, shorten


class Template:
    """A compiled template. Templates come with data and configs of other people, hence the sandbox.

    Args:
        source: e.g. ``"{{ premise }} => {{ hypothesis }}?"``.
        key: the setting it stands in, for errors.

    Raises:
        ConfigError: a syntax error.
    """

    def __init__(self, source: str, key: str = "template") -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{key}: {error.message} (line {error.lineno} of {shorten(source)})") from error

    def render(self, row: dict[str, Any], where: str) -> str:
        """The prompt of one row.

        Raises:
            DataError: a placeholder without a column, or an expression that fails on this row.
        """
        # Not **row: a column may have a name that is no Python identifier.
        try:
            return self._template.render(row)
        except jinja2.UndefinedError as error:
            raise DataError(
                f"template {shorten(self.source)}: {error.message}; columns are {', '.join(map(str, row))}",
                where,
                "missing column",
            ) from error
        except Exception as error:  # any failure inside a template is the template's, whatever its type
            raise DataError(
                f"template {shorten(self.source)} fails: {error}", where, "template fails"
            ) from error
