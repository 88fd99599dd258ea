"""The Triton kernels without a GPU: in Triton's interpreter (interpreted.py), and compiled (compiled.py).

Each of the two needs a process of its own: TRITON_INTERPRET is read when Triton is imported, and what is
interpreted cannot be compiled. Triton 3.6, the oldest that works, lies in a folder that the Makefile fills.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDEST = Path(os.environ.get("TASKMOE_OLDEST_TRITON", Path(sys.prefix) / "triton36"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is for Linux on x86_64 and not installed here"
)
needs_oldest = pytest.mark.skipif(
    not (OLDEST / "triton").is_dir(), reason=f"no Triton 3.6 in {OLDEST}; `make test-all` puts it there"
)


def run(file: str, cache: Path, which: str, timeout_s: int, triton: Path | None = None) -> None:
    """Run the tests of ``file`` in a process of its own, with the Triton in a folder or the installed one."""
    interpret = file == "interpreted.py"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))},
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TASKMOE_KERNELS": "triton" if interpret else "auto",
        "TASKMOE_KERNEL_CONFIGS": str(cache / "none.json"),
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
        **({"PYTHONPATH": str(triton)} if triton else {}),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", which]
    done = subprocess.run(
        [*command, "--timeout", str(timeout_s), str(HERE / file)],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-4000:]}"
    # An empty selection must not pass for a good one.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 5 and " skipped" not in done.stdout, done.stdout[-2000:]


def test_interpreted(tmp_path: Path) -> None:
    run("interpreted.py", tmp_path, "not slow", 600)


def test_compiled(tmp_path: Path) -> None:
    run("compiled.py", tmp_path, "not slow", 300)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("file", ["interpreted.py", "compiled.py"])
def test_the_whole_grid(file: str, tmp_path: Path) -> None:
    run(file, tmp_path, "slow", 3000)


@needs_oldest
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("file", ["interpreted.py", "compiled.py"])
def test_with_the_oldest_triton(file: str, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__, triton.__file__)"],
        env={**os.environ, "PYTHONPATH": str(OLDEST)}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    version, place = found.stdout.split(maxsplit=1)
    assert version.startswith("3.6.") and Path(place.strip()).is_relative_to(OLDEST)
    run(file, tmp_path, "not slow" if file == "interpreted.py" else "slow or not slow", 3000, OLDEST)
