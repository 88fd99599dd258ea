"""Align-LoRA against a dense implementation that collects what the linears read, pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.regularisers.alignment import BANDWIDTHS, kl_distances, mmd_distances
from taskmoe.moe.regularisers.kinds import read_regularisers

TASKS = ["a", "b", "c"]
PLAIN = {"router": "none", "gate": "uniform", "num_experts": 1, "r": 4}  # one LoRA
EPS = 1e-6


def gaussians(x, y):
    """The symmetric divergence of the two tasks' rows, by torch's own distributions."""
    fits = [Normal(z.mean(0), (z.var(0, correction=0) + EPS).sqrt()) for z in (x, y)]
    both = kl_divergence(*fits) + kl_divergence(*reversed(fits))
    return both.sum() / 2


def discrepancy(x, y):
    def mean_kernel(u, v):
        squares = torch.stack([(a - v).square().sum(-1) for a in u])
        return sum(torch.exp(-squares / (2 * s)) for s in BANDWIDTHS).mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


DISTANCES = {"kl": gaussians, "mmd": discrepancy}


def made(tiny, shaken, kind, regularisers, **settings):
    config = TaskMoEConfig.from_dict({**PLAIN, "regularisers": regularisers, **settings})
    return shaken(attach(tiny(kind), config, TASKS)).double().train()


def dense(model, inputs, real, distance, loss_of):
    """loss + mean over layers and pairs of tasks of D, from the inputs of every linear."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m.name, (m, args[0])))
        for m in model.modules()
        if hasattr(m, "bank")
    ]
    loss = loss_of(model(**inputs))
    for hook in hooks:
        hook.remove()
    terms = []
    for name, (layer, x) in seen.items():
        keep = real(name, x)
        z = torch.einsum("blk,erk->bler", x, layer.bank.A_ErK).flatten(2)
        tasks = inputs["task_ids"].tolist()
        rows = [[z[b][keep[b]] for b in range(len(tasks)) if tasks[b] == t] for t in range(3)]
        own = [torch.cat(of_task) for of_task in rows if of_task]
        pairs = [DISTANCES[distance](x, y) for x, y in itertools.combinations(own, 2)]
        terms.append(sum(pairs) / len(pairs))
    return loss, sum(terms) / len(terms)


def padded(batch, kind, tasks):
    """Inputs in which the second half of the first sequence is padding."""
    inputs = batch(kind, tasks, length=8)
    inputs["attention_mask"][0, 4:] = 0
    return inputs


def positions(inputs, kind):
    """(layer, its rows) -> [B, L], which of them count."""
    mask = inputs["attention_mask"].bool()

    def real(name, x):
        inside = kind != "t5" or name.startswith("encoder")
        return mask if inside else torch.ones(x.shape[:2], dtype=torch.bool)

    return real


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(("kind", "distance"), [("llama", "kl"), ("llama", "mmd"), ("t5", "kl")])
def test_loss_and_gradients_are_the_dense_ones(
    kind, distance, mode, tiny, batch, shaken, gradients, close, checkpoint
):
    term = {"alignment": {"weight": 0.7, "distance": distance}}
    inputs = padded(batch, kind, [2, 0, 1, 0, 2])  # unsorted, tasks with one sequence and with two

    def loss_of(out):
        return out.logits.square().mean()

    plain = made(tiny, shaken, kind, None)
    loss, value = dense(plain, inputs, positions(inputs, kind), distance, loss_of)
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    alone = torch.autograd.grad(value, trained.values(), allow_unused=True, retain_graph=True)
    assert sum(float(g.abs().sum()) for g in alone if g is not None) > 1e-3
    expected = gradients(plain, loss + 0.7 * value)

    model = checkpoint(made(tiny, shaken, kind, term), mode)
    ours = loss_of(model(**inputs, **({"use_cache": False} if mode != "none" else {})))
    close(ours, loss, 1e-12)
    close(gradients(model, ours), expected, 1e-9)
    total, number = model.penalties.read()["alignment"]
    assert float(total) / number == pytest.approx(value.item(), rel=1e-9) and number == pytest.approx(1)


def test_order_of_the_batch_does_not_matter(tiny, batch, shaken, gradients, close):
    """A batch sorted by task has the gradients of the shuffled one."""
    model = made(tiny, shaken, "llama", {"alignment": 1.0})
    inputs = padded(batch, "llama", [2, 0, 1, 0, 2])
    order = torch.argsort(inputs["task_ids"], stable=True)

    def run(inputs):
        return gradients(model, model(**inputs).logits.square().sum() * 1e-3)

    close(run({n: v[order] for n, v in inputs.items()}), run(inputs), 1e-10)


def test_one_task_adds_nothing(tiny, batch, shaken, gradients):
    inputs = batch("llama", [1, 1, 1])
    found = []
    for regularisers in (None, {"alignment": 1.0}):
        model = made(tiny, shaken, "llama", regularisers)
        found.append(gradients(model, model(**inputs).logits.square().mean()))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-12, atol=1e-14), name


def test_experts_that_differ_by_task_are_aligned_too(tiny, batch, shaken, gradients):
    """With a router the rank space is that of all experts."""
    model = made(tiny, shaken, "gpt2", {"alignment": 0.1}, router="task_table", gate="softmax", num_experts=3)
    found = gradients(model, model(**batch("gpt2", [0, 1, 2])).logits.square().mean())
    assert all(g.isfinite().all() for g in found.values())
    assert float(model.penalties.read()["alignment"][0]) > 0


def test_it_is_silent_in_evaluation_and_without_gradients(tiny, batch, shaken):
    model, inputs = made(tiny, shaken, "llama", {"alignment": 1.0}), batch("llama", [0, 1])
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs).logits.sum().backward()
    assert not model.penalties.read()


@pytest.mark.parametrize("distance", ["kl", "mmd"])
def test_distances_of_one_distribution_are_zero_and_absent_tasks_are_left_out(distance):
    z = torch.randn(6, 3, dtype=torch.float64)
    z = torch.cat([z, z, z + 2])
    weights = torch.zeros(4, 18, dtype=torch.float64)
    weights[0, :6] = weights[1, 6:12] = weights[2, 12:] = 1
    if distance == "kl":
        found, present = kl_distances(z, weights, EPS)
    else:
        found, present = mmd_distances(z, weights, BANDWIDTHS)
    assert present.tolist() == [True, True, True, False]
    assert found[0, 1].abs() < 1e-9
    assert found[0, 2] > 0.1
    assert torch.allclose(found, found.T)


def test_a_task_of_one_row_has_no_variance_and_is_left_out_of_kl(tiny, batch, shaken, gradients):
    z = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).double()
    assert kl_distances(z, weights, EPS)[1].tolist() == [True, False, True]
    assert mmd_distances(z, weights, BANDWIDTHS)[1].tolist() == [True, True, True]
    model = made(tiny, shaken, "bert", {"alignment": 1.0})  # to the pooler a sequence is one row
    gradients(model, model(**batch("bert", [2, 0, 1, 0, 2])).pooler_output.square().mean())
    assert 0 < float(model.penalties.read()["alignment"][0]) < 100


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"distance": "kl", "max_rows": 10}, "max_rows: 10 has no effect: distance is 'kl'"),
        ({"bandwidths": [1.0]}, "bandwidths: .* has no effect: distance is 'kl'"),
        ({"distance": "mmd", "eps": 1e-6}, "eps: 1e-06 has no effect: distance is 'mmd'"),
        ({"distance": "mmd", "max_rows": 1}, "max_rows: 1 must be at least 2"),
        ({"distance": "mmd", "bandwidths": []}, "bandwidths: .* must be numbers above 0"),
        ({"eps": 0.0}, "eps: 0.0 must be above 0"),
    ],
)
def test_options_of_the_other_distance_are_an_error(options, key):
    config = TaskMoEConfig.from_dict({**PLAIN, "regularisers": {"alignment": {"weight": 1.0, **options}}})
    with pytest.raises(ConfigError, match=f"moe.regularisers.alignment.{key}"):
        read_regularisers(config)


def test_mmd_looks_at_evenly_spaced_rows(tiny, batch, shaken, gradients):
    few = {"weight": 1.0, "distance": "mmd", "max_rows": 10}
    model = made(tiny, shaken, "llama", {"alignment": few})
    term = model.penalties.terms["alignment"]
    z, weights = torch.randn(25, 4), (torch.arange(25) >= 12).float()
    weights = torch.stack([1 - weights, weights])
    expected = mmd_distances(z[::3], weights[:, ::3], BANDWIDTHS)[0][0, 1]
    assert torch.equal(term.value(z, weights), expected)
