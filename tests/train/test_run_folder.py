from __future__ import annotations

from pathlib import Path

import pytest

from taskmoe.moe import ConfigError, TaskTable
from taskmoe.train import run_folder
from taskmoe.train.config import Config


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint, and a file of somebody else's beside it."""
    folder = tmp_path / "run"
    prepare(folder)
    (folder / "checkpoint-2").mkdir()
    (folder / "wandb").mkdir()
    (folder / "trainer_log.jsonl").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def prepare(folder: Path, resumed: Path | None = None) -> None:
    run_folder.prepare(config(folder), TaskTable.from_names(["a"]), Tokenizer(), resumed)  # type: ignore[arg-type]


def config(folder: Path, **settings: object) -> Config:
    return Config(model={"type": "llama"}, output_dir=str(folder), **settings)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder(tmp_path: Path) -> None:
    run_folder.check(config(tmp_path / "a" / "b"), None)
    assert not (tmp_path / "a").exists()  # a check changes nothing
    prepare(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == {"config.yaml", "task_map.json", "tokenizer"}


def test_other_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("of another program")
    run_folder.check(config(tmp_path), None)


def test_a_run_is_not_overwritten_unasked(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run; go on with --resume_from_checkpoint true"):
        run_folder.check(config(run), None)
    run_folder.check(config(run, overwrite_output_dir=True), None)
    run_folder.check(config(run), run / "checkpoint-2")
    with pytest.raises(ConfigError, match="already holds a run"):  # the checkpoint of another run
        run_folder.check(config(run), run.parent / "other" / "checkpoint-2")
    (run / "checkpoint-2").rmdir()
    with pytest.raises(ConfigError, match="saved no checkpoint; choose another") as caught:
        run_folder.check(config(run), None)
    assert "resume" not in str(caught.value)


def test_overwriting_removes_the_run_and_nothing_else(run: Path) -> None:
    prepare(run)
    assert names(run) == {"config.yaml", "task_map.json", "tokenizer", "notes.txt"}


def test_resuming_removes_nothing(run: Path) -> None:
    before = names(run)
    prepare(run, run / "checkpoint-2")
    assert names(run) == before and (run / "trainer_log.jsonl").read_text() == "old"


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"output_dir: .*file is not a folder; choose another"):
            run_folder.check(config(folder), None)
        with pytest.raises(ConfigError, match=r"output_dir: .* cannot be written"):
            prepare(folder)
