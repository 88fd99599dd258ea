"""J in blocks of columns: the same sums on any number of ranks, whenever they are taken."""

from __future__ import annotations

import pytest
import torch

from taskmoe.train.distributed import all_sum
from taskmoe.train.task_matrix import TaskMatrix

SHAPES = {"a": (3, 5), "b": (4,), "c": (2, 2, 2)}  # 15 columns do not divide by two ranks
ADDED = [("a", [0, 2]), ("b", [1]), ("a", [2, 2]), ("c", [0, 1, 2]), ("a", [1])]


def additions(rank: int) -> list[tuple[str, list[int], torch.Tensor]]:
    draw = torch.Generator().manual_seed(rank)
    return [(n, rows, torch.randn(len(rows), *SHAPES[n], generator=draw)) for n, rows in ADDED]


def whole() -> dict[str, torch.Tensor]:
    """[3, *shape], added up one row at a time."""
    sums = {n: torch.zeros(3, *shape) for n, shape in SHAPES.items()}
    for rank in range(2):
        for name, rows, parts in additions(rank):
            for row, part in zip(rows, parts, strict=True):
                sums[name][row] += part
    return sums


def on_ranks(eager: bool) -> dict:
    rank = torch.distributed.get_rank()
    matrix = TaskMatrix(SHAPES, rank, 2, eager)
    matrix.clear(3)
    for name, rows, parts in additions(rank):
        matrix.add(name, rows, parts)
    matrix.reduce()
    matrix.reduce()  # the second does nothing
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    placed = {n: all_sum(matrix.place(n, matrix.weighted(n, weights))) for n in SHAPES}
    return {"G": all_sum(matrix.gramian(SHAPES)), "placed": placed,
            "columns": {n: matrix.block(n).shape[1] for n in SHAPES}}  # fmt: skip


@pytest.mark.parametrize("eager", [True, False])
def test_two_ranks_hold_what_one_would(spawn_ranks, eager):
    J = torch.cat([v.reshape(3, -1) for v in whole().values()], 1).double()
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    for found in spawn_ranks(on_ranks, eager=eager):
        assert torch.allclose(found["G"], J @ J.T, rtol=1e-6)
        assert found["columns"] == {"a": 8, "b": 2, "c": 4}
        for n, v in whole().items():
            expected = (weights @ v.reshape(3, -1).double()).view(SHAPES[n]).float()
            assert torch.allclose(found["placed"][n], expected, atol=1e-6)


def sparse(eager: bool) -> dict:
    """Rank 0 holds "a" alone, rank 1 "c" alone; eager ranks add together, one of them no row."""
    rank = torch.distributed.get_rank()
    matrix = TaskMatrix(SHAPES, rank, 2, eager, like={"b": torch.zeros(4, dtype=torch.bfloat16)})
    matrix.clear(2)
    for name, owner in (("a", 0), ("c", 1)):
        if eager or rank == owner:
            rows = [1] if rank == owner else []
            matrix.add(name, rows, torch.ones(len(rows), *SHAPES[name]))
    matrix.reduce()
    blocks = {n: matrix.block(n) for n in SHAPES}
    return {"G": all_sum(matrix.gramian(SHAPES)), "b": None if blocks["b"] is None else blocks["b"].dtype}


@pytest.mark.parametrize("eager", [True, False])
def test_a_rank_may_hold_nothing_of_a_parameter(spawn_ranks, eager):
    for found in spawn_ranks(sparse, eager=eager):
        assert found["G"].tolist() == [[0, 0], [0, 15 + 8]]
        assert found["b"] == (None if eager else torch.float32)


def test_rows_may_come_one_by_one():
    matrix = TaskMatrix({"a": (2,)})
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    matrix.num_rows = 1
    matrix.add("a", [0], one)
    matrix.num_rows = 2
    matrix.add("a", [1], two)
    matrix.add("a", [0], one)
    assert matrix.block("a").tolist() == [[2, 4], [3, -1]]
    assert matrix.gramian(["a"]).tolist() == [[20, 2], [2, 10]]
    assert one.tolist() == [[1, 2]]  # what was given is not written to
    matrix.clear()
    assert matrix.block("a") is None


def test_what_is_equal_on_all_ranks_is_added_once():
    matrix = TaskMatrix({"a": (3,)}, rank=1, world_size=2)
    matrix.clear(2)
    matrix.add_whole("a", torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert matrix.block("a").tolist() == [[3, 0], [6, 0]]
    assert matrix.place("a", torch.tensor([3.0, 0.0])).tolist() == [0, 0, 3]


def test_half_precision_is_added_up_in_fp32():
    matrix = TaskMatrix({"a": (1,)})
    matrix.clear(1)
    for _ in range(300):
        matrix.add("a", [0], torch.ones(1, 1, dtype=torch.bfloat16))
    assert matrix.block("a").item() == 300
