"""Gates: values by hand, gradients by numbers."""

from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe.gates import GATES

LOGITS = [1.0, -0.5, 2.0, 0.25]


def call(gate, temperature=1.0, top_k=None, logits=LOGITS):
    values, slots = GATES[gate](torch.tensor(logits, dtype=torch.float64), temperature, top_k)
    return values.tolist(), None if slots is None else slots.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_softmax_by_hand(temperature):
    powers = [math.exp(v / temperature) for v in LOGITS]
    assert call("softmax", temperature) == (pytest.approx([p / sum(powers) for p in powers]), None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sigmoid_by_hand(temperature):
    values = [1 / (1 + math.exp(-v / temperature)) for v in LOGITS]
    assert call("sigmoid", temperature) == (pytest.approx([v / sum(values) for v in values]), None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_k_by_hand(temperature):
    a, b = math.exp(2.0 / temperature), math.exp(1.0 / temperature)
    assert call("top_k", temperature, 2) == (pytest.approx([a / (a + b), b / (a + b)]), [2, 0])


def test_one_hot_by_hand():
    assert call("one_hot") == ([0.0, 0.0, 1.0, 0.0], None)
    assert call("one_hot", logits=[0.0, 0.0])[0] == [1.0, 0.0], "one expert, also among equals"


def test_uniform_by_hand():
    assert call("uniform") == ([0.25] * 4, None)


@pytest.mark.parametrize("gate", GATES)
def test_gates_sum_to_one_in_every_leading_shape(gate):
    logits = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    values, slots = GATES[gate](logits, 0.7, 3 if gate == "top_k" else None)
    assert torch.allclose(values.sum(-1), torch.ones(3, 2, 5, dtype=torch.float64), atol=1e-10)
    assert (values >= 0).all()
    one, one_slot = GATES[gate](logits[1, 0, 2], 0.7, 3 if gate == "top_k" else None)
    assert torch.allclose(values[1, 0, 2], one, rtol=1e-14)
    assert slots is None or torch.equal(slots[1, 0, 2], one_slot)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "top_k"])
def test_gradients_are_those_of_the_formula(gate):
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    k = 2 if gate == "top_k" else None
    assert torch.autograd.gradcheck(lambda x: GATES[gate](x, 0.7, k)[0], (logits,))


def test_one_hot_has_the_gradient_of_the_softmax():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, dtype=torch.float64)
    hard = torch.autograd.grad((GATES["one_hot"](logits, 0.7, None)[0] * weights).sum(), logits)
    soft = torch.autograd.grad((GATES["softmax"](logits, 0.7, None)[0] * weights).sum(), logits)
    assert torch.allclose(hard[0], soft[0])


@pytest.mark.parametrize("gate", GATES)
def test_extreme_logits_stay_finite(gate):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    values, _ = GATES[gate](logits, 1.0, 2 if gate == "top_k" else None)
    assert values.isfinite().all()
    if values.requires_grad:
        values.square().sum().backward()
        assert logits.grad.isfinite().all()
