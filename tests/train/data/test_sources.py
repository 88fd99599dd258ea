from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config, DataConfig, DatasetConfig
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.sources import Source, find_sources

Write = Callable[..., Path]
ROW = [{"text": "x", "label": "a"}]


def source(**entry: Any) -> Source:
    (found,) = find_sources(Config(datasets=(DatasetConfig(**entry),)))
    return found


def read(found: Source, split: str) -> list[Any] | None:
    lines = found.lines(split)
    return None if lines is None else [row for _, row in lines]


def test_a_file_is_the_training_split_and_others_are_named(write: Write) -> None:
    train, test = write("sst.jsonl", ROW), write("held.csv", "text,label\ny,b\n")
    found = source(path=str(train), test_path=str(test))
    assert (found.name, found.key) == ("sst", "datasets[0]")
    assert read(found, "train") == ROW
    assert read(found, "test") == [{"text": "y", "label": "b"}]
    assert read(found, "validation") is None


def test_a_folder_holds_one_file_a_split(write: Write) -> None:
    folder = write("sst/train.jsonl", ROW).parent
    write("sst/dev.csv", "text,label\ny,b\n")
    assert read(source(path=str(folder)), "validation") is None
    found = source(path=str(folder), validation_split="dev")
    assert found.name == "sst"
    assert read(found, "validation") == [{"text": "y", "label": "b"}]
    assert source(path=str(folder / "train.jsonl")).name == "sst"


def test_root_takes_each_folder_as_a_task_in_sorted_order(write: Write, tmp_path: Path) -> None:
    write("root/b/train.jsonl", ROW)
    write("root/a/train.csv", "text,label\nx,a\n")
    write("root/a/test.jsonl", ROW)
    write("root/notes.txt", "no task")
    (tmp_path / "root/.cache").mkdir()
    entries = (DatasetConfig(name="b", path="somewhere/else", subset="b", validation_split="dev", group="g"),)
    found = find_sources(Config(datasets=entries, data=DataConfig(root=str(tmp_path / "root"))))
    assert [s.name for s in found] == ["a", "b"]
    assert sorted(found[0].files) == ["test", "train"]
    assert (
        found[1].config.group == "g"
    )  # settings of the entry of that name, but not where it would come from
    assert (found[1].config.subset, found[1].config.validation_split) == (None, None)
    assert read(found[1], "train") == ROW


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "train.jsonl"}, "train.jsonl"),
        ({"path": "{tmp}/sst/tain.jsonl"}, "no such file; did you mean {tmp}/sst/train.jsonl?"),
        ({"path": "{tmp}/none/train.jsonl"}, "the folder {tmp}/none does not exist either"),
        ({"path": "{tmp}/empty"}, "{tmp}/empty: no data; expected train|validation|test"),
        ({"path": "{tmp}/two"}, "{tmp}/two: train.jsonl and train.csv are both here"),
        ({"path": "{tmp}/sst", "test_split": "held"}, "{tmp}/sst: no split 'held' here"),
        (
            {"path": "{tmp}/sst/train.jsonl", "test_path": "{tmp}/sst/tran.jsonl"},
            "datasets[0].test_path {tmp}/sst/tran.jsonl: no such file; did you mean {tmp}/sst/train.jsonl?",
        ),
    ],
)
def test_paths_that_lead_nowhere(write: Write, tmp_path: Path, entry: dict[str, str], words: str) -> None:
    write("sst/train.jsonl", ROW)
    write("two/train.jsonl", ROW)
    write("two/train.csv", "text,label\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        source(**{k: v.replace("{tmp}", str(tmp_path)) for k, v in entry.items()})
    assert words.replace("{tmp}", str(tmp_path)) in str(error.value)


@pytest.mark.parametrize("setting", ["split", "validation_split", "test_split", "subset"])
def test_split_names_have_no_effect_on_a_file(write: Write, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"datasets\[0\]\.{setting}: has no effect on a file"):
        source(path=str(write("a.jsonl", ROW)), **{setting: "dev"})


def test_missing_path_and_repeated_names(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.path: is missing"):
        source(name="a")
    path = str(write("a.jsonl", ROW))
    with pytest.raises(ConfigError, match=r"datasets\[1\]: the task 'a' comes from datasets\[0\] too"):
        find_sources(Config(datasets=(DatasetConfig(path=path), DatasetConfig(path=path))))


def test_root_that_is_missing_or_empty(write: Write, tmp_path: Path) -> None:
    for root in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"data\.root"):
            find_sources(Config(data=DataConfig(root=str(root))))
    write("root/a/notes.txt", "")
    with pytest.raises(DataError, match=r"root/a: no data; expected train\|validation\|test"):
        find_sources(Config(data=DataConfig(root=str(tmp_path / "root"))))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the hub: one data set with class names, and the calls made to it."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def split(texts: list[str], labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    data = datasets.DatasetDict(
        {"train": split(["x", "y"], [1, 0]), "validation": split(["z"], [0]), "test": split(["w"], [-1])}
    )
    calls: list[tuple[Any, ...]] = []

    def load(path: str, subset: str | None = None, split: str | None = None) -> Any:
        calls.append((path, subset, split))
        if path == "gone/away":
            raise ConnectionError("could not reach the hub\nand more lines")
        return data["train"].select([0]) if split else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_rows_carry_class_names(hub: list[tuple[Any, ...]]) -> None:
    found = source(path="org/sst", subset="en")
    assert found.name == "en"
    assert list(found.lines("train") or ()) == [
        ("org/sst/en/train:1", {"text": "x", "label": "pos"}),
        ("org/sst/en/train:2", {"text": "y", "label": "neg"}),
    ]
    assert found.classes == {"label": ("neg", "pos")}
    assert read(found, "validation") == [{"text": "z", "label": "neg"}]
    assert read(found, "test") == [{"text": "w", "label": None}]  # -1: not labelled
    assert hub == [("org/sst", "en", None)]


def test_hub_splits_may_be_slices_and_must_exist(hub: list[tuple[Any, ...]]) -> None:
    found = source(path="org/sst", split="train[:1]", test_split="tests")
    assert read(found, "train") == [{"text": "x", "label": "pos"}]
    assert hub[-1] == ("org/sst", None, "train[:1]")
    with pytest.raises(DataError, match="org/sst: no split 'tests'; there are train, validation, test"):
        read(found, "test")


def test_a_hub_that_does_not_answer_is_one_line(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError) as error:
        read(source(path="gone/away"), "train")
    assert str(error.value) == (
        "datasets[0].path gone/away: no file or folder, and not from the hub "
        "(ConnectionError: could not reach the hub)"
    )
