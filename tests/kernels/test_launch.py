from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: torch keeps how TF32 was asked for, and refuses a mix of its old and new settings.
PROGRAM = """
import torch
from taskmoe.kernels.launch import _precision
x = torch.ones(1)
assert _precision(x) == "ieee", "Triton's own default is TF32"
{setting}
assert _precision(x) == {expected!r}, _precision(x)
assert _precision(x.half()) == _precision(x.double()) == "ieee"
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'ieee'", "ieee"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("", "ieee"),
    ],
)
def test_fp32_is_exact_unless_torch_is_told_otherwise(setting: str, expected: str) -> None:
    program = PROGRAM.format(setting=setting, expected=expected)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
