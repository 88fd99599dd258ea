from __future__ import annotations

from typing import Any

import pytest
import torch

from taskmoe.kernels import little, low_rank_cpu, reference
from taskmoe.kernels.low_rank import low_rank
from taskmoe.kernels.ways import Dense, Equal, Segments, choose

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=[Dense, Segments, Equal, little.dense, little.batched], ids=lambda way: way.__name__)
def way(request, monkeypatch) -> Any:
    """Each way through the CPU path, whatever the shape would choose; Equal where all segments are of one
    length, plain autograd where it can be gone."""
    wanted, choose_plain = request.param, little.choose

    def forced(sizes, *_):
        if wanted is Equal and len(set(sizes)) != 1:
            return Segments
        return wanted if isinstance(wanted, type) else choose(sizes, *_)

    def plain(x_MK, A_GErK, B_GErN, slots_Tk, plan):
        if isinstance(wanted, type):
            return None
        # Whether any of them may be used is asked of the real one, with a bank too small to prefer the ops.
        allowed = choose_plain(x_MK, A_GErK[..., :1], B_GErN[..., :1], slots_Tk, plan) is not None
        return wanted if allowed and (slots_Tk is not None or wanted is little.dense) else None

    monkeypatch.setattr(low_rank_cpu, "choose", forced)
    monkeypatch.setattr(little, "choose", plain)
    return request.param


def assert_same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].dtype == value.dtype, name
        largest = max(float(value.abs().max()) if value.numel() else 0.0, 1.0)
        error = float((found[name] - value).abs().max()) if value.numel() else 0.0
        assert error <= tolerance * largest, f"{name}: {error}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_forward_and_gradients_are_the_reference(make_case, run_op, way, dtype, G, r, k) -> None:
    case = make_case(dtype=dtype, G=G, r=r, k=k)
    assert_same(run_op(low_rank, case), run_op(reference.low_rank, case), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "shape",
    [
        {"task_of_row": [1]},
        {"task_of_row": [2] * 6},
        {"task_of_row": [3, 1, 3, 0, 3], "K": 1, "N": 1},
        {"task_of_row": [0, 1, 2, 3] * 5, "K": 33, "N": 17, "experts": 11},
        {"task_of_row": [0] * 4, "num_tasks": 1, "experts": 1},
        {"task_of_row": [2, 2, 0, 0, 1, 1, 2, 2], "r": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [None, 2])
def test_odd_shapes(make_case, run_op, way, shape, k) -> None:
    for G in {1, shape.get("num_tasks", 4)}:
        case = make_case(**shape, k=k, G=G)
        assert_same(run_op(low_rank, case), run_op(reference.low_rank, case), 1e-12)


def test_no_rows_give_no_rows_and_zero_gradients(make_case, run_op, way) -> None:
    for k in (None, 2):
        found = run_op(low_rank, make_case(task_of_row=[], k=k, G=4))
        assert found["out"].shape == (0, 9) and found["x"].shape == (0, 7)
        assert all(found[name].count_nonzero() == 0 for name in ("A_g", "B_g", "gates"))


def test_without_y_the_product_alone(make_case, run_op, way) -> None:
    for k in (None, 2):
        case = make_case(with_y=False, k=k)
        assert_same(run_op(low_rank, case), run_op(reference.low_rank, case), 1e-12)


@pytest.mark.parametrize("G", [1, 4])
def test_an_expert_in_two_slots_counts_twice(make_case, run_op, way, G) -> None:
    case = make_case(slots=[[1, 1, 3], [3, 1, 3], [1, 1, 1], [0, 0, 0]], G=G)
    found = run_op(low_rank, case)
    assert_same(found, run_op(reference.low_rank, case), 1e-12)
    # Task 3 has no rows, so nobody uses experts 0, 2 and 4: zeros, and not merely small.
    for bank in ("A_g", "B_g"):
        assert found[bank][:, [0, 2, 4]].count_nonzero() == 0
    assert found["gates"][3].count_nonzero() == 0
    assert found["gates"][:3].count_nonzero() == 9


def test_gradients_of_tasks_add_up_and_each_is_that_of_its_rows(make_case, run_op, way) -> None:
    for k in (None, 2):
        case = make_case(k=k)
        together, apart = run_op(low_rank, case), run_op(low_rank, case.with_task_axis(4))
        rows = case.plan.row_tasks()
        for bank in ("A", "B"):
            torch.testing.assert_close(apart[f"{bank}_g"].sum(0), together[bank], rtol=1e-12, atol=1e-12)
        for t in range(4):
            upstream = torch.linspace(-1, 1, rows.numel() * 9, dtype=torch.float64).view(-1, 9)
            alone = run_op(low_rank, case, upstream * (rows == t)[:, None])
            for bank in ("A", "B"):
                torch.testing.assert_close(apart[f"{bank}_g"][t], alone[bank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [None, 2])
def test_low_precision_rows_with_fp32_banks(make_case, run_op, way, dtype, k) -> None:
    case = make_case(dtype=dtype, bank_dtype=torch.float32, k=k, K=32, N=24, G=4)
    found, truth = run_op(low_rank, case), run_op(reference.low_rank, case)
    assert found["out"].dtype == found["x"].dtype == dtype
    assert found["A"].dtype == found["B_g"].dtype == found["gates"].dtype == torch.float32
    # A rounding of x, of the bank, of s and of the result, against a truth that rounds the result only.
    assert_same(found, truth, 4 * torch.finfo(dtype).eps)


def test_weight_gradients_of_low_precision_rows_are_summed_in_fp32(make_case, run_op, way) -> None:
    # 4096 equal contributions: a bf16 sum would stall at 256 times one contribution.
    case = make_case(task_of_row=[0] * 4096, num_tasks=1, experts=1, r=1, K=1, N=1, k=1, dtype=torch.bfloat16)
    with torch.no_grad():
        for leaf in case.leaves().values():
            leaf.fill_(1)
    found = run_op(low_rank, case, torch.ones(4096, 1, dtype=torch.bfloat16))
    assert found["A"].item() == found["B"].item() == found["gates"].item() == 4096 * case.scale


def test_the_same_bits_every_time(make_case, run_op, way) -> None:
    for k in (None, 3):
        case = make_case(
            task_of_row=[i // 7 % 4 for i in range(200)], dtype=torch.float32, k=k, K=65, N=130, G=4
        )
        first = run_op(low_rank, case)
        for _ in range(5):
            for name, value in run_op(low_rank, case).items():
                assert torch.equal(value, first[name]), name


def test_zero_B_adds_exactly_nothing(make_case, way) -> None:
    for k in (None, 2):
        case = make_case(dtype=torch.float32, k=k)
        with torch.no_grad():
            case.B.zero_()
        assert torch.equal(low_rank(*case.args()), case.y)


def test_any_strides(make_case, run_op, way) -> None:
    # Columns contiguous instead of rows, and the stride-0 gradient that .sum() sends back.
    for k in (None, 2):
        case = make_case(k=k)
        plain = run_op(low_rank, case, torch.ones(15, 9, dtype=torch.float64))
        with torch.no_grad():
            case.x.set_(case.x.t().contiguous().t())
            case.y.set_(case.y.t().contiguous().t())
        strided = run_op(low_rank, case, torch.ones((), dtype=torch.float64).expand(15, 9))
        assert_same(strided, plain, 1e-12)


def test_only_what_is_needed_is_computed(make_case, way) -> None:
    for k in (None, 2):
        case = make_case(k=k)
        x, _, A, B, gates, slots, scale, plan = (t.detach() if torch.is_tensor(t) else t for t in case.args())
        tables = plan.op_tables()
        out, s = low_rank_cpu.low_rank_fwd(x, None, A, B, gates, slots, scale, tables)
        dy = torch.ones_like(out)
        every = low_rank_cpu.low_rank_bwd(dy, x, s, A, B, gates, slots, scale, tables, [True] * 4)
        for i in range(4):
            needs = [i == j for j in range(4)]
            one = low_rank_cpu.low_rank_bwd(dy, x, s, A, B, gates, slots, scale, tables, needs)
            assert torch.equal(one[i], every[i])
            assert all(one[j].numel() == 0 for j in range(4) if j != i)


def test_the_way_is_chosen_by_shape() -> None:
    def chosen(sizes: list[int], E: int = 64, k: int = 2, r: int = 8, width: int = 2048) -> type:
        return choose(sizes, E, k, r, width)

    assert chosen([255, 257] * 4) is Segments
    assert chosen([8] * 32, E=256) is Equal
    assert chosen([1, 2] * 4, E=16) is Dense  # few rows: dispatch costs more than arithmetic
    assert chosen([255, 257] * 4, E=2) is Dense
    assert chosen([]) is Dense


@pytest.mark.parametrize(
    ("tasks", "experts", "k", "width", "plain"),
    [
        ([0, 1, 2, 3] * 8, 4, None, 64, little.dense),
        ([0, 1, 2, 3] * 8, 4, 2, 64, little.dense),
        ([i // 64 for i in range(256)], 32, 2, 64, little.batched),
        ([i // 1024 for i in range(4096)], 32, 2, 1024, None),  # much work: memory counts
        ([0] * 500 + [1] * 20 + [2] * 8, 64, 2, 512, None),  # padding would triple the rows
    ],
)
def test_little_work_is_left_to_autograd(make_case, tasks, experts, k, width, plain) -> None:
    sizes = {"task_of_row": tasks, "experts": experts, "k": k, "K": width, "N": width, "r": 8}
    case = make_case(dtype=torch.float32, **sizes)
    x, _, A, B, _, slots, _, plan = case.args()
    assert little.choose(x, A, B, slots, plan) is plain
    # One gradient a task, fp32 sums of bf16 rows and sums under autocast are the ops'.
    assert little.choose(x, A.expand(4, -1, -1, -1), B.expand(4, -1, -1, -1), slots, plan) is None
    assert little.choose(x.bfloat16(), A, B, slots, plan) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert little.choose(x, A, B, slots, plan) is None
