"""The YAML reader: YAML 1.2's scalars, places, duplicates, and a writer that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from taskmoe.moe.config import ConfigError
from taskmoe.train.config_yaml import dump, parse, read


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 0.001),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("0x1F", 31),
        ("007", "007"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("[1, a]", [1, "a"]),
        ("{1: a, no: 2}", {"1": "a", "no": 2}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_scalars(text: str, value: object) -> None:
    got = parse(text, "x")
    assert got == value and type(got) is type(value)


def test_places() -> None:
    origins: dict[str, str] = {}
    parse("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - y: 3\n", "f.yaml", origins)
    assert {p: origins[p] for p in ("a", "b", "b.c", "b.d.0", "b.d.1.y")} == {
        "a": "f.yaml:1",
        "b": "f.yaml:2",
        "b.c": "f.yaml:3",
        "b.d.0": "f.yaml:5",
        "b.d.1.y": "f.yaml:6",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\na: 2", "f.yaml:2: a: the key stands here twice; first at f.yaml:1"),
        ("a:\n  b: 1\n  b: 2", "f.yaml:3: a.b: the key stands here twice"),
        ("a: [1", "f.yaml:1: not YAML"),
        ("a: 1\n\tb: 2", "f.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not YAML: expected a single document"),
        ("a: *x", "f.yaml:1: not YAML: found undefined alias"),
        ("a: &x [*x]", "f.yaml: an alias contains itself"),
        ("a: !!python/name:os.system 1", "f.yaml:1: not YAML: could not determine a constructor"),
        ("a: !!int b", "f.yaml:1: a: 'b' is not of type"),
        ("? [a]\n: 1", "f.yaml:1: a key must be a plain name"),
        ("\x00", "f.yaml: not YAML"),
    ],
)
def test_not_usable(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- 1\n", ":1: expected a mapping of settings, found a list"),
        (b"hello", ":1: expected a mapping of settings, found text"),
        (b"a: \xff\n", ": not UTF-8 (byte 3)"),
    ],
)
def test_not_a_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_empty_file_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert read(path)[0] == {}
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(path) == ({"a": 1}, {"": f"{path}:1", "a": f"{path}:1"})


def test_what_is_written_reads_back_here_and_elsewhere() -> None:
    texts = [
        "1e-3",
        "no",
        "true",
        "null",
        "",
        "~",
        "1",
        "0x1",
        "1:30",
        "2020-01-01",
        "1_000",
        "x: y",
        "# c",
        " a",
    ]
    tree = {
        "texts": [*texts, "é", "more\nthan one\n", "{{ a }}", "- b"],
        "no": 1e-5,
        "big": 1e16,
        "none": None,
        "yes": True,
        "1": {},
        "list": [],
        "one": 1.0,
        "int": 3,
        "same": [{"a": 1}] * 2,
    }
    text = dump(tree)
    assert parse(text, "x") == tree
    assert yaml.safe_load(text) == tree
    assert "&" not in text.replace("'", "")
