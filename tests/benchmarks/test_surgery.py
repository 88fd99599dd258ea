from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = ["--width", "16", "--layers", "1", "--rounds", "2", "--slow_rounds", "1"]


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("surgery")


@pytest.fixture
def steps(surgery: ModuleType) -> ModuleType:
    return importlib.import_module("surgery_steps")


def test_a_tiny_run_ends_in_one_json_object(surgery, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        sizes = [*SIZES, "--tasks", "8", "--batches", "8x6", "8x4"]
        surgery.main([*sizes, "--growth", "16:1:2", "--growth_batches", "8x3", "--json"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    for way in ("plain", "separate", "slices"):
        assert result[f"fused_over_{way}_T8"] > 0 and result[f"fused_over_{way}_T8_8x4"] > 0
    assert len(result["cases"]) == 3
    assert result["cases"][2]["num_experts"] == 2
    verdicts = [line for line in lines if " at most " in line]
    assert len(verdicts) == 4  # three times and the memory: no batch of the fourth target was run
    assert all(line.endswith(("pass", "MISS")) for line in verdicts)


def test_all_ways_to_the_gradients_take_the_same_step(steps) -> None:
    shape = steps.Shape(tasks=3, width=16, layers=1, r=2, num_experts=2)
    ids, task_ids = steps.draw(torch.Generator().manual_seed(0), 7, 5, 3)
    assert sorted(set(task_ids.tolist())) == [0, 1, 2] and task_ids.tolist() == sorted(task_ids.tolist())
    found = {}
    for way in ("plain", "fused", "separate", "slices"):
        model = steps.build(shape).double()
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "optimiser_of", lambda _, chosen=optimiser: chosen)
            steps.WAYS[way][1](model)(ids, task_ids)
        found[way] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for way in ("separate", "slices"):
        for name, value in found["fused"].items():
            assert torch.allclose(found[way][name], value, atol=1e-12), (way, name)
    assert any(not torch.allclose(found["plain"][n], v, atol=1e-6) for n, v in found["fused"].items())


def test_memory_is_what_the_allocator_holds_at_its_peak(steps) -> None:
    def step(ids: torch.Tensor, task_ids: torch.Tensor) -> None:
        for _ in range(3):  # one at a time
            torch.zeros(1000, 1000)

    peak = steps.peak_bytes(step, torch.zeros(1), torch.zeros(1))
    assert 4_000_000 <= peak < 4_100_000


def test_the_grant_counts_shared_entries_and_the_largest_layer(steps) -> None:
    shape = steps.Shape(tasks=3, width=16, layers=1, r=2, num_experts=2, router="task_table")
    model = steps.build(shape)
    largest = 2 * 2 * (16 + 64)
    assert steps.largest_layer(model) == largest
    banks = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 64))
    assert steps.shared_entries(model) == banks
    assert steps.allowed_bytes(model, 3) == 4 * 3 * (banks + largest)
