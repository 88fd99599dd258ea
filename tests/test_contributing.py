"""CONTRIBUTING's worked example, done in a copy of the project: a file, a line, a configuration, a row."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "moe", "train", "configs", "docs", "tests")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of the worked example, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A worked example", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def insert(path: Path, before: str, text: str) -> None:
    """Put ``text`` in front of the one place where ``before`` stands."""
    old = path.read_text(encoding="utf-8")
    assert old.count(before) == 1, (path, before)
    path.write_text(old.replace(before, text + before), encoding="utf-8")


def test_the_worked_example_holds_what_every_method_holds(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (_, source), (_, imported), (_, line), (_, yaml), (_, row) = blocks()
    (copy / "moe/routers/keys.py").write_text(source, encoding="utf-8")
    insert(copy / "moe/routers/kinds.py", "from taskmoe.moe.routers.mlp import", imported)
    insert(copy / "moe/routers/kinds.py", '    "none": NoRouter,\n', line)
    (copy / "configs/methods/keys.yaml").write_text(yaml, encoding="utf-8")
    insert(copy / "docs/METHODS.md", "| `task_softmax` |", row)
    # The tree of links that mypy reads is the package taskmoe of the copy; it precedes the installed one.
    env = {**os.environ, "PYTHONPATH": str(copy / "tests/typing")}
    where = "import taskmoe.moe.routers.keys as found; print(found.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=copy, env=env, capture_output=True, text=True)
    assert str(copy) in done.stdout, done.stderr
    files = ["methods/test_every_method.py", "test_configs.py", "train/test_config_schema.py"]
    tests = [f"tests/{file}" for file in files]
    wanted = "keys or row_without_blanks or schema"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, *tests]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 12, done.stdout[-400:]
