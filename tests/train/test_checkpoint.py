"""Checkpoints: whole or not at all, believed only when intact, never the last whole one lost."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from taskmoe.train import checkpoint, distributed
from taskmoe.train.checkpoint import CheckpointError, find, read_state, save, verify
from taskmoe.train.distributed import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def write(folder):
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "deepspeed" / "tag").mkdir(parents=True)
    (folder / "deepspeed" / "tag" / "optim_rank_0.pt").write_bytes(b"optimiser" * 100)


def store(run_dir, step, limit=0, keep=(), writer=write, **state):
    return save(run_dir, step, writer, state, limit, set(keep), ALONE)


def names(run_dir):
    return sorted(path.name for path in Path(run_dir).iterdir())


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_checkpoint_is_whole_and_the_latest(tmp_path):
    folder = store(tmp_path, 10, sampler={"position": 80})
    assert folder == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-10\n"
    assert verify(folder) is None
    assert read_state(folder) == {"sampler": {"position": 80}, "step": 10, "world_size": 1}
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(listed) == on_disk - {"manifest.json"}
    assert find(tmp_path) == folder


def test_random_state_comes_back(tmp_path):
    draws()
    random.gauss(0, 1)  # leaves half of a pair behind, in Python's generator
    np.random.randn()  # and in numpy's
    folder = store(tmp_path, 1)
    expected = [draws(), random.gauss(0, 1), np.random.randn()]
    draws()
    checkpoint.load_rng(folder, ALONE)
    assert [draws(), random.gauss(0, 1), np.random.randn()] == expected


def test_more_ranks_than_wrote_the_checkpoint(tmp_path):
    folder = store(tmp_path, 1)
    with pytest.raises(CheckpointError, match="written by 1 ranks, this run has 2"):
        checkpoint.load_rng(folder, Ranks(1, 2, 1, torch.device("cpu")))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "deepspeed" / "tag" / "optim_rank_0.pt"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "truncated": (truncate, r"adapter_model.safetensors has 2047 bytes instead of 2048"),
    "flipped bit": (flip, r"optim_rank_0.pt is not as it was written"),
    "missing file": (lambda f: (f / "rng-0.pt").unlink(), r"rng-0.pt is missing"),
    "missing folder": (lambda f: shutil.rmtree(f / "deepspeed"), r"optim_rank_0.pt is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest.json is missing"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"files": {'), r"not readable"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("[]"), r"not readable"),
    "no files listed": (lambda f: edit_manifest(f, lambda m: m["files"].clear()), r"trainer_state.json"),
    "later format": (lambda f: edit_manifest(f, lambda m: m.update(format=9)), r"format 9"),
    "path outside": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}})),
        r"outside the checkpoint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    store(tmp_path, 1)
    newest = store(tmp_path, 2)
    spoil, reason = DAMAGES[damage]
    spoil(newest)
    assert re.search(reason, verify(newest) or "")
    assert find(tmp_path).name == "checkpoint-1"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(newest) in said
    with pytest.raises(CheckpointError, match=reason) as caught:  # asked for by name: no other will do
        find(tmp_path, str(newest))
    assert str(newest) in str(caught.value) and "checkpoint-1" in str(caught.value)
    spoil(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no whole checkpoint") as caught:
        find(tmp_path)
    assert "checkpoint-1:" in str(caught.value) and "checkpoint-2:" in str(caught.value)


def test_finding(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="there is no folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint-N"):
        find(tmp_path)
    run = tmp_path / "run"
    first = store(run, 5)
    store(run, 100)
    assert find(run, "true").name == "checkpoint-100"
    assert find(tmp_path, str(run)).name == "checkpoint-100"
    assert find(tmp_path, str(first)) == first
    assert find(run, "checkpoint-5") == first
    with pytest.raises(CheckpointError, match="there is no folder checkpoint-6"):
        find(run, "checkpoint-6")
    # Resumed from step 5: what was written last counts, not the higher step of the abandoned branch.
    store(run, 6)
    assert find(run).name == "checkpoint-6"
    (run / "latest").unlink()
    assert find(run).name == "checkpoint-6"


def test_the_newest_and_the_best_stay(tmp_path):
    for step in (10, 20, 30, 40, 50):
        store(tmp_path, step, limit=2, keep={10})
        assert verify(tmp_path / f"checkpoint-{step}") is None
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-40", "checkpoint-50", "latest"]
    store(tmp_path, 60, limit=1, keep={50})
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-60", "latest"]
    store(tmp_path, 70, limit=0)
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-60", "checkpoint-70", "latest"]


def test_the_one_just_written_stays_although_older_ones_have_higher_steps(tmp_path):
    for step in (10, 20, 30, 15):
        store(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-30", "latest"]


def test_only_what_is_read_may_be_looked_at(tmp_path):
    folder = store(tmp_path, 1)
    flip(folder)
    name = "deepspeed/tag/optim_rank_0.pt"
    assert checkpoint.verify(folder, hashes=("trainer_state.json",)) is None
    assert checkpoint.find(tmp_path, hashes=("trainer_state.json",)) == folder
    assert f"{name} is not as it was written" in str(checkpoint.verify(folder, hashes=(name,)))
    truncate(folder)
    assert "adapter_model" in str(checkpoint.verify(folder, hashes=()))  # sizes are always looked at


def test_damaged_checkpoints_do_not_push_out_a_whole_one(tmp_path):
    store(tmp_path, 1)
    for step in (2, 3):
        truncate(store(tmp_path, step))
    store(tmp_path, 4, limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "latest"]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_bytes(b"from another program")
    for step in (1, 2, 3):
        store(tmp_path, step, limit=1)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-7", "latest"]


def no_space(folder):
    write(folder)
    (folder / "more").symlink_to("/dev/full")
    with (folder / "more").open("wb") as file:
        file.write(b"x" * 100_000)


def not_allowed(folder):
    raise PermissionError(13, "Permission denied", str(folder / "optim.pt"))


def broken_writer(folder):
    raise RuntimeError("PytorchStreamWriter failed writing file data/3")


@pytest.mark.parametrize(
    ("writer", "state", "cause"),
    [
        (no_space, {}, "No space left on device"),
        (not_allowed, {}, "Permission denied: .*optim.pt"),
        (broken_writer, {}, "RuntimeError: PytorchStreamWriter failed"),
        (write, {"best": object()}, "TypeError: .*not JSON serializable"),
    ],
)
def test_a_failed_save_leaves_what_was_there(tmp_path, writer, state, cause):
    before = store(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"cannot write .*checkpoint-2: {cause}"):
        store(tmp_path, 2, limit=1, writer=writer, **state)
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    assert find(tmp_path) == before
    assert store(tmp_path, 2, limit=1) == find(tmp_path)


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write .*taken/run/checkpoint-1"):
        store(tmp_path / "taken" / "run", 1)
    assert names(tmp_path) == ["taken"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_killed_at_any_moment_a_whole_checkpoint_remains(tmp_path, monkeypatch, again):
    """Dies before the 1st, 2nd, ... call that changes the disk's state, each time in a fresh run folder."""
    moments = 0
    original = {"_sync": checkpoint._sync, "rename": Path.rename, "replace": checkpoint.os.replace,
                "rmtree": shutil.rmtree, "write_text": Path.write_text}  # fmt: skip
    for deadly in range(1, 100):
        run = tmp_path / f"run-{deadly}"
        store(run, 4)
        calls = 0

        def mortal(name, deadly=deadly):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    raise Killed
                return original[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_sync", mortal("_sync"))
            patch.setattr(Path, "rename", mortal("rename"))
            patch.setattr(Path, "write_text", mortal("write_text"))
            patch.setattr(checkpoint.os, "replace", mortal("replace"))
            patch.setattr(shutil, "rmtree", mortal("rmtree"))
            try:
                store(run, 4 if again else 5, limit=1, mark="second")
                survived = True
            except Killed:
                survived = False
        if survived:
            break
        moments += 1
        found = find(run)
        assert verify(found) is None
        store(run, 6, limit=1)
        assert find(run).name == "checkpoint-6"
        assert names(run) == ["checkpoint-6", "latest"]
    assert moments > 12  # it did die, at every step of the way


def save_as_rank(run_dir, step, failing=(), stuck=False, cause="No space left on device"):
    """In the pair: a save in which the ranks of `failing` cannot write; returns what each rank met."""
    ranks = distributed.init()

    def writer(folder):
        if ranks.rank in failing:
            raise OSError(28, cause, str(folder / "x"))
        (folder / f"shard-{ranks.rank}.pt").write_bytes(bytes([ranks.rank]) * 1000)
        if stuck:
            distributed.barrier()

    random.seed(ranks.rank)
    np.random.seed(ranks.rank)
    torch.manual_seed(ranks.rank)
    checkpoint.FAILURE_PATIENCE_S = 1.0
    try:
        folder = save(run_dir, step, writer, {}, 2, set(), ranks)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint.FAILURE_PATIENCE_S = 30.0
        if stuck:
            distributed.shutdown()  # as the end of a failed run does; the pair makes a new group
    expected = draws()
    checkpoint.load_rng(checkpoint.find_together(run_dir, "true", ranks), ranks)
    return str(folder), expected, draws()


def test_two_ranks_write_one_checkpoint(tmp_path, spawn_ranks):
    (folder, expected, found), (folder_1, expected_1, found_1) = spawn_ranks(
        save_as_rank, run_dir=str(tmp_path), step=3
    )
    assert folder == folder_1 == str(tmp_path / "checkpoint-3")
    assert verify(folder) is None
    files = json.loads((Path(folder) / "manifest.json").read_text())["files"]
    assert {"shard-0.pt", "shard-1.pt", "rng-0.pt", "rng-1.pt"} <= set(files)
    assert expected == found and expected_1 == found_1 and found != found_1
    assert read_state(folder)["world_size"] == 2


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_a_rank_that_cannot_write_stops_all(tmp_path, spawn_ranks, failing):
    store(tmp_path, 1)
    errors = spawn_ranks(save_as_rank, run_dir=str(tmp_path), step=2, failing=failing)
    assert errors[0] == errors[1]
    assert f"rank {failing[0]}: No space left on device" in errors[0]
    assert names(tmp_path) == ["checkpoint-1", "latest"]


def test_a_rank_that_fails_while_the_other_waits_for_it(tmp_path, spawn_ranks):
    # The waiting rank is freed when the other closes its connections. Engines of earlier tests may hold on to
    # the group, as those of an ended process cannot: so a fresh pair.
    spawn_ranks.close()
    store(tmp_path, 1)
    errors = spawn_ranks(save_as_rank, run_dir=str(tmp_path), step=2, failing=(1,), stuck=True, timeout_s=60)
    assert "No space left on device" in errors[1]
    assert "cannot write" in errors[0]
    assert find(tmp_path).name == "checkpoint-1"


def fail_to_find(run_dir):
    try:
        checkpoint.find_together(run_dir, "true", distributed.init())
    except CheckpointError as error:
        return str(error)
    return None


def test_all_ranks_hear_that_there_is_no_checkpoint(tmp_path, spawn_ranks):
    errors = spawn_ranks(fail_to_find, run_dir=str(tmp_path))
    assert errors[0] == errors[1] and "no checkpoint-N" in errors[0]
