"""Every launch of the table compiled for GPUs that need not be there, and looked at.

The name keeps pytest from collecting this file: test_low_rank_triton.py runs it in a process of its own, in
which Triton's interpreter is off.

Legend: R columns of a group, D the wide dimension.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taskmoe.kernels import configs, low_rank_triton
from taskmoe.kernels.configs import Launch

# Bytes of shared memory that a block can have, and, for the defaults, on the smallest GPU of all.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
LEAST_SHARED = 101376
DTYPES = {16: ("bf16", "fp16"), 32: ("fp32",), 64: ("fp64",)}
DOTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
WIDE = 4096  # wide enough that no launch is narrowed to it
TILES = (16, 64)  # rows of a tile, the least and the most that plan.tile_rows gives
MATRIX_UNITS = ("mma.sync", "wgmma", "tcgen05.mma")
WIDE_LOADS = (r"ld\.global\.(\w+\.)*v[248]\.", r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x(8|10)\b")
SWITCHES = ("SLOTS", "PAIRS", "ROW_GATES", "ADD")


@dataclass(frozen=True)
class Case:
    """One compilation. ``bank``: the dtype of the bank beside wide rows of ``dtype``; ``on``: which of
    SWITCHES."""

    arch: str
    kernel: str
    R: int
    dtype: str
    bank: str
    rows: int
    launch: Launch | None
    r: int
    on: tuple[str, ...] = ()

    @property
    def default(self) -> bool:
        if self.launch is None:
            return False
        bits = next(bits for bits, names in DTYPES.items() if self.dtype in names)
        return self.launch == configs.default(configs.key(self.kernel, self.R, WIDE, bits))

    @property
    def matrix_unit(self) -> bool:
        """Whether the products are work for one: fp32 in full precision is not. Triton leaves fp64 to
        scalar multiply-adds on Blackwell."""
        if self.dtype == "fp64":
            return self.arch != "sm_100"
        return self.dtype != "fp32"

    def __str__(self) -> str:
        shape = "" if self.launch is None else "x".join(str(n) for n in astuple(self.launch))
        switches = "".join(f"-{name}" for name in self.on)
        kinds = f"{self.dtype}-{self.bank}" if self.bank != self.dtype else self.dtype
        return f"{self.arch}-{self.kernel}-R{self.R}r{self.r}-{kinds}-tile{self.rows}-{shape}{switches}"


def table() -> Iterator[Case]:
    """Every line: what each architecture launches, and the default, which an unknown GPU takes."""
    for arch in configs.ARCHITECTURES:
        for key in list(configs.keys()):
            launches = {configs.default(key), configs.TABLE.get((arch, key), configs.default(key))}
            for launch in sorted(launches, key=str):
                for dtype in DTYPES[key.bits]:
                    for bank in dict.fromkeys((dtype, "fp32")) if key.bits == 16 else (dtype,):
                        for rows in TILES if key.kernel != "wgrad" else (64,):
                            r = key.rank // 2
                            yield Case(
                                arch, key.kernel, key.rank, dtype, bank, rows, launch, r, ("SLOTS", "ADD")
                            )


def variants() -> Iterator[Case]:
    """Each switch on and off, columns that do not fill a tile, and more than one tile of them."""
    settings = [(), *((name,) for name in SWITCHES), SWITCHES, ("PAIRS", "ROW_GATES")]
    for arch in configs.ARCHITECTURES:
        for kernel in configs.KERNELS:
            for dtype, bits in (("bf16", 16), ("fp32", 32)):
                shapes = [(9, 3), (32, 8), (64, 16), (128, 64), (192, 64)]
                for R, r, on in [(16, 4, on) for on in settings] + [(R, r, SWITCHES) for R, r in shapes]:
                    key = configs.key(kernel, R, WIDE, bits)
                    launch = configs.TABLE.get((arch, key), configs.default(key))
                    yield Case(arch, kernel, R, dtype, "fp32", 64, launch, r, on)


def small_kernels() -> Iterator[Case]:
    """The two kernels whose launches the table does not hold."""
    for arch in configs.ARCHITECTURES:
        for acc in ("fp32", "fp64"):
            for R, r in ((1, 1), (16, 8), (64, 64), (192, 64)):
                yield Case(arch, "gate_grad", R, acc, acc, 32, None, r)
                for on in ((), ("SLOTS",), ("BY_EXPERT",)):
                    yield Case(arch, "reduce", R, acc, "bf16" if acc == "fp32" else acc, 0, None, r, on)


def source(case: Case) -> tuple[ASTSource, dict[str, int]]:
    """What launch.py would have compiled: argument types, constants, and which are multiples of 16."""
    R, r, on = case.R, case.r, case.on
    acc = "fp64" if case.dtype == "fp64" else "fp32"
    bits = {"fp64": 64, "fp32": 32}.get(case.dtype, 16)
    columns = configs.expand_columns(R, bits) if case.kernel == "expand" else configs.rank_bucket(R)
    pointers = dict.fromkeys(("tiles_ptr", "chunks_ptr", "chunk_ptr", "pairs_ptr"), "i32") | {
        "wide_ptr": case.dtype, "y_ptr": case.dtype, "out_ptr": case.dtype, "bank_ptr": case.bank,
        "rank_ptr": acc, "drank_ptr": acc, "part_ptr": acc, "gates_ptr": "fp32", "slots_ptr": "i64",
    }  # fmt: skip
    constants: dict[str, Any] = {name: name in on for name in (*SWITCHES, "BY_EXPERT")} | {
        "r": r, "R": R, "k": R // r, "PER": 2 if "PAIRS" in on else 1, "SCALE": 0.5, "BM": case.rows,
        "PRECISION": "ieee", "DOT": DOTS[case.dtype],
        "ACC": tl.float64 if acc == "fp64" else tl.float32, "BR": columns,
    }  # fmt: skip
    options = {"num_warps": 4}
    if case.launch is not None:
        constants["BD"] = case.launch.width
        if case.kernel == "wgrad":
            constants["BM"] = case.launch.rows
        options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages}
    elif case.kernel == "gate_grad":
        constants["BR"] = min(128, triton.next_power_of_2(R))
    else:
        pointers["out_ptr"] = case.bank
        constants["BR"], constants["BD"] = configs.reduce_tile(r, WIDE)
        options = configs.REDUCE_OPTIONS
    for pointer, switch in (("slots_ptr", "SLOTS"), ("pairs_ptr", "PAIRS")):
        if not constants[switch]:
            constants[pointer] = None
    kernel = getattr(low_rank_triton, case.kernel)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name not in ("E", "groups"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    return ASTSource(kernel, signature, constants, attrs), options


@cache
def cuobjdump() -> Path:
    """The one that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def check(case: Case, folder: Path) -> None:
    ast, options = source(case)
    target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    compiled = triton.compile(ast, target=target, options=options)
    limit = LEAST_SHARED if case.default else SHARED[case.arch]
    assert compiled.metadata.shared <= limit, f"{compiled.metadata.shared} B of shared memory"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [str(cuobjdump()), "--dump-resource-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert stack == "0", f"registers spill: {usage}"
    ptx = compiled.asm["ptx"]
    products = case.kernel in configs.KERNELS
    if products and case.matrix_unit:
        assert any(unit in ptx for unit in MATRIX_UNITS), "no matrix unit is used"
    if products or case.kernel == "reduce":
        assert any(re.search(pattern, ptx) for pattern in WIDE_LOADS), "one number a load"
        if case.R % 4 == 0 or case.kernel != "shrink":  # else the rows of the result are not aligned
            assert re.search(r"st\.global\.(\w+\.)*v[248]\.", ptx), "one number a store"


def unique(cases: Iterator[Case]) -> list[Any]:
    """Lines that share a launch are compiled once."""
    return [pytest.param(case, id=str(case)) for case in dict.fromkeys(cases)]


@pytest.mark.slow
@pytest.mark.parametrize("case", unique(table()))
def test_every_line_of_the_table(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", unique(variants()))
def test_every_switch(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", unique(small_kernels()))
def test_reduce_and_gate_grad(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def one_each() -> Iterator[Case]:
    for kernel in configs.KERNELS:
        launch = configs.default(configs.key(kernel, 16, WIDE, 16))
        yield Case("sm_90", kernel, 16, "bf16", "fp32", 64, launch, 4, SWITCHES)
    yield Case("sm_90", "gate_grad", 16, "fp32", "fp32", 32, None, 4)
    yield Case("sm_90", "reduce", 16, "fp32", "bf16", 0, None, 4, ("SLOTS",))


@pytest.mark.parametrize("case", unique(one_each()))
def test_one_launch_of_each_kernel(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
