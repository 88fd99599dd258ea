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
