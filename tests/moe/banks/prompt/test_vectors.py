"""Task prompt vectors, by hand."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe.banks.prompt.vectors import add_vectors, average_vectors, task_vector

START = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
TUNED = [torch.tensor([[2.0, 2.0], [3.0, 3.0]]), torch.tensor([[1.0, 6.0], [5.0, 4.0]])]


def test_by_hand():
    vectors = [task_vector(t, START) for t in TUNED]
    assert vectors[0].tolist() == [[1.0, 0.0], [0.0, -1.0]]
    assert vectors[1].tolist() == [[0.0, 4.0], [2.0, 0.0]]
    assert add_vectors(START, vectors).tolist() == [[2.0, 6.0], [5.0, 3.0]]
    assert add_vectors(START, vectors, scale=0.5).tolist() == [[1.5, 4.0], [4.0, 3.5]]
    assert average_vectors(START, vectors).tolist() == [[1.5, 4.0], [4.0, 3.5]]


def test_one_vector_brings_its_task_back():
    assert torch.equal(add_vectors(START, [task_vector(TUNED[0], START)]), TUNED[0])


def test_a_vector_serves_another_start():
    other = torch.zeros(2, 2)
    assert add_vectors(other, [task_vector(TUNED[1], START)]).tolist() == [[0.0, 4.0], [2.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task_vector(START, torch.zeros(2)), r"shape \(2, 2\) did not start as \(2,\)"),
        (lambda: add_vectors(START, []), "no task vectors"),
        (lambda: average_vectors(START, [torch.zeros(3, 2)]), r"shape \(3, 2\) does not fit a prompt of"),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
