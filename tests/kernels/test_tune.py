from __future__ import annotations

import json

import pytest
import torch

from taskmoe.kernels import configs
from taskmoe.kernels.configs import Key, Launch
from taskmoe.kernels.tune import candidates, misfits, problem, tune, write
from taskmoe.train.cli import main

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch, tmp_path):
    monkeypatch.setenv("TASKMOE_KERNEL_CONFIGS", str(tmp_path / "kernels.json"))
    configs.overrides.cache_clear()
    yield
    configs.overrides.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """One line of the table, and no batch to make."""
    monkeypatch.setattr(
        configs, "keys", lambda: iter([Key("shrink", 16, "narrow", 16), Key("wgrad", 32, "wide", 64)])
    )
    monkeypatch.setattr("taskmoe.kernels.tune.problem", lambda key, device: lambda: None)


def present() -> Launch:
    """What a launch of the small line would use now."""
    return configs.launch("sm_90", "Some GPU", "shrink", 16, 1024, 16)


def test_the_fastest_launch_is_kept_and_found_again(small, tmp_path) -> None:
    said: list[str] = []
    wanted = Launch(64, 0, 8, 3)
    assert present() != wanted
    lines = tune("Some GPU", "sm_90", CPU, 60, said.append, lambda run: 1.0 if present() == wanted else 2.0)
    assert lines == {"shrink/16/narrow/16": [64, 0, 8, 3]}
    assert len(said) == 1 and "2.00 x the table's" in said[0]  # float64 is not tuned
    assert present() != wanted, "tuning itself leaves nothing behind"
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"Other": {"shrink/16/narrow/16": [64, 0, 4, 2]}}))
    write(path, "Some GPU", lines)
    assert set(json.loads(path.read_text())) == {"Other", "Some GPU"}
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]
    configs.overrides.cache_clear()
    assert present() == wanted
    assert configs.launch("sm_90", "Another GPU", "shrink", 16, 1024, 16) != wanted


def test_a_gain_within_the_noise_changes_nothing(small) -> None:
    first = present()
    lines = tune(
        "Some GPU", "sm_90", CPU, 60, lambda _: None, lambda run: 1.0 if present() == first else 0.98
    )
    assert lines == {"shrink/16/narrow/16": None}


def test_what_a_shorter_run_did_not_measure_stays(tmp_path) -> None:
    path = tmp_path / "kernels.json"
    write(path, "Some GPU", {"shrink/16/narrow/16": [64, 0, 8, 3], "wgrad/16/narrow/16": [64, 32, 4, 2]})
    write(path, "Some GPU", {"shrink/16/narrow/16": None, "expand/16/narrow/16": [128, 0, 4, 1]})
    assert set(json.loads(path.read_text())["Some GPU"]) == {"wgrad/16/narrow/16", "expand/16/narrow/16"}


def test_a_launch_that_does_not_fit_is_passed_over(small) -> None:
    from triton.runtime.errors import OutOfResources

    assert OutOfResources in misfits()
    first = present()

    def timer(run) -> float:
        if present().num_stages == 4 and present() != first:
            raise OutOfResources(300000, 200000, "shared memory")
        return 1.0 if present().num_stages == 3 else 2.0

    [values] = tune("Some GPU", "sm_90", CPU, 60, lambda _: None, timer).values()
    assert values[3] == 3


def test_an_error_of_another_kind_is_not_swallowed(small) -> None:
    def timer(run) -> float:
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        tune("Some GPU", "sm_90", CPU, 60, lambda _: None, timer)


def test_when_the_time_is_spent_the_rest_is_left(small) -> None:
    said: list[str] = []
    assert tune("Some GPU", "sm_90", CPU, -1, said.append, lambda run: 1.0) == {}
    assert "the time is spent" in said[0]


def test_every_candidate_can_be_written_and_read(tmp_path) -> None:
    for key in list(configs.keys()):
        found = list(candidates(key))
        assert len(found) == len(set(found)) >= 4
        write(
            tmp_path / "all.json",
            str(key),
            {str(key): [c.width, c.rows, c.num_warps, c.num_stages] for c in found[:1]},
        )
    assert len(configs.read_overrides(tmp_path / "all.json")) == len(list(configs.keys()))


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_the_problem_is_a_launch_of_the_kernel(kernel, monkeypatch) -> None:
    from taskmoe.kernels import low_rank_triton

    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    for name in ("shrink", "expand", "wgrad", "reduce"):
        monkeypatch.setattr(low_rank_triton, name, Kernel())
    monkeypatch.setattr("taskmoe.kernels.tune.ROWS", 256)
    problem(Key(kernel, 32, "narrow", 16), CPU)()
    assert len(launched) == (2 if kernel == "wgrad" else 1)


def test_the_command(capsys, monkeypatch) -> None:
    assert main(["tune"]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert main(["tune", "--budget", "soon"]) == 2
    assert "'soon' is not a whole number of seconds" in capsys.readouterr().err
    assert main(["tune", "now"]) == 2
    assert "unexpected argument 'now'" in capsys.readouterr().err
    assert main(["tune", "--help"]) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    lines = {"shrink/16/narrow/16": [64, 0, 8, 3], "shrink/32/narrow/16": None}
    monkeypatch.setattr("taskmoe.kernels.tune.tune", lambda *_: lines)
    assert main(["tune"]) == 0
    said = capsys.readouterr().out
    assert "1 launches of Some GPU written to" in said and "1 are best as they are" in said
    assert present() == Launch(64, 0, 8, 3)
