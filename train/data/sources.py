"""Where rows come from: files, folders, one folder a task, hub names. Reading is lazy, split by split."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config, DatasetConfig
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.readers import READERS, Lines, read_file

SPLITS = ("train", "validation", "test")
TASK_COLUMNS = ("task", "channel", "data_name", "task_id", "task_type")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass
class Source:
    """One entry of ``datasets:`` or one folder of ``data.root``.

    ``key`` is the setting it comes from, ``name`` the task of its rows unless they carry a task column,
    ``classes`` the label names of hub data sets that carry them (known after reading).
    """

    key: str
    name: str
    config: DatasetConfig
    files: dict[str, Path] = field(default_factory=dict)
    hub_splits: dict[str, str] = field(default_factory=dict)
    task_column: str | None = None  # None: look for one of TASK_COLUMNS; "": none
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _hub: Any = None

    def lines(self, split: str) -> Lines | None:
        """The rows of a split, or None when there is no such split.

        Raises:
            DataError: the file or the hub's data set cannot be read.
        """
        if split in self.files:
            return read_file(self.files[split])
        return self._hub_lines(split) if self.hub_splits else None

    def _hub_lines(self, split: str) -> Lines | None:
        import datasets

        path, subset = self.config.path, self.config.subset
        name = self.hub_splits.get(split, split)
        try:
            if self._hub is None:
                self._hub = datasets.load_dataset(path, subset)
            if name in self._hub:
                data = self._hub[name]
            elif split in self.hub_splits and "[" in name:
                data = datasets.load_dataset(path, subset, split=name)
            elif split in self.hub_splits:
                raise DataError(f"no split {name!r}; there are {', '.join(self._hub)}", path)
            else:
                return None
        except DataError:
            raise
        except Exception as error:  # the hub's client raises some thirty types
            first = str(error).strip().splitlines() or [""]
            raise DataError(
                f"no file or folder, and not from the hub ({type(error).__name__}: {first[0][:200]})",
                f"{self.key}.path {path}",
            ) from error
        return self._hub_rows(data, f"{path}{f'/{subset}' if subset else ''}/{name}")

    def _hub_rows(self, data: Any, where: str) -> Lines:
        for column, feature in data.features.items():
            names = getattr(feature, "names", None)  # ClassLabel
            if names:
                self.classes[column] = tuple(names)
        for i, row in enumerate(data, 1):
            for column, names in self.classes.items():
                value = row.get(column)
                # -1 is the hub's mark of a test row without a label.
                row[column] = names[value] if isinstance(value, int) and 0 <= value < len(names) else None
            yield f"{where}:{i}", row


def find_sources(config: Config) -> list[Source]:
    """The sources of a run, in the order of their tasks. ``data.root`` replaces ``datasets``.

    Raises:
        ConfigError: settings that cannot go together.
        DataError: a file or folder that does not exist or holds no data.
    """
    if config.data.root is not None:
        return _root_sources(config.data.root, config.datasets)
    sources = [_dataset_source(entry, f"datasets[{i}]") for i, entry in enumerate(config.datasets)]
    seen: dict[str, str] = {}
    for source in sources:
        if source.name in seen and not (source.task_column or source.config.task_column):
            raise ConfigError(
                f"{source.key}: the task {source.name!r} comes from {seen[source.name]} too; give each a name"
            )
        seen.setdefault(source.name, source.key)
    return sources


def _root_sources(root: str, entries: tuple[DatasetConfig, ...]) -> list[Source]:
    folder = Path(root)
    if not folder.is_dir():
        raise DataError("no such folder; data.root holds one folder a task", root)
    known = {entry.name: entry for entry in entries if entry.name}
    sources = []
    for child in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = _split_files(child)
        if not files:
            raise DataError(f"no data; expected {_expected()}", str(child))
        # Labels, template, group and metric of a data set hold for the folder of the same name too.
        entry = dataclasses.replace(
            known.get(child.name, DatasetConfig()), name=child.name, path=str(child), subset=None,
            split="train", validation_path=None, validation_split=None, test_path=None, test_split=None,
        )  # fmt: skip
        sources.append(Source(f"data.root/{child.name}", child.name, entry, files=files, task_column=""))
    if not sources:
        raise DataError("holds no folders; data.root is a folder with one folder a task", root)
    return sources


def _expected() -> str:
    return f"train|validation|test with one of {', '.join(READERS)}"


def _split_files(folder: Path, names: tuple[str, ...] = SPLITS) -> dict[str, Path]:
    files = {}
    for name in names:
        found = [folder / f"{name}{suffix}" for suffix in READERS if (folder / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            raise DataError(f"{found[0].name} and {found[1].name} are both here; keep one", str(folder))
        if found:
            files[name] = found[0]
    return files


def _dataset_source(entry: DatasetConfig, key: str) -> Source:
    if not entry.path:
        raise ConfigError(f"{key}.path: is missing; give a file, a folder or a name on the hub")
    path = Path(entry.path)
    named = {"train": entry.split, "validation": entry.validation_split, "test": entry.test_split}
    files: dict[str, Path] = {}
    hub: dict[str, str] = {}
    if path.is_dir():
        files = _folder_files(path, {s: n for s, n in named.items() if n}, key)
    elif path.is_file() or path.suffix.lower() in READERS or not _HUB_NAME.fullmatch(entry.path):
        if not path.is_file():
            raise DataError(f"no such file{_nearest(path)}", f"{key}.path {entry.path}")
        ineffective = {
            "subset": entry.subset,
            "split": entry.split != "train",
            "validation_split": entry.validation_split,
            "test_split": entry.test_split,
        }
        for setting, value in ineffective.items():
            if value:
                raise ConfigError(
                    f"{key}.{setting}: has no effect on a file; use validation_path and test_path"
                )
        files["train"] = path
    else:
        hub = {s: n for s, n in named.items() if n}
    for split, other in (("validation", entry.validation_path), ("test", entry.test_path)):
        if other is not None:
            if not Path(other).is_file():
                raise DataError(f"no such file{_nearest(Path(other))}", f"{key}.{split}_path {other}")
            files[split] = Path(other)
    name = entry.name or default_name(entry)
    return Source(key, name, entry, files=files, hub_splits=hub, task_column=entry.task_column)


def _folder_files(folder: Path, named: dict[str, str], key: str) -> dict[str, Path]:
    wanted = {split: named.get(split, split) for split in SPLITS}
    found = _split_files(folder, tuple(dict.fromkeys(wanted.values())))
    for split, name in named.items():
        if name not in found and (split, name) != ("train", "train"):
            raise DataError(
                f"no split {name!r} here; expected {name} with one of {', '.join(READERS)}", str(folder)
            )
    files = {split: found[name] for split, name in wanted.items() if name in found}
    if not files:
        raise DataError(f"no data; expected {_expected()} ({key}.path)", str(folder))
    return files


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def default_name(entry: DatasetConfig) -> str:
    """The task of a data set that gives none a name."""
    path = Path(entry.path)
    if entry.subset:
        return entry.subset
    return path.parent.name if path.stem in SPLITS and path.parent.name else path.stem
