"""Gates: values by hand, gradients by numbers."""

from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.gates import GATES
from taskmoe.moe.sigmoid_gates import BernoulliOptions, SigmoidOptions

LOGITS = [1.0, -0.5, 2.0, 0.25]
NOISE = [0.9, 0.2, 0.1, 0.5]
NOISY = [name for name, gate in GATES.items() if gate.noisy]
WEIGHTS = [name for name in GATES if name != "raw"]  # they are shares: 0 or more, and sum to one


def call(gate, temperature=1.0, top_k=None, logits=LOGITS, noise=None, options=None):
    if noise is not None:
        noise = torch.tensor(noise, dtype=torch.float64)
    values, slots = GATES[gate](torch.tensor(logits, dtype=torch.float64), temperature, top_k, noise, options)
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


def test_raw_by_hand():
    assert call("raw", 0.5) == (LOGITS, None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_by_hand(temperature):
    noisy = [v - math.log(-math.log(u)) for v, u in zip(LOGITS, NOISE, strict=True)]
    powers = [math.exp(v / temperature) for v in noisy]
    found = call("gumbel", temperature, noise=NOISE)
    assert found == (pytest.approx([p / sum(powers) for p in powers]), None)
    assert call("gumbel", temperature) == call("softmax", temperature)


def test_gumbel_one_hot_by_hand():
    assert call("gumbel_one_hot", noise=NOISE)[0] == [1.0, 0.0, 0.0, 0.0]  # 1 + 2.25 is above 2 - 0.83
    assert call("gumbel_one_hot")[0] == [0.0, 0.0, 1.0, 0.0]


def test_gumbel_noise_draws_an_expert_with_its_probability():
    logits = torch.tensor(LOGITS).expand(20_000, 4)
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    share = GATES["gumbel_one_hot"](logits, 1.0, None, noise)[0].mean(0)
    assert torch.allclose(share, torch.softmax(torch.tensor(LOGITS), 0), atol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bernoulli_by_hand(temperature):
    logistic = [v + math.log(u / (1 - u)) for v, u in zip(LOGITS, NOISE, strict=True)]
    values = [1 / (1 + math.exp(-v / temperature)) for v in logistic]
    found = call("bernoulli", temperature, noise=NOISE)
    assert found == (pytest.approx([v / sum(values) for v in values]), None)
    for options in (None, BernoulliOptions(relaxed=False)):
        assert call("bernoulli", temperature, options=options) == call("sigmoid", temperature)
    assert call("bernoulli", noise=NOISE, options=BernoulliOptions(relaxed=False)) == call("sigmoid")


def test_options_of_sigmoid_and_bernoulli_by_hand():
    odds = [1 / (1 + math.exp(-v)) for v in LOGITS]
    for gate, options in (("sigmoid", SigmoidOptions), ("bernoulli", BernoulliOptions)):
        assert call(gate, options=options(normalise="sqrt"))[0] == pytest.approx([v / 2 for v in odds])
        shared = [*odds[:3], 1.0]
        found = call(gate, options=options(shared=True))[0]
        assert found == pytest.approx([v / sum(shared) for v in shared])
    length = math.sqrt(sum(v * v for v in LOGITS))
    found = call("sigmoid", options=SigmoidOptions(normalise="l2"))[0]
    assert found == pytest.approx([v / length for v in LOGITS])


def test_rounding_keeps_at_least_one_expert_and_the_gradient_of_what_was_rounded():
    rounded = BernoulliOptions(straight_through=True)
    third = pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert call("bernoulli", options=rounded)[0] == third
    assert call("bernoulli", logits=[-3.0, -1.0, -2.0], options=rounded)[0] == pytest.approx([0, 1, 0])
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    (GATES["bernoulli"](logits, 1.0, None, None, rounded)[0] @ weights).backward()
    odds, hard = torch.sigmoid(logits.detach()), torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)
    by_formula = odds * (1 - odds) * (weights / 3 - (hard @ weights) / 9)
    assert torch.allclose(logits.grad, by_formula)


def test_dropout_leaves_its_share_out_and_does_not_depend_on_the_other_noise():
    logits = torch.zeros(20_000, 4, requires_grad=True)
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    dropped = BernoulliOptions(dropout=0.3, normalise="sqrt")
    values, _ = GATES["bernoulli"](logits, 1.0, None, noise, dropped)
    gone = values == 0
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([gone.flatten().float(), noise.flatten()]))[0, 1])) < 0.01
    assert torch.allclose(values[~gone], noise[~gone] / 2 / 0.7, atol=1e-5)  # sigmoid(0 + logit u) = u
    summed, _ = GATES["bernoulli"](logits, 1.0, None, noise, BernoulliOptions(dropout=0.9))
    summed.square().sum().backward()
    assert (summed.sum(-1) == 0).any() and logits.grad.isfinite().all()
    assert call("bernoulli", options=dropped) == call("bernoulli", options=BernoulliOptions(normalise="sqrt"))


@pytest.mark.parametrize(
    ("gate", "options", "message"),
    [
        ("sigmoid", {"normalise": "l1"}, "moe.gate_options.normalise: 'l1' is unknown here; known are sum"),
        ("sigmoid", {"normalise": "l2", "shared": True}, "moe.gate_options.shared: True has no effect"),
        ("bernoulli", {"normalise": "l2"}, "moe.gate_options.normalise: 'l2' is unknown here"),
        ("bernoulli", {"dropout": 1.0}, r"moe.gate_options.dropout: 1.0 must be in \[0, 1\)"),
        ("gumbel", {"hard": True}, "moe.gate_options.hard: unknown option of gate 'gumbel'"),
    ],
)
def test_options_that_cannot_be_used(gate, options, message, tiny):
    with pytest.raises(ConfigError, match=message):
        attach(tiny("llama"), TaskMoEConfig(gate=gate, gate_options=options), 2, dry_run=False)


@pytest.mark.parametrize("gate", NOISY)
def test_noise_is_one_draw_a_task_and_step_and_off_in_evaluation(gate, routed):
    model = routed("llama", gate=gate).train()
    routing = model.routing

    def noise(seed, step, ids=(0, 1, 2)):
        routing.seed, routing.step = seed, step
        return routing.noise(ids)

    def values(seed, step):
        return routing(torch.arange(3), noise(seed, step))[0]

    first = values(0, 5)
    assert torch.equal(first, values(0, 5))
    assert torch.equal(noise(0, 5)[:, [2]], noise(0, 5, [2])), "whatever else is in the batch"
    assert not torch.allclose(first, values(0, 6)) and not torch.allclose(first, values(1, 5))
    model.eval()
    assert routing.noise([0, 1, 2]) is None


@pytest.mark.parametrize("gate", WEIGHTS)
def test_gates_sum_to_one_in_every_leading_shape(gate):
    logits = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    values, slots = GATES[gate](logits, 0.7, 3 if gate == "top_k" else None)
    assert torch.allclose(values.sum(-1), torch.ones(3, 2, 5, dtype=torch.float64), atol=1e-10)
    assert (values >= 0).all()
    one, one_slot = GATES[gate](logits[1, 0, 2], 0.7, 3 if gate == "top_k" else None)
    assert torch.allclose(values[1, 0, 2], one, rtol=1e-14)
    assert slots is None or torch.equal(slots[1, 0, 2], one_slot)


@pytest.mark.parametrize(
    ("gate", "options"),
    [
        *((gate, None) for gate in ("softmax", "sigmoid", "top_k", "gumbel", "bernoulli", "raw")),
        ("sigmoid", SigmoidOptions(normalise="l2")),
        ("sigmoid", SigmoidOptions(normalise="sqrt", shared=True)),
        ("bernoulli", BernoulliOptions(dropout=0.4, shared=True)),
    ],
)
def test_gradients_are_those_of_the_formula(gate, options):
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    k = 2 if gate == "top_k" else None
    noise = torch.rand(2, 4, dtype=torch.float64) if GATES[gate].noisy else None
    assert torch.autograd.gradcheck(lambda x: GATES[gate](x, 0.7, k, noise, options)[0], (logits,))


@pytest.mark.parametrize(("gate", "relaxed"), [("one_hot", "softmax"), ("gumbel_one_hot", "gumbel")])
def test_one_hot_has_the_gradient_of_the_softmax(gate, relaxed):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, dtype=torch.float64)
    noise = torch.rand(3, 4, dtype=torch.float64) if GATES[gate].noisy else None
    hard = torch.autograd.grad((GATES[gate](logits, 0.7, None, noise)[0] * weights).sum(), logits)
    soft = torch.autograd.grad((GATES[relaxed](logits, 0.7, None, noise)[0] * weights).sum(), logits)
    assert torch.allclose(hard[0], soft[0])


@pytest.mark.parametrize("gate", GATES)
def test_extreme_logits_stay_finite(gate):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    tiny = torch.finfo(torch.float32).eps / 2  # the smallest and the largest draw
    noise = torch.tensor([[tiny, 1 - tiny, 0.5], [tiny, tiny, tiny]]) if GATES[gate].noisy else None
    values, _ = GATES[gate](logits, 1.0, 2 if gate == "top_k" else None, noise)
    assert values.isfinite().all()
    if values.requires_grad:
        values.square().sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("router", ["task_table", "token_linear"])
def test_a_model_may_gate_in_another_way_for_a_while(router, routed, batch, head):
    model = routed("llama", router=router, gate="top_k", top_k=2)
    before = head(model(**batch("llama", [0, 1, 2])))
    model.use_gate("one_hot")
    other = head(model(**batch("llama", [0, 1, 2])))
    assert not torch.allclose(other, before)
    expected = head(routed("llama", router=router, gate="one_hot")(**batch("llama", [0, 1, 2])))
    assert torch.equal(other, expected)
    assert model.moe_config.gate == "top_k"
    model.use_gate("top_k")
    assert torch.equal(head(model(**batch("llama", [0, 1, 2]))), before)
