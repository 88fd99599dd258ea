from __future__ import annotations

import copy

import pytest
import torch

from taskmoe.kernels.plan import Plan


def test_neighbours_of_one_task_become_one_segment() -> None:
    plan = Plan.from_sequences([1, 1, 0, 1], rows_per_sequence=3, num_tasks=2)
    assert (plan.rows, plan.offsets, plan.tasks) == (12, (0, 6, 9, 12), (1, 0, 1))
    assert plan.segments() == [(1, 0, 6), (0, 6, 9), (1, 9, 12)]
    assert plan.row_tasks().tolist() == [1] * 6 + [0] * 3 + [1] * 3


def test_packed_rows_are_cut_where_the_task_changes() -> None:
    plan = Plan.from_rows([0, 0, 2, 0], num_tasks=3)
    assert (plan.rows, plan.offsets, plan.tasks) == (4, (0, 2, 3, 4), (0, 2, 0))
    assert plan.row_tasks().tolist() == [0, 0, 2, 0]


def test_both_constructors_and_a_tensor_of_ids_agree() -> None:
    sequences = torch.tensor([3, 0, 0, 2])
    assert Plan.from_sequences(sequences, 2, 4) == Plan.from_rows(sequences.repeat_interleave(2), 4)
    assert Plan.from_sequences(sequences, 1, 4) == Plan.from_rows([3, 0, 0, 2], 4)


def test_tables_are_int32_and_built_once() -> None:
    plan = Plan.from_rows([1, 1, 0], num_tasks=2)
    offsets, tasks = plan.tables("cpu")
    assert offsets.dtype == tasks.dtype == torch.int32
    assert (offsets.tolist(), tasks.tolist()) == ([0, 2, 3], [1, 0])
    assert plan.tables(torch.device("cpu"))[0] is offsets
    assert plan.row_tasks() is plan.row_tasks()
    assert plan.row_tasks().dtype == torch.int64


def test_the_last_two_op_tables_are_on_the_host() -> None:
    plan = Plan.from_rows([1, 1, 0], num_tasks=2)
    assert [t.device.type for t in plan.op_tables("cpu")] == ["cpu"] * 3
    away = plan.op_tables("meta")
    assert [t.device.type for t in away] == ["meta"] * 6 + ["cpu"] * 2
    assert [t.tolist() for t in away[-2:]] == [[0, 2, 3], [1, 0]]


def test_a_plan_without_rows() -> None:
    for plan in (Plan.from_rows([], 2), Plan.from_sequences([0, 1], 0, 2), Plan.from_sequences([], 5, 2)):
        assert (plan.rows, plan.offsets, plan.tasks) == (0, (0,), ())
        assert plan.row_tasks().shape == (0,)


def test_tables_do_not_take_part_in_comparison_and_plans_copy() -> None:
    plan, other = Plan.from_rows([0, 1], 2), Plan.from_rows([0, 1], 2)
    plan.tables()
    assert plan == other and hash(plan) == hash(other)
    assert copy.deepcopy(plan) == plan


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Plan.from_rows([0, 2], 2), r"tasks holds 2; it must be in 0\.\.1"),
        (lambda: Plan.from_rows([-1], 2), r"tasks holds -1"),
        (lambda: Plan.from_sequences([0], -3, 1), r"rows_per_sequence is -3"),
        (lambda: Plan.from_rows([0.5], 2), r"task_of_row .*float32"),
        (lambda: Plan.from_rows([True], 2), r"task_of_row .*bool"),
        (lambda: Plan.from_rows(torch.zeros(2, 2, dtype=torch.int64), 2), r"task_of_row .*\(2, 2\)"),
        (lambda: Plan.from_sequences(torch.zeros(2, dtype=torch.int64, device="meta"), 1, 2), r"is on meta"),
        (lambda: Plan(2, (0, 2), (0,), 0), r"num_tasks is 0"),
        (lambda: Plan(2, (0, 2), (0, 0), 1), r"offsets has 2 entries for 2 tasks"),
        (lambda: Plan(3, (0, 2), (0,), 1), r"offsets go from 0 to 2; they must cover rows 0 to 3"),
        (lambda: Plan(2, (0, 0, 2), (0, 0), 1), r"offsets 0, 0 do not rise"),
    ],
)
def test_what_is_no_plan_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
