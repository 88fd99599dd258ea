"""Hugging Face owns the import name ``kernels``; the folder of that name here must never answer to it.

transformers imports ``kernels`` when that package is installed, from whatever comes first on ``sys.path``:
with ``python -m`` and ``deepspeed --module`` that is the working directory; a ``kernels/__init__.py`` there
breaks every model. A folder without ``__init__.py`` is only a namespace candidate: an installed package wins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_kernels_has_no_init() -> None:
    found = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels").rglob("__init__.py*"))
    assert not found, f"{found} would shadow Hugging Face's package `kernels`; remove it"


def test_an_installed_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    spec = PathFinder.find_spec("kernels", [str(ROOT), str(tmp_path)])
    assert spec is not None and spec.origin == str(tmp_path / "kernels" / "__init__.py")


def test_transformers_does_not_see_the_folder() -> None:
    code = (
        "import sys, transformers.activations\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import taskmoe.kernels, taskmoe.moe, taskmoe.train\n"
        "module = sys.modules.get('kernels')\n"
        "print(getattr(module, '__file__', None), is_kernels_available())\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}  # as DeepSpeed sets it for other nodes
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    file, available = run.stdout.split()[-2:]
    assert not file.startswith(str(ROOT)) and (available == "False" or file != "None")
