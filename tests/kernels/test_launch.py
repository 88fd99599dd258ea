from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Each setting in a process of its own: torch keeps how TF32 was asked for, and refuses a mix of its old and
# new settings. They are forked from one that has imported it.
PROGRAM = """
import os, sys, torch
from taskmoe.kernels.launch import _precision

def holds(setting, expected):
    x = torch.ones(1)
    assert _precision(x) == "ieee", "Triton's own default is TF32"
    exec(setting)
    assert _precision(x) == expected, (setting, _precision(x))
    assert _precision(x.half()) == _precision(x.double()) == "ieee"
    print(setting, flush=True)

for setting, expected in {settings!r}.items():
    child = os.fork()
    if not child:
        holds(setting, expected)
        os._exit(0)
    os.waitpid(child, 0)
"""
SETTINGS = {
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "pass": "ieee",
}


def test_fp32_is_exact_unless_torch_is_told_otherwise() -> None:
    program = PROGRAM.format(settings=SETTINGS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == list(SETTINGS), done.stderr
