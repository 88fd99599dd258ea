"""The one error of bad data: where it is, what was found, what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used.

    Args:
        message: what was found and what to do.
        where: ``file``, ``file:line`` or ``file:line:column``; put in front of the message.
        reason: a few words that are the same for all rows of this kind; skipped rows are counted by it.
    """

    def __init__(self, message: str, where: str = "", reason: str = "bad row") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where
        self.reason = reason


def shorten(value: object, limit: int = 60) -> str:
    """``repr`` of a value, cut so that an error stays one readable line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
