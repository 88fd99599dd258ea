from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALLEST = ["--steps", "2", "--rows", "2", "--width", "16", "--base-steps", "2", "--rates", "0.01"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torchjd")
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    names = ("conflict_bed", "conflict_look", "conflict")
    bed, look, conflict = (importlib.import_module(name) for name in names)
    # Few rows: how many there are is not what is tested.
    monkeypatch.setattr(bed, "GYM", bed.replace(bed.GYM, train_rows=200, validation_rows=10, test_rows=10))
    yield SimpleNamespace(bed=bed, look=look, conflict=conflict)
    torch.set_num_threads(threads)


def test_the_smallest_run_ends_in_one_json_object_and_goes_on_where_it_was(
    parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*SMALLEST, "--draws", "1", "--levels", "opposed", "--seeds", "1", "--json"]
    call += ["--out", str(tmp_path)]
    parts.conflict.main(call)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"date", "versions", "machine", "threads", "settings", "seeds", "levels"} <= set(result)
    level = result["levels"]["opposed"]
    assert set(level["lora"]) == set(parts.conflict.ARMS) and set(level["bank"]) == {"sum", "pcgrad"}
    for kind in ("lora", "bank"):
        for arm, one in level[kind].items():
            steps = 3 if arm == "longer" else 2
            assert len(one["cpu_seconds"]) == 1 and one["curve"][-1]["step"] == steps
            assert ("against_longer" in one) is (kind == "lora")
            assert bool(one["tried"]) is (arm != "longer")
            for view in ("equal_steps", "equal_time"):
                assert len(one[view]["scores"]["mean"]) == 1
                assert set(one[view]["against_sum"]) == {"mean", "worst", "loss", "worst_loss"}
    assert level["lora"]["sum"]["equal_steps"]["against_sum"]["mean"] == {"mean": 0.0, "interval": None}
    assert set(level["gradients"]) == {"2", "8", "32"}
    names = {"cosine", "null_cosine", "rivals_cosine", "halves_cosine", "conflict_fraction"}
    names |= {f"{method}_{what}" for method in parts.bed.METHODS for what in ("change", "turn")}
    assert all(names <= set(one) for one in level["gradients"].values())

    def no_training(*args: Any, **more: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(parts.conflict, "train", no_training)
    parts.conflict.main(call)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["levels"] == result["levels"]
    with pytest.raises(AssertionError, match="trained again"):
        parts.conflict.main([*call, "--steps", "3"])


def test_seed_zero_tunes_only(parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parts.conflict.main(["--seeds", "0", "1", "--out", str(tmp_path)])
    assert "without 0" in capsys.readouterr().err


def test_comparison_is_paired_and_by_time_between_evaluations(parts: Any) -> None:
    def run(seconds: tuple[float, float], letters: tuple[float, float]) -> dict[str, Any]:
        curve = [
            {"step": 10 * (i + 1), "cpu_seconds": s,
             "test": {"letters": [x, x + 0.2], "exact": [0.0, x], "loss": [1.0, 2.0]}}
            for i, (s, x) in enumerate(zip(seconds, letters, strict=True))
        ]  # fmt: skip
        return {"curve": curve}

    fast = [run((1.0, 2.0), (0.2, 0.4)), run((1.0, 2.0), (0.3, 0.7))]
    slow = [run((1.5, 3.0), (0.2, 0.5)), run((2.0, 4.0), (0.3, 0.8))]
    found = parts.conflict.compare({"sum": fast, "pcgrad": slow})["pcgrad"]
    steps, time = found["equal_steps"], found["equal_time"]
    assert steps["scores"]["worst"] == [0.5, 0.8] and steps["scores"]["mean"] == pytest.approx([0.6, 0.9])
    gains = [100 * (0.5 / 0.4 - 1), 100 * (0.8 / 0.7 - 1)]
    middle, half = sum(gains) / 2, 12.706 * abs(gains[0] - gains[1]) / 2
    assert steps["against_sum"]["worst"]["mean"] == pytest.approx(middle)
    assert steps["against_sum"]["worst"]["interval"] == pytest.approx([middle - half, middle + half])
    assert time["scores"]["worst"] == pytest.approx([0.3, 0.3]) and time["scores"]["step"][1] == 10
    assert steps["against_sum"]["loss"]["mean"] == 0.0


def test_tasks_that_agree_and_cannot_be_told_apart_have_the_cosine_of_the_null(parts: Any) -> None:
    size = parts.bed.Size(steps=1, rows=2, width=16, base_steps=40)
    base = parts.bed.build_base(size).state_dict()
    bed = parts.bed.build_bed(parts.bed.replace(parts.bed.LEVELS["same"], visibility=0.0))
    model = parts.bed.build_model(bed, base, size, "lora", 0)
    with torch.no_grad():
        for _, p in model.trainable_groups()["experts"]:
            p.normal_(std=0.05, generator=torch.Generator().manual_seed(p.shape[-1]))
    (found,) = parts.look.gradients(model, bed, rows=(128,), draws=1)
    assert found["halves_cosine"] == pytest.approx(found["null_cosine"], abs=0.1)
    assert found["cosine"] > found["null_cosine"] > 0.5
    assert found["conflict_fraction"] == found["pcgrad_change"] == found["upgrad_change"] == 0.0
