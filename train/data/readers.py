"""Files to rows, one at a time, each with the place it came from.

A reader yields ``(where, row)``; a line that cannot be read is yielded as ``(where, DataError)`` so that the
caller may stop or skip it. What makes the rest of a file unreadable is raised.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from taskmoe.train.data.errors import DataError, shorten

Lines = Iterator[tuple[str, "dict[str, Any] | DataError"]]

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_file(path: Path) -> Lines:
    """Rows of one file, by its suffix.

    Raises:
        DataError: no such file, a suffix without a reader, or a file that is broken as a whole.
    """
    if not path.is_file():
        raise DataError("no such file", str(path))
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"cannot read {path.suffix or 'a file without suffix'}; use {', '.join(READERS)}", str(path)
        )
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from error


def _not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    return DataError(
        f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8",
        where,
        "wrong encoding",
    )


def _check_utf16(head: bytes, name: str) -> None:
    if head.startswith(_UTF16):
        raise DataError("the file is UTF-16; save it as UTF-8", f"{name}:1:1", "wrong encoding")


def _read_jsonl(path: Path) -> Lines:
    # Split on the byte: str.splitlines would also cut at U+2028 inside a text.
    with path.open("rb") as file:
        yield from read_jsonl_lines(file, str(path))


def read_jsonl_lines(lines: Iterable[bytes], name: str) -> Lines:
    """Rows of JSON lines, each as soon as its line is there; empty lines are none. name: of the source.

    Raises:
        DataError: UTF-16.
    """
    for number, raw in enumerate(lines, 1):
        if number == 1:
            _check_utf16(raw, name)
            raw = raw.removeprefix(_BOM)
        where = f"{name}:{number}"
        try:
            text = raw.rstrip().decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode("utf-8", "replace")) + 1
            yield where, _not_utf8(error, f"{where}:{column}")
            continue
        if text:
            yield where, _parse_object(text, where)


def _parse_object(text: str, where: str) -> dict[str, Any] | DataError:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return _broken_json(error, f"{where}:{error.colno}")
    except RecursionError:
        return DataError("broken JSON (nested too deeply)", where, "broken JSON")
    return _object(value, where)


def _broken_json(error: json.JSONDecodeError, where: str) -> DataError:
    return DataError(f"broken JSON ({error.msg}); each row must be one JSON object", where, "broken JSON")


def _object(value: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(
        f"expected a JSON object with named columns, found {type(value).__name__} {shorten(value)}",
        where,
        "not an object",
    )


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    _check_utf16(raw, str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig reports positions behind the mark.
        data, before = error.object, error.object[: error.start]
        column = len(data[before.rfind(b"\n") + 1 : error.start].decode("utf-8", "replace")) + 1
        raise _not_utf8(error, f"{path}:{before.count(10) + 1}:{column}") from error


def _read_json(path: Path) -> Lines:
    """A JSON array of objects, or JSON lines under the name .json."""
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        yield from _read_jsonl(path)
        return
    decoder, position, line, counted = json.JSONDecoder(), start + 1, 1, 0

    def skip_blank(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    position = skip_blank(position)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
            yield where, _object(value, where)
            position = skip_blank(position)
            if text[position : position + 1] == ",":
                position = skip_blank(position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("a comma before the closing bracket", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected , or ]", text, position)
        except json.JSONDecodeError as error:
            raise _broken_json(error, f"{path}:{error.lineno}:{error.colno}") from error
    if skip_blank(position + 1) < len(text):
        raise DataError("text after the closing bracket of the array", str(path), "broken JSON")


def _read_csv(path: Path) -> Lines:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"broken CSV ({error})", where, "broken CSV") from error
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if "" in header or len(set(header)) < len(header):
                column = header.index("") + 1 if "" in header else _first_repeat(header)
                raise DataError(
                    f"the header {shorten(header)} has an empty or repeated name; name every column once",
                    f"{path}:1:{column}",
                )
        elif len(fields) != len(header):
            message = (
                f"{len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); quote fields "
                f"with {'a tab' if delimiter != ',' else 'a comma'} or a line break"
            )
            yield where, DataError(message, where, "wrong number of fields")
        else:
            yield where, dict(zip(header, fields, strict=True))


def _first_repeat(names: list[str]) -> int:
    return next(i + 1 for i, name in enumerate(names) if name in names[:i])


def _read_parquet(path: Path) -> Lines:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"not a readable parquet file ({str(error).splitlines()[0]})", str(path)) from error


READERS: dict[str, Callable[[Path], Lines]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
