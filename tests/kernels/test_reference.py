from __future__ import annotations

import pytest
import torch

from taskmoe.kernels import reference
from taskmoe.kernels.plan import Plan


@pytest.mark.parametrize("k", [None, 3])
def test_one_einsum_over_dense_gates_says_the_same(make_case, k: int | None) -> None:
    case = make_case(k=k)
    x, y, A, B, gates, slots, scale, plan = case.args()
    dense = gates
    if slots is not None:
        dense = torch.stack([g @ torch.eye(5, dtype=g.dtype)[e] for g, e in zip(gates, slots, strict=True)])
    product = torch.einsum("me,mk,erk,ern->mn", dense[plan.row_tasks()], x, A[0], B[0])
    torch.testing.assert_close(reference.low_rank(*case.args()), y + scale * product, rtol=1e-12, atol=1e-12)


def test_a_case_worked_by_hand() -> None:
    # Two tasks, two rank-1 experts on scalars: expert e multiplies by a_e * b_e = 6 and 20.
    A, B = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1), torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    gates, x = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    plan = Plan.from_rows([1, 0, 1], 2)
    out = reference.low_rank(x, torch.ones(3, 1), A, B, gates, None, 0.5, plan)
    assert out.flatten().tolist() == [1 + 20.0, 1 + 0.5 * 160.0, 1 + 2000.0]
    slots = torch.tensor([[1, 1], [0, 0]])
    out = reference.low_rank(x, None, A, B, gates, slots, 1.0, plan)
    assert out.flatten().tolist() == [12.0, 300.0, 1200.0]


def test_a_task_axis_leaves_each_task_its_own_gradient(make_case, run_op) -> None:
    case = make_case(k=2)
    whole = run_op(reference.low_rank, case)
    parts = run_op(reference.low_rank, case.with_task_axis(4))
    torch.testing.assert_close(parts["A_g"].sum(0), whole["A"], rtol=1e-12, atol=1e-12)
    assert parts["A_g"][3].count_nonzero() == 0  # task 3 has no rows
    assert all(parts["A_g"][t].count_nonzero() > 0 for t in range(3))


def test_average_takes_each_head_from_its_own_block() -> None:
    bank = torch.arange(8.0).view(2, 1, 4)  # expert 0: 0 1 2 3, expert 1: 4 5 6 7
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [2.0, 0.0]]])
    out = reference.average(bank, weights)
    assert out.tolist() == [[[0.0, 1.0, 6.0, 7.0]], [[2.0, 3.0, 4.0, 6.0]]]


def test_no_rows_give_no_rows(make_case) -> None:
    assert reference.low_rank(*make_case(task_of_row=[]).args()).shape == (0, 9)


def truths(make_case, G: int, k: int | None):
    """Operands of a case, with experts of each row, and the banks as each row sees them."""
    case = make_case(k=k, G=G)
    x, y, A, B, gates, slots, scale, plan = case.args()
    rows = plan.row_tasks()
    by_row = (torch.arange(5).expand(4, -1) if slots is None else slots)[rows]
    of_task = rows if G > 1 else torch.zeros_like(rows)
    A_MkrK, B_MkrN = (bank[of_task[:, None], by_row] for bank in (A, B))
    return case, (x, y, A, B, gates, slots, scale, plan), rows, by_row, A_MkrK, B_MkrN


def assert_same_with_gradients(found, truth, wanted) -> None:
    upstream = torch.linspace(-1, 1, truth.numel(), dtype=truth.dtype).view(truth.shape)
    outcomes = []
    for out in (found, truth):
        outcomes.append([out, *torch.autograd.grad(out, wanted, upstream, retain_graph=True)])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("k", [None, 3])
def test_gradients_are_those_of_one_einsum(make_case, G: int, k: int | None) -> None:
    case, args, rows, _, A_MkrK, B_MkrN = truths(make_case, G, k)
    x, y, A, B, gates, _, scale, _ = args
    truth = y + scale * torch.einsum("mj,mk,mjrk,mjrn->mn", gates[rows], x, A_MkrK, B_MkrN)
    assert_same_with_gradients(reference.low_rank(*args), truth, [*case.leaves().values(), A, B])


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("k", [None, 3])
def test_the_halves_by_einsum(make_case, G: int, k: int | None) -> None:
    _, args, rows, _, A_MkrK, B_MkrN = truths(make_case, G, k)
    x, y, A, B, gates, slots, scale, plan = args
    truth = torch.einsum("mk,mjrk->mjr", x, A_MkrK).flatten(1)
    assert_same_with_gradients(reference.shrink(x, A, slots, plan), truth, [x, A])
    s = torch.randn(truth.shape, dtype=torch.float64, requires_grad=True)
    for add in (y, None):
        found = reference.expand(s, add, B, gates, slots, scale, plan, torch.float64)
        product = torch.einsum("mj,mjr,mjrn->mn", gates[rows], s.unflatten(1, (-1, 2)), B_MkrN)
        truth = scale * product if add is None else add + scale * product
        assert_same_with_gradients(found, truth, [s, B, gates])


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("with_y", [True, False])
def test_gates_a_row_by_einsum(make_case, G: int, with_y: bool) -> None:
    case = make_case(G=G, with_y=with_y)
    x, y, A, B, _, _, scale, plan = case.args()
    rows = plan.row_tasks()
    of_task = rows if G > 1 else torch.zeros_like(rows)
    dense = torch.randn(plan.rows, 5, dtype=torch.float64, requires_grad=True)
    product = torch.einsum("me,mk,merk,mern->mn", dense, x, A[of_task], B[of_task])
    truth = scale * product if y is None else y + scale * product
    found = reference.gated_low_rank(x, y, A, B, dense, scale, plan)
    assert_same_with_gradients(found, truth, [x, A, B, dense])

    slots = torch.randint(5, (plan.rows, 3))
    slots[0] = 4  # one expert in every slot
    gates = torch.randn(plan.rows, 3, dtype=torch.float64, requires_grad=True)
    banks = (bank[of_task[:, None], slots] for bank in (A, B))
    product = torch.einsum("mj,mk,mjrk,mjrn->mn", gates, x, *banks)
    truth = scale * product if y is None else y + scale * product
    found = reference.grouped_low_rank(x, y, A, B, gates, slots, scale, plan)
    assert_same_with_gradients(found, truth, [x, A, B, gates])


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("with_y", [True, False])
def test_a_core_by_einsum(make_case, G: int, with_y: bool) -> None:
    case = make_case(G=G, with_y=with_y)
    x, y, A, B, _, _, scale, plan = case.args()
    A, B, rows = A.flatten(1, 2), B.flatten(1, 2)[:, :4], plan.row_tasks()
    of_task = rows if G > 1 else torch.zeros_like(rows)
    core = torch.randn(4, 4, 10, dtype=torch.float64, requires_grad=True)
    product = torch.einsum("mk,mrk,mqr,mqn->mn", x, A[of_task], core[rows], B[of_task])
    truth = scale * product if y is None else y + scale * product
    found = reference.low_rank_core(x, y, A, B, core, scale, plan)
    assert_same_with_gradients(found, truth, [x, case.A, case.B, core])


def test_low_precision_is_computed_in_fp32_and_rounded_once(make_case) -> None:
    case = make_case(dtype=torch.bfloat16, bank_dtype=torch.float32)
    x, y, A, B, gates, _, scale, plan = case.args()
    dense = gates[plan.row_tasks()]
    first_A, first_B, core = A[:, :, 0], B[:, :, 0], torch.randn(4, 5, 5)
    for function in (
        lambda x, y: reference.low_rank(x, y, A, B, gates, None, scale, plan),
        lambda x, y: reference.gated_low_rank(x, y, A, B, dense, scale, plan),
        lambda x, y: reference.low_rank_core(x, y, first_A, first_B, core, scale, plan),
    ):
        found = function(x, y)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, function(x.float(), y.float()).bfloat16())
    assert reference.shrink(x, A, None, plan).dtype == torch.float32


def test_no_rows_for_any_function(make_case) -> None:
    x, _, A, B, gates, slots, scale, plan = make_case(task_of_row=[], k=2).args()
    assert reference.shrink(x, A, slots, plan).shape == (0, 4)
    s = x.new_zeros(0, 4)
    assert reference.expand(s, None, B, gates, slots, scale, plan, x.dtype).shape == (0, 9)
    assert reference.gated_low_rank(x, None, A, B, x.new_zeros(0, 5), scale, plan).shape == (0, 9)
    core = x.new_zeros(4, 5, 5)
    assert reference.low_rank_core(x, None, A[:, :, 0], B[:, :, 0], core, scale, plan).shape == (0, 9)
