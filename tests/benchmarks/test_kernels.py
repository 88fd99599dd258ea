from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
TINY = ["--device", "cpu", "--runs", "2", "--json"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The script and its rooms. The script goes by another name: ``kernels`` is Hugging Face's."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("kernel_shapes", "kernel_peers", "kernel_timing", "kernel_report")
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    spec = importlib.util.spec_from_file_location("kernels_script", FOLDER / "kernels.py")
    assert spec is not None and spec.loader is not None
    modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(modules["script"])
    monkeypatch.setattr(modules["script"], "copy_bandwidth", lambda _: 1e10)
    return SimpleNamespace(**modules)


def run(parts: SimpleNamespace, capsys, shapes: list[object], *arguments: str) -> tuple[int, dict, str]:
    threads = torch.get_num_threads()
    try:
        code = parts.script.main([*TINY, *arguments], shapes)
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


def shapes_of(parts: SimpleNamespace, *banks: tuple[int, int, int | None]) -> list[object]:
    batch = (4, 8, 32, 24)
    return [parts.kernel_shapes.Shape(*batch, *b, way) for b in banks for way in parts.kernel_shapes.ROUTINGS]


def test_every_routing_is_right_and_timed(parts, capsys, tmp_path) -> None:
    shapes = shapes_of(parts, (4, 4, 2), (4, 1, None), (40, 8, 2))
    code, result, out = run(parts, capsys, shapes, "--out", str(tmp_path / "deep" / "a.json"))
    assert code == 0 and not result["not_run"]
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == result
    assert {"date", "device", "dtype", "threads", "copy_bandwidth", "versions"} <= result.keys()
    assert [shape["status"] for shape in result["shapes"]] == ["right"] * len(shapes)
    for shape in result["shapes"]:
        assert shape["check"]["same_bits"]
        assert shape["check"]["errors"].keys() == set(parts.kernel_shapes.TENSORS)
        assert [row["direction"] for row in shape["rows"]] == ["forward", "forward+backward"]
        for row in shape["rows"]:
            assert not row["failed"], row["failed"]
            assert {"ours", "base", "P1 loop", "P4 dense"} <= row["seconds"].keys()
            assert row["best_ratio"] == min(x for name, x in row["ratios"].items() if name[:2] != "P7")
            assert row["overhead"].keys() == {"base + ours", "ours, then base"} and row["roofline"] > 0
    # Who can do what: k experts a task, in sequences of one length.
    everyone = {"P1 loop", "P2 gathered", "P3 grouped_mm", "P4 dense", "P5 segments"}
    assert everyone <= result["shapes"][0]["rows"][0]["ratios"].keys()
    assert result["shapes"][2]["left_out"].keys() >= {"P2 gathered", "P5 segments", "P7 peft"}
    task, token = result["targets"]
    assert task["of"] == token["of"] == 6 and task["worst"] > 0 and task["target"] in out


def test_a_wrong_result_has_no_speed(parts, capsys, monkeypatch, tmp_path) -> None:
    right = parts.kernel_peers.low_rank

    def wrong(x, y, A, B, gates, *rest):
        return right(x, y, A, B, gates * 1.00001, *rest)

    shapes = shapes_of(parts, (4, 4, 2))[:1]
    monkeypatch.setattr(parts.kernel_peers, "low_rank", wrong)
    code, result, out = run(parts, capsys, shapes, "--out", str(tmp_path / "a.json"))
    assert code == 1 and "WRONG" in out
    (shape,) = result["shapes"]
    assert shape["status"] == "WRONG" and shape["rows"] == [] and "dA" in shape["check"]["wrong"]


def test_a_failure_or_no_time_never_stops_the_rest(parts, capsys, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(parts.kernel_peers, "low_rank", broken)
    code, result, out = run(parts, capsys, shapes_of(parts, (4, 4, 2)), "--check", "--out", "-")
    assert code == 0
    assert [shape["status"] for shape in result["checks"]] == ["failed", "failed", "right", "right"]
    assert result["checks"][0]["error"] == "RuntimeError: out of luck" and "out of luck" in out
    _, result, out = run(parts, capsys, shapes_of(parts, (4, 4, 2)), "--budget", "0", "--out", "-")
    assert len(result["not_run"]) == 4 and result["shapes"] == [] and "out of time: 4 shapes" in out


def test_errors_are_those_of_an_autograd_loop(parts) -> None:
    """The truth by the formulas against the truth of the loop over experts, in fp64."""
    for shape in shapes_of(parts, (5, 3, 2), (5, 3, None)):
        o = parts.kernel_shapes.operands(shape, "cpu", torch.float64)
        found = parts.script.step(parts.kernel_peers.loop(o), o.dy)
        errors = parts.kernel_shapes.Truth(o).errors(parts.script._named(found))
        assert errors.pop("dgates") < 1e-6  # gates are fp32
        assert max(errors.values()) < 1e-14


def test_least_bytes_by_hand(parts) -> None:
    shape = parts.kernel_shapes.Shape(1, 10, 4, 6, 3, 2, 1, "task equal")
    # Forward: x 40, y read and written 120, s written and read 2 * 20 of 4 bytes, banks 3 * 2 * 10.
    forward = 2 * (40 + 120) + 4 * 40 + 2 * 60
    # Backward: dy 60, x read and dx written 80; s read, ds written and read; banks read, gradients written.
    assert parts.kernel_shapes.least_bytes(shape, 2, "forward") == forward
    backward = 2 * (60 + 80) + 4 * 60 + 2 * 120
    assert parts.kernel_shapes.least_bytes(shape, 2, "forward+backward") == forward + backward


def test_a_plain_checkout_is_enough(tmp_path) -> None:
    """Neither installed nor on the path: taskmoe is the folder above."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import kernel_peers, taskmoe.kernels.plan as plan\n"
        f"assert plan.__file__ == {str(ROOT / 'kernels' / 'plan.py')!r}, plan.__file__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_the_script_gives_way_to_the_package_of_its_name(tmp_path) -> None:
    """transformers imports ``kernels``, and a script of this folder has the folder on its path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mine = True\n")
    code = (
        f"import sys; sys.path[:0] = [{str(FOLDER)!r}]; sys.path.append({str(tmp_path)!r})\n"
        "import kernels\n"
        "assert kernels.mine\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
