"""What the documents say is run: the code in README.md, the make targets, the paths they name."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from taskmoe.train.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/METHODS.md", "docs/RESULTS.md")


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README) if kind == language]


def shell_blocks() -> list[str]:
    """Those of commands; `make` is looked at in a test of its own, since it would run this very suite."""
    return [block for block in blocks("bash") if not block.startswith("make ")]


def make_targets() -> list[str]:
    return re.findall(r"^make ([a-z-]+)$", "".join(blocks("bash")), re.MULTILINE)


def test_no_block_escapes() -> None:
    assert {kind for kind, _ in BLOCK.findall(README)} == {"bash", "python", "text"}
    assert README.count("```") == 2 * len(BLOCK.findall(README))
    assert make_targets() == ["quickstart", "test"] and len(shell_blocks()) >= 3


def test_the_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, _ = blocks("python")
    code = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 30
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out.splitlines()
    words, copied = (json.loads(part) for part in said[-2].removeprefix("copy ").split(" -> "))
    again, turned = (json.loads(part) for part in said[-1].removeprefix("reverse ").split(" -> "))
    assert words == again == copied and turned == words[::-1]
    saved = {path.name for path in (tmp_path / "copy_reverse").iterdir()}
    assert saved == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "routing.safetensors",
        "task_map.json",
    }


def test_the_example_of_tasks_that_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = blocks("python")
    assert len(second.splitlines()) < 20
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(first.replace("range(100)", "range(1)"), "README.md", "exec"), names)
    exec(compile(second, "README.md", "exec"), names)
    report = names["report"]
    assert report.rows == [[0], [1]] and (report.weights["all"] >= 1).all()
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("target", [*make_targets(), "test-all", "check", "lock"])
def test_make_targets_exist(target: str) -> None:
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    expected = {
        "quickstart": "taskmoe train configs/quickstart.yaml --num_ranks 2",
        "test": '-m pytest -m "not slow"',
        "test-all": "-m pytest",
        "check": "ruff check",
        "lock": "requirements.lock",
    }
    assert expected[target] in run.stdout


def test_continuous_integration_runs_the_readme_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    # The files of the worked example are made, in a copy, by tests/test_contributing.py.
    text = re.sub(r"## A worked example.*?\n## ", "## ", text, flags=re.DOTALL)
    quoted = re.findall(
        r"[`(]((?:\.ci|kernels|moe|train|configs|tests|docs|benchmarks)/[\w./{},-]*)[`)]", text
    )
    quoted += re.findall(r"[`(]([\w-]+\.(?:md|toml|lock))[`)]", text)
    for name in quoted:
        for path in expand(name):
            assert (ROOT / path).exists(), f"{document} names {path}"


def expand(name: str) -> list[str]:
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")] if match else [name]


def test_the_file_tree_is_true() -> None:
    (tree,) = [text for text in blocks("text") if text.startswith("kernels/")]
    folder, named = "", set()
    for line in tree.splitlines():
        words = line[:25].split()
        if not line.startswith(" "):
            folder, words = words[0], words[1:]
            named.add(folder)
        for word in words:
            if re.fullmatch(r"[\w/]+(\.py|/)", word):
                named.add(folder + word)
    assert len(named) > 25
    for name in named:
        assert (ROOT / name).exists(), f"the tree in README.md names {name}"
    for layer in ("kernels", "moe", "train"):
        assert f"{layer}/" in named


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The quickstart with the same keys and values that take seconds."""
    for phase in config.get("phases", []):
        if phase.get("steps") is not None:
            phase["steps"] = 2
    config["max_steps"] = 2 * max(1, len(config.get("phases", [])))
    config["data"]["skill_gym"] |= {"train_rows": 16, "validation_rows": 4, "test_rows": 4}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config["model"] |= {key: value for key, value in small.items() if key in config["model"]}
    config["per_device_train_batch_size"] = 4
    for key in ("eval_steps", "save_steps", "logging_steps"):
        if config.get(key) is not None:
            config[key] = 2
    return config


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def run_shell(tmp_path: Path) -> Callable[[str, float], str]:
    """Runs a block of commands in a folder that looks like a clone; gives back what it printed."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"

    def run(block: str, timeout: float) -> str:
        # The launcher's fixed port may be in use on a machine that does other things as well.
        block = block.replace("deepspeed --num_gpus", f"deepspeed --master_port {free_port()} --num_gpus")
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return done.stdout

    return run


def check_what_the_commands_left(printed: list[str], folder: Path) -> None:
    for name in ("one_process", "two_ranks", "launched"):
        run = folder / "runs" / name
        left = {path.name for path in run.iterdir()}
        assert {"config.yaml", "task_map.json", "trainer_log.jsonl", "report.html"} <= left
        assert any(re.fullmatch(r"checkpoint-\d+", path.name) for path in run.iterdir())
        steps = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
        assert steps[-1]["status"] == "finished" and any(line["kind"] == "train" for line in steps)
    results = [line for text in printed for line in text.splitlines() if line.startswith('{"')]
    assert results, "taskmoe eval --json printed no object"
    assert isinstance(json.loads(results[0]), dict)


def on_a_rank(folder: str, argv: list[str]) -> int:
    """The command on a rank of the shared pair."""
    os.chdir(folder)
    return main(argv)


@pytest.fixture
def run_line(
    run_shell: Callable[[str, float], str],
    spawn_ranks: Callable[..., list[int]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], str]:
    """Runs one line of commands; gives back what it printed.

    ``taskmoe`` is called without a process of its own, since each of those imports torch for seconds. That it
    is a program, and that it starts ranks, is held by tests/train/test_cli.py and test_end_to_end.py, and by
    the slow test below.
    """
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        words = shlex.split(line)
        if words[0] != "taskmoe":
            return run_shell(line, 300)
        argv = words[1:] + (["--report_to", "none"] if words[1] == "train" else [])
        capsys.readouterr()
        if "--num_ranks" not in argv:
            assert main(argv) == 0
            return capsys.readouterr().out
        at = argv.index("--num_ranks")
        assert argv.pop(at + 1) == "2"
        del argv[at]
        assert spawn_ranks(on_a_rank, folder=str(tmp_path), argv=argv) == [0, 0]
        return ""

    return run


def test_commands_at_tiny_size(run_line: Callable[[str], str], tmp_path: Path) -> None:
    for source in (ROOT / "configs").rglob("*.*"):
        target = tmp_path / "configs" / source.relative_to(ROOT / "configs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name in ("quickstart.yaml", "skill_gym.yaml"):  # the second is the bed of configs/methods/
        path = tmp_path / "configs" / name
        config = shrink(yaml.safe_load(path.read_text(encoding="utf-8")))
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    lines = [
        line for block in shell_blocks() for line in block.splitlines() if not line.startswith("export ")
    ]
    check_what_the_commands_left([run_line(line) for line in lines], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_commands_in_full(run_shell: Callable[[str, float], str], tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    check_what_the_commands_left([run_shell(block, 3 * 3600) for block in shell_blocks()], tmp_path)
