"""The Triton kernels in Triton's interpreter, on the CPU, against the fp64 reference.

The name keeps pytest from collecting this file: test_low_rank_triton.py runs it in a process of its own,
since TRITON_INTERPRET=1 has to be set before Triton is imported. bfloat16 is left out: the interpreter
computes it wrongly, without a word.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots, G 1 or T.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from taskmoe.kernels import configs, ops, reference, split, token_level
from taskmoe.kernels.low_rank import average, low_rank, low_rank_averaged
from taskmoe.kernels.plan import Plan, chunk_rows

T = 4  # task 3 never has rows
ROWS = {
    "empty": [],
    "one": [1],
    "ragged": [2] + [0] * 17 + [1] * 5,
    "several": [2, 2, 0, 2, 1, 1, 0],
    "long": [1] * 130 + [0] * 3,  # two chunks of the least size
}
DTYPES = {  # of the rows and of the banks
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5}


@dataclass(frozen=True)
class Case:
    op: str
    r: int
    k: int
    rows: str
    widths: tuple[int, int]
    per_task: bool  # G = T
    y: bool
    dtype: str

    def __str__(self) -> str:
        K, N = self.widths
        marks = ("-per_task" if self.per_task else "") + ("-y" if self.y else "")
        return f"{self.op}-r{self.r}-k{self.k}-{self.rows}-{K}x{N}-{self.dtype}{marks}"


FACTORS: dict[str, list[Any]] = {
    "op": ["soft", "slots", "split", "gated", "grouped", "core", "averaged"],
    "r": [1, 2, 3, 4, 8, 16, 33, 64],
    "k": [1, 2, 3, 4],
    "rows": list(ROWS),
    "widths": [(7, 9), (33, 17), (64, 130)],
    "per_task": [False, True],
    "y": [False, True],
    "dtype": list(DTYPES),
}


FEWER = {**FACTORS, "r": [1, 3, 8, 33, 64]}  # one, odd, a power of two, two tiles, the most


def meaningful(values: dict[str, Any]) -> bool:
    """Averaged parameters are one expert a task: they have no task axis beside."""
    return not (values.get("op") == "averaged" and values.get("per_task"))


def combinations(strength: int, factors: dict[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of values of ``strength`` factors that can occur."""
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[name] for name in names)):
            if meaningful(dict(zip(names, values, strict=True))):
                yield tuple(zip(names, values, strict=True))


def covered_by(case: Case, strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    named = [(f.name, value) for f, value in zip(fields(case), astuple(case), strict=True)]
    return itertools.combinations(named, strength)


def cover(strength: int, factors: dict[str, list[Any]], seed: int = 0) -> list[Case]:
    """Cases that hold every combination of values of any ``strength`` factors: greedily, of 30 random cases
    with a combination that is missing the one that adds most."""
    rng = random.Random(seed)
    missing = dict.fromkeys(combinations(strength, factors))  # a dict: its order does not change between runs
    cases = []
    while missing:
        wanted = dict(next(iter(missing)))
        best: tuple[int, Case | None] = (0, None)
        for _ in range(30):
            values = {name: wanted.get(name, rng.choice(choices)) for name, choices in factors.items()}
            if not meaningful(values):
                continue
            case = Case(**values)
            gain = sum(combination in missing for combination in covered_by(case, strength))
            best = max(best, (gain, case), key=lambda pair: pair[0])
        if best[1] is None:
            continue
        cases.append(best[1])
        for combination in covered_by(best[1], strength):
            missing.pop(combination, None)
    return cases


PAIRS = cover(2, FEWER, seed=1)
TRIPLES = [case for case in cover(3, FACTORS) if case not in PAIRS]


def test_the_cases_cover_every_pair() -> None:
    held = {combination for case in PAIRS for combination in covered_by(case, 2)}
    assert not set(combinations(2, FEWER)) - held
    several_tiles_and_chunks = [c for c in PAIRS if c.r * c.k > max(configs.RANKS) and c.rows == "long"]
    assert several_tiles_and_chunks and ROWS["long"].count(1) > chunk_rows(len(ROWS["long"]))
    # No cover can have fewer cases than the two largest factors have pairs.
    assert len(PAIRS) <= 1.25 * len(FEWER["op"]) * len(FEWER["r"])


def leaves(case: Case) -> dict[str, Tensor]:
    """The operands that get a gradient, in the case's dtypes."""
    g = torch.Generator().manual_seed(0)
    wide, narrow = DTYPES[case.dtype]
    M, (K, N), r, k = len(ROWS[case.rows]), case.widths, case.r, case.k
    E = k + 2 if case.op in ("slots", "split", "grouped") else k
    shapes: dict[str, tuple[int, ...]] = {"x": (M, K)}
    if case.y:
        shapes["y"] = (M, N)
    if case.op == "core":
        shapes |= {"A": (r, K), "B": (k * r, N), "core": (T, k * r, r)}
    elif case.op == "averaged":
        shapes |= {"A": (E, r, K), "B": (E, r, N), "weights_A": (T, 1, E), "weights_B": (T, 1, E)}
    else:
        shapes |= {"A": (E, r, K), "B": (E, r, N), "gates": (M if case.op in ("gated", "grouped") else T, k)}
    if case.op == "split":
        shapes |= {f"A{i}": (E, r, K) for i in range(1, min(k, 3))}
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(wide if name in "xy" else narrow)
        for name, shape in shapes.items()
    }


def slots(case: Case, rows: int, seed: int) -> Tensor:
    """Expert ids ``[rows, k]``: the first row names one expert in every slot, nobody names the last."""
    ids = torch.randint(case.k + 1, (rows, case.k), generator=torch.Generator().manual_seed(seed))
    ids[:1] = 1
    return ids


def forward(case: Case, at: dict[str, Tensor], core: Callable[..., Tensor] = split.low_rank_core) -> Tensor:
    plan = Plan.from_rows(ROWS[case.rows], T)
    x, y = at["x"], at.get("y")
    if case.op == "averaged":
        A, B = average(at["A"], at["weights_A"]), average(at["B"], at["weights_B"])
        return low_rank_averaged(x, y, A, B, 0.5, plan)
    A, B = at["A_g"], at["B_g"]
    if case.op == "core":
        return core(x, y, A, B, at["core"], 0.5, plan)
    if case.op == "soft":
        return low_rank(x, y, A, B, at["gates"], None, 0.5, plan)
    if case.op == "slots":
        return low_rank(x, y, A, B, at["gates"], slots(case, T, 0), 0.5, plan)
    if case.op == "gated":
        return token_level.gated_low_rank(x, y, A, B, at["gates"], 0.5, plan)
    if case.op == "grouped":
        return token_level.grouped_low_rank(x, y, A, B, at["gates"], slots(case, plan.rows, 0), 0.5, plan)
    banks = [A, *(t.expand(len(A), *t.shape) for name, t in at.items() if name in ("A1", "A2"))]
    ids = [slots(case, T, i) for i in range(len(banks))]
    parts = split.shrink(x, banks, ids, plan)
    outs = [
        split.expand(s, y, B, at["gates"], i, 0.5, plan, x.dtype) for s, i in zip(parts, ids, strict=True)
    ]
    return torch.stack(outs)


def results(
    case: Case, mode: str, dtype: torch.dtype | None = None, magnitudes: bool = False
) -> dict[str, Tensor]:
    """Output and gradients with the implementation ``mode``; those of the banks also with their task axis.

    dtype: operands are cast to it. magnitudes: of the operands' magnitudes, so that nothing cancels in the
    sums.
    """
    at = {name: t.to(dtype or t.dtype) for name, t in leaves(case).items()}
    at = {name: (t.abs() if magnitudes else t).requires_grad_() for name, t in at.items()}
    if case.op != "averaged":
        G = T if case.per_task else 1
        at |= {f"{name}_g": at[name].expand(G, *at[name].shape) for name in ("A", "B")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKMOE_KERNELS", mode)
        assert ops.use_triton(at["x"]) == (mode == "triton")
        if dtype == torch.float16:  # the reference would compute in fp32
            patch.setattr(torch, "promote_types", lambda narrow, _: narrow)
        out = forward(case, at, reference.low_rank_core if mode == "reference" else split.low_rank_core)
        if not out.requires_grad:  # the reference makes nothing of no rows
            assert not out.numel() and mode == "reference"
            return {"out": out} | {name: torch.zeros_like(t) for name, t in at.items()}
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, list(at.values()), upstream.abs() if magnitudes else upstream)
    return {"out": out.detach()} | dict(zip(at, grads, strict=True))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a kernel should have written and did not shows in the result."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fresh(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert torch.ones(1).new_empty(2).isnan().all() and torch.empty(2).isnan().all()


def error(found: Tensor, truth: Tensor, of: Tensor) -> float:
    """The largest difference as a part of ``of``, a tensor or one number."""
    if not truth.numel():
        return 0.0
    return float(((found.double() - truth).abs() / of.abs().clamp(min=1e-30)).max())


def check(case: Case) -> None:
    found, truth = results(case, "triton"), results(case, "reference", torch.float64)
    wide, narrow = DTYPES[case.dtype]
    half = wide == torch.float16
    # The yardstick of fp16: the reference's formula and its gradients as torch computes them in fp16. Each
    # error is a part of what its sum would be if nothing cancelled: else it tells of the sum alone.
    plain = results(case, "reference", torch.float16) if half else {}
    sums = results(case, "reference", torch.float64, magnitudes=True) if half else {}
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == (wide if name in ("x", "y", "out") else narrow), name
        assert found[name].isfinite().all(), name
        if half:
            wrong = error(found[name], value, sums[name])
            limit = 2 * error(plain[name], value, sums[name]) + torch.finfo(torch.float16).eps
        else:
            most = value.abs().amax().clamp(min=1.0) if value.numel() else value
            wrong, limit = error(found[name], value, most), TOLERANCE[case.dtype]
        assert wrong <= limit, f"{name}: {wrong} > {limit}"
    if case.op in ("slots", "split", "grouped"):
        for bank in ("A_g", "B_g"):
            assert not found[bank][:, -1].any(), f"{bank}: nobody uses the last expert"
    if case.per_task:
        for bank in ("A_g", "B_g"):
            assert not found[bank][3].any(), f"{bank}: task 3 has no rows"
    if "gates" in found and case.op not in ("gated", "grouped"):
        assert not found["gates"][3].any(), "task 3 has no rows"


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_every_pair(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRIPLES, ids=str)
def test_every_triple(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("op", ["slots", "split", "grouped"])
def test_the_same_bits_again(op: str) -> None:
    case = Case(op, 3, 2, "several", (7, 9), True, True, "fp32")
    first, again = results(case, "triton"), results(case, "triton")
    for name, value in first.items():
        assert torch.equal(again[name], value), name


def test_rows_and_gradients_of_any_strides() -> None:
    case = Case("slots", 3, 2, "ragged", (33, 17), False, True, "fp64")
    outcomes = []
    for strided in (False, True):
        at = leaves(case)
        if strided:
            at["x"] = torch.cat([at["x"], at["x"]], dim=1)[:, : at["x"].shape[1]]
            at["y"] = at["y"].t().contiguous().t()
            at["A"] = at["A"].transpose(0, 2).contiguous().transpose(0, 2)
        at = {name: t.requires_grad_() for name, t in at.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TASKMOE_KERNELS", "triton")
            spread = {f"{name}_g": at[name][None] for name in ("A", "B")}
            out = forward(case, at | spread)
            outcomes.append([out, *torch.autograd.grad(out.sum(), list(at.values()))])
    assert outcomes[0][0].isfinite().all()
    for plain, other in zip(*outcomes, strict=True):
        assert torch.equal(plain, other)


def test_results_have_the_shapes_dtypes_and_strides_of_the_fakes(
    op_arguments: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKMOE_KERNELS", "triton")

    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(v) for v in value]
        return value.to("meta") if torch.is_tensor(value) else value

    seen = set()
    for name, args in op_arguments():
        seen.add(name)
        op = getattr(torch.ops.taskmoe, name).default
        found, fakes = op(*args), op(*map(meta, args))
        for real, fake in zip(*((r,) if torch.is_tensor(r) else r for r in (found, fakes)), strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride()), name
    assert seen == set(ops.OPS)
