from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture
def step_benchmark() -> dict[str, object]:
    pytest.importorskip("peft")
    return runpy.run_path(str(SCRIPT))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers renamed
def test_a_tiny_run_ends_in_one_json_object(step_benchmark, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        sizes = ["--batches", "2x8", "--rounds", "2", "--width", "32", "--layers", "1"]
        step_benchmark["main"]([*sizes, "--json"])  # type: ignore[operator]
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["lora_ratio_2x8"] > 0 and result["poly_ratio_2x8"] > 0
    assert all(result[f"tokens_per_second_{name}_2x8"] > 0 for name in step_benchmark["VARIANTS"])  # type: ignore[attr-defined]
    assert sum("ours" in line for line in lines) == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_variant_adapts_the_same_linears(step_benchmark) -> None:
    llama, variants = step_benchmark["llama"], step_benchmark["VARIANTS"]
    trainable = {}
    for name, (_, adapt) in variants.items():  # type: ignore[attr-defined]
        model = adapt(llama(32, 2))  # type: ignore[operator]
        trainable[name] = {
            n.rpartition("layers.")[2].split("_proj")[0]
            for n, p in model.named_parameters()
            if p.requires_grad and "layers." in n and "_proj" in n
        }
    assert len(trainable["lora"]) == 2 * 7
    assert all(names == trainable["lora"] for names in trainable.values())


def test_what_following_a_run_costs(step_benchmark, capsys) -> None:
    step_benchmark["main"](["--track", "4", "--json"])  # type: ignore[operator]
    cost = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < cost["tracking_seconds"] < cost["seconds"]
    assert cost["tracking_share"] == cost["tracking_seconds"] / cost["seconds"]
