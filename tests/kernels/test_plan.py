from __future__ import annotations

import copy

import pytest
import torch

from taskmoe.kernels.plan import Plan, chunk_rows, cut, tile_rows


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


def test_a_tile_is_a_power_of_two_that_fits_the_segments() -> None:
    assert tile_rows(0, 0) == tile_rows(100, 1) == tile_rows(2048, 1) == 16
    assert tile_rows(65536, 4) == 64
    assert tile_rows(65536, 4096) == 16  # segments of 16 rows
    assert tile_rows(65536, 2048) == 32
    for rows in (0, 5, 3000, 5000, 10**6):
        for segments in (0, 1, 7, 1000):
            assert tile_rows(rows, segments) in (16, 32, 64)


def test_a_chunk_grows_with_the_rows() -> None:
    sizes = [chunk_rows(rows) for rows in (0, 8191, 8192, 16384, 32768, 10**7)]
    assert sizes == [128, 128, 256, 512, 1024, 1024]


def test_pieces_hold_each_row_once_and_never_straddle_a_run() -> None:
    # Runs need not be in the order of their rows, and may be empty.
    groups, starts = torch.tensor([5, 0, 9, 5]), torch.tensor([0, 40, 33, 33])
    pieces, begins = cut(groups, starts, torch.tensor([33, 7, 0, 7]), 16)
    assert pieces.tolist() == [[5, 0, 16], [5, 16, 32], [5, 32, 33], [0, 40, 47], [5, 33, 40]]
    assert begins.tolist() == [0, 3, 4, 4, 5]
    assert pieces.dtype == begins.dtype == torch.int32


def test_surplus_pieces_are_empty() -> None:
    args = torch.tensor([1, 2]), torch.tensor([0, 20]), torch.tensor([20, 3]), 16
    exact, begins = cut(*args)
    padded, same = cut(*args, 7)
    assert torch.equal(padded[:3], exact) and torch.equal(begins, same)
    assert bool((padded[3:, 1] >= padded[3:, 2]).all()) and len(padded) == 7
    none, begins = cut(*(torch.zeros(0, dtype=torch.int32) for _ in range(3)), 16, 2)
    assert none.shape == (2, 3) and not none.any() and begins.tolist() == [0]


@pytest.mark.parametrize(
    "task_of_row",
    [
        [],
        [2],
        [1] * 40,
        [0] * 17 + [3] + [0] * 30 + [1] * 16,
        [i // 3 % 4 for i in range(300)],
        [1] * 300 + [0] * 140,
    ],
    ids=len,
)
def test_tiles_and_chunks_of_a_plan(task_of_row: list[int]) -> None:
    plan = Plan.from_rows(task_of_row, 4)
    row_tasks, offsets, tasks, tiles, chunks, chunk_ptr, *host = plan.op_tables(tiles=True)
    assert row_tasks.tolist() == task_of_row
    assert [t.tolist() for t in host] == [offsets.tolist(), tasks.tolist()]
    for table, size in ((tiles, tile_rows(plan.rows, len(plan.tasks))), (chunks, chunk_rows(plan.rows))):
        seen = [0] * plan.rows
        for task, first, end in table.tolist():
            assert 0 < end - first <= size
            assert any(t == task and a <= first and end <= b for t, a, b in plan.segments())
            for row in range(first, end):
                seen[row] += 1
        assert seen == [1] * plan.rows
    # Chunks lie by task, those of one task in the order of its rows.
    assert [(t, a) for t, a, _ in chunks.tolist()] == sorted((t, a) for t, a, _ in chunks.tolist())
    assert chunk_ptr.tolist() == [sum(t < task for t, *_ in chunks.tolist()) for task in range(5)]


def test_tables_with_and_without_tiles_are_kept_apart() -> None:
    plan = Plan.from_rows([1, 1, 0], 2)
    assert len(plan.op_tables()) == 3 and len(plan.op_tables(tiles=True)) == 8
    assert plan.op_tables(tiles=True)[3] is plan.op_tables(tiles=True)[3]
    assert len(plan.op_tables("meta", tiles=False)) == 5
