"""The benchmark of exported tasks: a tiny run of every variant ends in one object."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers renamed
def test_a_tiny_run_ends_in_one_json_object(capsys, monkeypatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    script, threads = runpy.run_path(str(FOLDER / "export.py")), torch.get_num_threads()
    try:
        script["main"](["--batches", "2x8", "--rounds", "3", "--width", "32", "--layers", "1", "--json"])
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("step", None)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    names = {f"{form}_{what}_2x8" for form in script["ROUTED"] for what in ("routed", "peft", "merged")}
    assert names < result.keys() and result["base_2x8"]["times_base"] == 1.0
    assert all(result[name]["times_base"] > 0 for name in names)
    assert sum("merged" in line for line in lines[:-1]) == len(script["ROUTED"])
