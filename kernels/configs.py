"""How the Triton kernels are launched: a table by architecture, kernel, rank bucket, width and dtype.

No search at run time: the first step of a training is as fast as the last, and the same program runs
everywhere. An unknown GPU takes the defaults. ``taskmoe tune`` measures the alternatives on the GPU at hand
and writes a JSON file of overrides, which is read at the first launch.

Legend: D wide dimension, R columns of a group.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KERNELS = ("shrink", "expand", "wgrad")
RANKS = (16, 32, 64, 128)  # columns of a tile; more columns than the largest take several tiles
WIDTHS = ("narrow", "wide")  # D up to 2048, and beyond
BITS = (16, 32, 64)  # of the wide tensor's dtype
# Of reduce. Left to itself ptxas hides a register or two of its few on the stack, for occupancy that it has.
REDUCE_OPTIONS = {"num_warps": 4, "maxnreg": 128}
MIN_TILE = 16  # the least side of a tensor core's product


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel: columns of the wide tensor a tile, rows a step (wgrad), warps, stages."""

    width: int
    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Key:
    """A line of the table: kernel, rank bucket (columns of a tile), width bucket, bits of the dtype."""

    kernel: str
    rank: int
    width: str
    bits: int

    def __str__(self) -> str:
        return f"{self.kernel}/{self.rank}/{self.width}/{self.bits}"


def rank_bucket(R: int) -> int:
    """Columns of a tile for R columns of a group."""
    return next((rank for rank in RANKS if rank >= R), RANKS[-1])


def key(kernel: str, R: int, D: int, bits: int) -> Key:
    """The line of the table for a launch."""
    return Key(kernel, rank_bucket(R), WIDTHS[D > 2048], bits)


def keys() -> Iterator[Key]:
    """Every line of the table."""
    for kernel in KERNELS:
        for rank in RANKS:
            for width in WIDTHS:
                yield from (Key(kernel, rank, width, bits) for bits in BITS)


def expand_columns(R: int, bits: int) -> int:
    """Rank columns that expand multiplies at a time.

    A thread keeps its rows' columns in registers: no more than those hold beside the sums. Without a matrix
    unit (fp32 in full precision; fp64 on some GPUs) that is the least that a product takes.
    """
    return min(rank_bucket(R), 32) if bits == 16 else MIN_TILE


def reduce_tile(r: int, D: int) -> tuple[int, int]:
    """Rank rows and wide columns of a program of reduce: all rows of an expert, 4096 sums in registers."""
    rows = 1 << (r - 1).bit_length()
    return rows, max(MIN_TILE, min(512, 4096 // rows, 1 << (D - 1).bit_length()))


def default(key: Key) -> Launch:
    """What an unknown GPU uses: no spilled registers, and at most the 99 KB of shared memory that a block has
    on the smallest GPU of sm_80 and newer, with banks of fp32."""
    large = key.rank >= 64
    if key.kernel == "shrink":
        # Two operands a stage, BM x width and width x rank: fewer stages where they are large.
        return {
            16: Launch(128, 0, 4, {16: 4, 32: 3, 64: 2}[key.rank]) if key.rank < 128 else Launch(64, 0, 4, 2),
            32: Launch(32, 0, 4, 3) if key.rank == 16 else Launch(64 if key.rank < 128 else 32, 0, 8, 2),
            64: Launch(16, 0, 8 if large else 4, 2),
        }[key.bits]
    if key.kernel == "expand":
        # One product, no loop to hide latency in: wide tiles and many warps.
        return {
            16: Launch(128 if large else 256, 0, 8, 1),
            32: Launch(64, 0, 8, 1),
            64: Launch(32, 0, 8, 1),
        }[key.bits]
    return {  # wgrad
        16: Launch(128, 64 if key.rank < 128 else 32, 8 if large else 4, 3),
        32: Launch(64 if key.rank < 128 else 32, 32, 8 if key.rank == 64 else 4, 2),
        64: Launch(16, 16, 8 if large else 4, 2),
    }[key.bits]


# (architecture, key) -> Launch where the default is not the best known: a data centre's Hopper and Blackwell
# have 227 KB of shared memory, for one block with four stages at rank 64, or for two with three at rank 128.
TABLE: dict[tuple[str, Key], Launch] = {
    (arch, Key("shrink", rank, width, 16)): Launch(128, 0, 4, 4) if rank == 64 else Launch(64, 0, 4, 3)
    for arch in ("sm_90", "sm_100")
    for rank in (64, 128)
    for width in WIDTHS
}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def launch(arch: str, gpu: str, kernel: str, R: int, D: int, bits: int) -> Launch:
    """The launch of a kernel on a GPU.

    Args:
        arch: ``sm_90``; gpu: its name as torch gives it, for the overrides.
        R, D: columns of a group, the wide dimension; bits: of the wide tensor's dtype.
    """
    line = key(kernel, R, D, bits)
    found = overrides().get((gpu, str(line))) or TABLE.get((arch, line)) or default(line)
    fitting = max(MIN_TILE, 1 << (D - 1).bit_length())  # no wider than D
    return found if found.width <= fitting else Launch(fitting, found.rows, found.num_warps, found.num_stages)


def override_file() -> Path:
    """``TASKMOE_KERNEL_CONFIGS``, or kernels.json in the user's cache folder."""
    named = os.environ.get("TASKMOE_KERNEL_CONFIGS")
    if named:
        return Path(named)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "taskmoe" / "kernels.json"


@cache
def overrides() -> dict[tuple[str, str], Launch]:
    """{(gpu, line): launch} of the override file; a file that cannot be used is left out, with a warning."""
    path = override_file()
    try:
        return read_overrides(path) if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path}: not a file of kernel configurations ({error}); using the defaults", stacklevel=2
        )
        return {}


def read_overrides(path: Path) -> dict[tuple[str, str], Launch]:
    """Read ``{gpu: {line: [width, rows, num_warps, num_stages]}}``.

    Raises:
        ValueError: a line that the table does not have, or a launch that no kernel takes.
    """
    known = {str(k) for k in keys()}
    found: dict[tuple[str, str], Launch] = {}
    for gpu, lines in json.loads(path.read_text(encoding="utf-8")).items():
        for line, values in lines.items():
            if line not in known:
                raise ValueError(f"{line!r} is no line of the table")
            launch = Launch(*values)
            tiles = [launch.width, launch.rows] if line.startswith("wgrad") else [launch.width]
            whole = [*tiles, launch.num_warps, launch.num_stages]
            if (
                not all(isinstance(v, int) and v >= 1 for v in whole)
                or any(v & (v - 1) for v in [*tiles, launch.num_warps])
                or min(tiles) < MIN_TILE
            ):
                raise ValueError(
                    f"{line}: {values}; width (and rows, of wgrad) are powers of two from {MIN_TILE} on, "
                    "warps a power of two, stages at least 1"
                )
            found[gpu, line] = launch
    return found
