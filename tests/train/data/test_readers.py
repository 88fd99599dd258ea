from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskmoe.train.data.errors import DataError
from taskmoe.train.data.readers import read_file

Write = Callable[..., Path]


def rows(path: Path) -> list[Any]:
    return [item for _, item in read_file(path)]


def test_jsonl_gives_rows_with_their_lines_and_skips_blank_ones(write: Write) -> None:
    path = write("a.jsonl", '{"text": "x\\u2028y"}\n\n{"text": "z"}')
    assert list(read_file(path)) == [(f"{path}:1", {"text": "x\u2028y"}), (f"{path}:3", {"text": "z"})]


def test_a_raw_line_separator_inside_a_text_is_no_new_line(write: Write) -> None:
    path = write("a.jsonl", '{"text": "x\u2028y"}\n{"text": "z"}\n')
    assert [where for where, _ in read_file(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(write: Write, name: str) -> None:
    text = "text\nx\n" if name == "a.csv" else '{"text": "x"}\n'
    assert rows(write(name, b"\xef\xbb\xbf" + text.encode())) == [{"text": "x"}]


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        (b'{"text": }', ":2:10", "broken JSON"),
        (b'{"text": "caf\xe9"}', ":2:14", "0xe9 is not UTF-8"),
        (b'["text"]', ":2", "expected a JSON object"),
        (b"7", ":2", "expected a JSON object"),
        (b'{"text": "x"', ":2:13", "broken JSON"),
        (b"[" * 100_000, ":2", "broken JSON"),
    ],
)
def test_jsonl_says_where_a_line_is_broken_and_reads_on(
    write: Write, line: bytes, place: str, words: str
) -> None:
    path = write("a.jsonl", b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    first, bad, last = rows(path)
    assert (first, last) == ({"text": "x"}, {"text": "y"})
    assert isinstance(bad, DataError)
    assert str(bad).startswith(f"{path}{place}: ")
    assert words in str(bad)
    assert "\n" not in str(bad)


def test_json_reads_an_array_with_the_line_of_each_object(write: Write) -> None:
    path = write("a.json", '[\n {"text": "x"},\n\n {"text":\n "y"}, {"text": "z"}\n]\n')
    assert [where.rsplit(":", 1)[1] for where, _ in read_file(path)] == ["2", "4", "5"]
    assert rows(path) == [{"text": "x"}, {"text": "y"}, {"text": "z"}]
    assert rows(write("empty.json", "[]")) == []
    assert rows(write("lines.json", '{"text": "x"}\n{"text": "y"}\n')) == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n{"a": 1}\n{"a": 2}]', ":3:1"),
        ('[\n{"a": 1},\n]', ":3:1"),
        ('[\n{"a": }]', ":2:7"),
        ('[{"a": 1}', ":1:10"),
        ('[{"a": 1}] x', ""),
    ],
)
def test_json_says_where_an_array_is_broken(write: Write, text: str, place: str) -> None:
    path = write("a.json", text)
    with pytest.raises(DataError) as error:
        rows(path)
    assert str(error.value).startswith(f"{path}{place}: ")


def test_csv_counts_lines_through_quoted_line_breaks(write: Write) -> None:
    path = write("a.csv", 'text,label\r\n"one\ntwo",a\n"say ""x"", y",b\n')
    assert list(read_file(path)) == [
        (f"{path}:2", {"text": "one\ntwo", "label": "a"}),
        (f"{path}:4", {"text": 'say "x", y', "label": "b"}),
    ]
    assert rows(write("a.tsv", "text\tlabel\nx, y\ta\n")) == [{"text": "x, y", "label": "a"}]


def test_csv_says_which_line_has_the_wrong_number_of_fields(write: Write) -> None:
    path = write("a.csv", "text,label\nx,a\nx,y,b\nz,b\n")
    _, bad, last = rows(path)
    assert str(bad).startswith(f"{path}:3: 3 fields, but the header has 2 (text, label)")
    assert last == {"text": "z", "label": "b"}


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b"text,text\nx,y\n", ":1:2", "repeated name"),
        (b"text,\nx,y\n", ":1:2", "empty or repeated name"),
        (b'text,label\n"x,a\n', ":2", "broken CSV"),
        (b"text,label\nx,a\ncaf\xe9,b\n", ":3:4", "0xe9 is not UTF-8"),
        (b"\xef\xbb\xbftext,label\ncaf\xe9,b\n", ":2:4", "not UTF-8"),
        ("text,label\n".encode("utf-16"), ":1:1", "UTF-16"),
    ],
)
def test_csv_says_where_a_file_is_broken(write: Write, content: bytes, place: str, words: str) -> None:
    path = write("a.csv", content)
    with pytest.raises(DataError) as error:
        rows(path)
    assert str(error.value).startswith(f"{path}{place}: ")
    assert words in str(error.value)


def test_utf16_json_lines_are_named_as_such(write: Write) -> None:
    path = write("a.jsonl", '{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.jsonl:1:1: the file is UTF-16"):
        rows(path)


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "label": [1, None]}), path)
    assert list(read_file(path)) == [
        (f"{path}:1", {"text": "x", "label": 1}),
        (f"{path}:2", {"text": "y", "label": None}),
    ]


def test_a_file_that_is_no_parquet_is_one_line(write: Write) -> None:
    with pytest.raises(DataError, match="not a readable parquet file") as error:
        rows(write("a.parquet", b"text,label"))
    assert "\n" not in str(error.value)


def test_unknown_suffix_and_missing_file(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read \.txt; use \.jsonl"):
        rows(write("a.txt", "x"))
    with pytest.raises(DataError, match="no such file"):
        rows(tmp_path / "none.jsonl")
