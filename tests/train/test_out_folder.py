"""Folders of results: only an earlier result gives way, and then nothing of it is read with the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskmoe.train.out_folder import ExportError, in_place, require_free


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_no_sign_of_an_earlier_result_is_left(tmp_path) -> None:
    write(tmp_path / "out", "adapter_config.json", "adapter_model.safetensors", "mine.txt")
    with in_place(tmp_path / "out") as folder:
        write(folder, "config.json", "model.safetensors")
    left = {"config.json", "model.safetensors", "adapter_model.safetensors", "mine.txt"}
    assert names(tmp_path / "out") == left
    with in_place(tmp_path / "out") as folder:
        write(folder, "adapter_config.json")
    assert names(tmp_path / "out") == {"adapter_config.json", "adapter_model.safetensors", "mine.txt"}
    with in_place(tmp_path / "out") as folder:  # a folder a task: nothing beside them is read with them
        write(folder, "mood/adapter_config.json")
    assert {"adapter_config.json", "mood/adapter_config.json"} <= names(tmp_path / "out")


def test_folders_of_other_things_stay(tmp_path) -> None:
    """Tasks are named after folders of data, say, and the results are to lie where these are."""
    write(tmp_path, "irony/adapter_config.json", "irony/old.txt", "mood/train.jsonl")
    before = names(tmp_path)
    match = "mood is in the way and holds other things"
    with pytest.raises(ExportError, match=match), in_place(tmp_path) as folder:
        write(folder, "irony/config.json", "mood/config.json")
    assert names(tmp_path) == before
    with in_place(tmp_path) as folder:
        write(folder, "irony/config.json")
    assert names(tmp_path) == {"irony/config.json", "mood/train.jsonl"}


def test_an_error_leaves_everything_and_says_what_it_was(tmp_path) -> None:
    write(tmp_path / "out", "config.json")
    for error, message in (
        (OSError("no such model on the hub"), "out is not written: no such model on the hub"),
        (OSError(28, "No space left"), r"--out: .*out cannot be written \(No space left\)"),
    ):
        with pytest.raises(ExportError, match=message), in_place(tmp_path / "out") as folder:
            write(folder, "adapter_config.json")
            raise error
        assert names(tmp_path) == {"out/config.json"}


def test_files_are_never_moved_from_one_file_system_to_another(tmp_path) -> None:
    """A folder that is there may be a disk of its own, and the one around it of another user."""
    for existing in (False, True):
        out = tmp_path / "deep" / "out"
        with in_place(out) as folder:
            assert folder.parent == (out if existing else out.parent)
            write(folder, "config.json")
        assert names(tmp_path) == {"deep/out/config.json"}
        assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("sign", ["checkpoint-20/manifest.json", "manifest.json"])
def test_runs_and_checkpoints_are_not_written_into(sign, tmp_path) -> None:
    write(tmp_path, sign)
    with pytest.raises(ExportError, match="holds a run; give another folder"):
        require_free(tmp_path, force=True)


def test_a_run_without_steps_may_be_written_anew(tmp_path) -> None:
    write(tmp_path, "checkpoint-0/manifest.json")
    require_free(tmp_path, force=True)
    with pytest.raises(ExportError, match="is not empty"):
        require_free(tmp_path, force=False)
