"""What the benchmark of the kernels computes: shapes, routings, operands, the fp64 truth, and the bytes that
must move.

Legend: M rows, K d_in, N d_out, D either, E experts, r rank of one expert, T tasks, k slots of a task or a
token, R = k*r columns that a row meets, C = E*r, S sequences.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("taskmoe") is None:
    # A plain checkout, nothing installed: the folders at the top are the packages, as in pyproject.toml.
    sys.modules["taskmoe"] = ModuleType("taskmoe")
    sys.modules["taskmoe"].__path__ = [str(ROOT)]

from taskmoe.kernels.plan import Plan  # noqa: E402

TASKS = 8
ROUTINGS = ("task equal", "task ragged", "token uniform", "token zipf")


@dataclass(frozen=True)
class Shape:
    """A batch and a bank. ``k`` None: every row meets every expert (soft gates)."""

    sequences: int
    length: int
    K: int
    N: int
    E: int
    r: int
    k: int | None
    routing: str

    @property
    def M(self) -> int:
        return self.sequences * self.length

    @property
    def R(self) -> int:
        return self.r * (self.k or self.E)

    @property
    def by_task(self) -> bool:
        return self.routing.startswith("task")

    def __str__(self) -> str:
        bank = f"E{self.E} r{self.r} {'soft' if self.k is None else f'k{self.k}'}"
        return f"{self.sequences}x{self.length} {self.K}x{self.N} {bank}, {self.routing}"


# The published table: E, r, k.
GPU_BANKS = [
    (8, 16, 2), (16, 8, 2), (8, 16, 1), (32, 1, None), (64, 64, 2), (64, 4, 4), (256, 1, None), (256, 1, 8),
]  # fmt: skip
GPU_BATCHES = [(16, 1024), (32, 2048), (8, 512)]
GPU_WIDTHS = [(4096, 4096), (1024, 1024), (8192, 8192), (1024, 4096), (4096, 14336)]
CPU_BANKS = [(8, 1, None), (8, 4, 2), (16, 8, 2), (8, 16, 1), (64, 4, 4), (4, 64, 1)]
CPU_BATCHES = [(16, 8), (16, 32), (16, 128), (4, 512), (32, 128)]
CPU_WIDTHS = [(64, 64), (256, 256), (1024, 1024)]


def gpu_shapes() -> list[Shape]:
    """Every combination; those that matter most first, near neighbours of the most common case."""
    lists = (GPU_BATCHES, GPU_WIDTHS, GPU_BANKS, ROUTINGS)
    ranked = sorted(product(*map(enumerate, lists)), key=lambda four: sum(rank for rank, _ in four))
    chosen = ([value for _, value in four] for four in ranked)
    return [Shape(*batch, *widths, *bank, routing) for batch, widths, bank, routing in chosen]


def cpu_shapes(routings: tuple[str, ...] = ROUTINGS[:2]) -> list[Shape]:
    """Small layers and batches, as in tests and on a laptop."""
    every = product(CPU_WIDTHS, CPU_BATCHES, CPU_BANKS, routings)
    shapes = [Shape(*batch, *widths, *bank, routing) for widths, batch, bank, routing in every]
    return [shape for shape in shapes if shape.M * shape.K <= 2**21]


@dataclass(frozen=True)
class Operands:
    """Tensors of one shape; x, A, B and gates want gradients.

    gates: float32 ``[T, k]`` or, token-level, ``[M, k]``; slots: int64 expert ids of that shape, on the
    device, or None. ``sequence_tasks`` and ``lengths``: of the S sequences, on the host.
    """

    shape: Shape
    x: Tensor
    y: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    gates: Tensor
    slots: Tensor | None
    scale: float
    dy: Tensor
    plan: Plan
    row_tasks: Tensor
    sequence_tasks: list[int]
    lengths: list[int]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.A, self.B, self.gates


def operands(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Operands:
    """The operands of a shape; ``y`` is the base layer's output, as peers that bring their base have it."""
    on_device = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)

    def normal(*size: int, over: int) -> Tensor:
        return (torch.randn(*size, generator=on_device, device=device) / math.sqrt(over)).to(dtype)

    tasks, lengths = _sequences(shape, host)
    T = min(TASKS, shape.sequences)
    if shape.by_task:
        rows = torch.repeat_interleave(torch.tensor(tasks), torch.tensor(lengths))
        plan, groups = Plan.from_rows(rows, T), T
    else:
        plan, groups = Plan(shape.M, (0, shape.M), (0,), 1), shape.M
    x, W = normal(shape.M, shape.K, over=1), normal(shape.N, shape.K, over=shape.K)
    A = normal(shape.E, shape.r, shape.K, over=shape.K)
    B = normal(shape.E, shape.r, shape.N, over=shape.R)
    slots = None if shape.k is None else _slots(shape, groups, host).to(device)
    gates = torch.rand(groups, shape.k or shape.E, generator=on_device, device=device) + 0.1
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    y, dy = x.detach() @ W.T, normal(shape.M, shape.N, over=shape.N)
    return Operands(
        shape, leaves[0], y, W, leaves[1], leaves[2], leaves[3], slots, 0.5, dy, plan,
        plan.row_tasks(device), tasks, lengths,
    )  # fmt: skip


def _sequences(shape: Shape, host: torch.Generator) -> tuple[list[int], list[int]]:
    """Task and length of each sequence, sorted by task: equal shares and lengths, or Zipf and lognormal."""
    S, T = shape.sequences, min(TASKS, shape.sequences)
    if shape.routing != "task ragged":
        return [s * T // S for s in range(S)], [shape.length] * S
    tasks = torch.multinomial(1 / torch.arange(1.0, T + 1), S, replacement=True, generator=host).sort().values
    weights = torch.randn(S, generator=host).mul(0.8).exp()
    ends = (weights.cumsum(0) / weights.sum() * (shape.M - S)).round().int().tolist()
    lengths = [b - a + 1 for a, b in zip([0, *ends], ends, strict=False)]
    return tasks.tolist(), lengths


def _slots(shape: Shape, groups: int, host: torch.Generator) -> Tensor:
    """k different experts for each task or token; ``token zipf``: some experts far more often."""
    assert shape.k is not None
    scores = -torch.rand(groups, shape.E, generator=host).clamp_min(1e-9).log().log()
    if shape.routing == "token zipf":
        scores -= torch.arange(1.0, shape.E + 1).log()
    return scores.topk(shape.k, dim=1).indices


TENSORS = ("out", "dx", "dA", "dB", "dgates")


class Truth:
    """The product and its gradients in fp64, by the formulas, over a few rows at a time."""

    def __init__(self, o: Operands) -> None:
        self.o = o
        self.A, self.B = (bank.detach().double().flatten(0, 1) for bank in (o.A, o.B))
        self.dA, self.dB = torch.zeros_like(self.A), torch.zeros_like(self.B)
        self.dgates = torch.zeros_like(o.gates, dtype=torch.float64)
        for _ in self.blocks(add_weights=True):
            pass

    def blocks(self, *, add_weights: bool = False) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first row, row after the last, out, dx) of each block."""
        o, shape = self.o, self.o.shape
        size = max(1, 2**27 // (8 * max(shape.K, shape.N, shape.E * shape.r)))
        for start in range(0, shape.M, size):
            end = min(start + size, shape.M)
            rows = torch.arange(start, end, device=o.x.device)
            groups = o.row_tasks[start:end] if shape.by_task else rows
            gates_mk = o.gates.detach().double()[groups]
            slots_mk = None if o.slots is None else o.slots[groups]
            g_mE = gates_mk
            if slots_mk is not None:
                g_mE = gates_mk.new_zeros(end - start, shape.E).scatter(1, slots_mk, gates_mk)
            g_mC = g_mE.repeat_interleave(shape.r, dim=1) * o.scale
            x, y, dy = (t.detach()[start:end].double() for t in (o.x, o.y, o.dy))
            s, dh = x @ self.A.T, dy @ self.B.T
            yield start, end, y + (s * g_mC) @ self.B, (dh * g_mC) @ self.A
            if add_weights:
                self.dA += (dh * g_mC).T @ x
                self.dB += (s * g_mC).T @ dy
                d_mE = (s * dh).unflatten(1, (shape.E, -1)).sum(-1) * o.scale
                self.dgates.index_add_(0, groups, d_mE if slots_mk is None else d_mE.gather(1, slots_mk))

    def errors(self, found: dict[str, Tensor], blocks: int | None = None) -> dict[str, float]:
        """``|found - truth| / |truth|`` of each tensor that is there (Frobenius norms); NaN counts as inf.

        blocks: how many blocks of rows of ``out`` and ``dx`` are looked at; None: all.
        """
        squares = {name: [0.0, 0.0] for name in found}
        wide = {"dA": self.dA, "dB": self.dB, "dgates": self.dgates}
        for name in found.keys() & wide.keys():
            _add(squares[name], found[name], wide[name].view_as(found[name]))
        for start, end, out, dx in islice(self.blocks(), blocks):
            for name, truth in (("out", out), ("dx", dx)):
                if name in found:
                    _add(squares[name], found[name][start:end], truth)
        errors = {name: math.sqrt(a / max(b, 1e-300)) for name, (a, b) in squares.items()}
        return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def _add(squares: list[float], found: Tensor, truth: Tensor) -> None:
    squares[0] += float((found.detach().double() - truth).square().sum())
    squares[1] += float(truth.square().sum())


def least_bytes(shape: Shape, element: int, direction: str) -> int:
    """Bytes that the product must move: each wide tensor once per pass that cannot be fused away.

    Rank-space rows are fp32. forward: read x; read y and write the sum. backward: read dy for ds and dB (in
    one pass up to R = 16, where the partial sums fit in registers; in two beyond), read x for dA, write dx.
    """
    M, K, N, rank = shape.M, shape.K, shape.N, 4 * shape.M * shape.R
    banks = element * shape.E * shape.r * (K + N)
    forward = element * M * (K + 2 * N) + 2 * rank + banks
    backward = element * M * ((1 if shape.R <= 16 else 2) * N + 2 * K) + 3 * rank + 2 * banks
    return {"forward": forward, "forward+backward": forward + backward}[direction]


def kernel_bytes(shape: Shape, element: int, D: int) -> int:
    """Bytes of one kernel: shrink and wgrad read ``[M, D]``, expand writes it; rank rows and bank beside."""
    return element * shape.M * D + 4 * shape.M * shape.R + element * shape.E * shape.r * D

