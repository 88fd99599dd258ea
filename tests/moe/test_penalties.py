"""Terms that join the loss inside a layer: once, in the gradient alone, under both kinds of checkpointing."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.moe.context import Context
from taskmoe.moe.penalties import penalise, rows_of

TASKS = ["a", "b", "c"]
TERMS = {"token_z_loss": 0.3, "token_balance": 0.2}


def made(tiny, shaken, kind="llama", **settings):
    chosen = {"r": 2, "num_experts": 3, "router": "token_linear", "gate": "top_k", "top_k": 2, **settings}
    return shaken(attach(tiny(kind), TaskMoEConfig.from_dict(chosen), TASKS)).double().train()


def test_the_identity_adds_the_gradient_of_the_value():
    x, seen = torch.randn(3, 2, requires_grad=True), []
    value = x.square().sum()
    out = penalise(x, value, 0.5, seen.append)
    assert torch.equal(out, x) and not seen
    out.sum().backward()
    assert torch.allclose(x.grad, 1 + x.detach())
    assert [float(v) for v in seen] == [float(value.detach())]


def dense(model, inputs):
    """The mean over layers of each term, from what every layer reads."""
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for m in model.modules()
        if hasattr(m, "token_routing")
    ]
    loss = model(**inputs).logits.square().mean()
    for hook in hooks:
        hook.remove()
    real = inputs["attention_mask"].flatten().bool()
    total = 0.0
    for layer, x in seen:
        weight = layer.token_routing.router.weight_E1K[:, 0]
        logits = (x.flatten(0, 1) @ weight.T)[real]
        total = total + 0.3 * logits.logsumexp(-1).square().mean()
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(2).indices, 1.0)
        load = chosen.sum(0) / chosen.sum()
        total = total + 0.2 * 3 * (load * logits.softmax(-1).mean(0)).sum()
    return loss, total / len(seen)


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
def test_gradients_are_the_dense_ones(mode, tiny, batch, shaken, gradients, close, checkpoint):
    inputs = {**batch("llama", [2, 0, 1, 0]), "use_cache": False}
    inputs["attention_mask"][1, 5:] = 0
    plain = made(tiny, shaken)
    loss, value = dense(plain, inputs)
    expected = gradients(plain, loss + value)
    without = gradients(plain, plain(**inputs).logits.square().mean())
    routers = [n for n in expected if "router" in n]
    assert max(float((expected[n] - without[n]).abs().max()) for n in routers) > 1e-3

    model = checkpoint(made(tiny, shaken, regularisers=TERMS), mode)
    ours = model(**inputs).logits.square().mean()
    close(ours, loss, 1e-12)
    close(gradients(model, ours), expected, 1e-9)
    seen = model.penalties.read()
    assert seen.keys() == TERMS.keys() and all(n == pytest.approx(1) for _, n in seen.values())
    mean = sum(TERMS[k] * float(total) / n for k, (total, n) in seen.items())
    assert mean == pytest.approx(value.item(), rel=1e-9)


def test_micro_batches_add_up_to_their_mean(tiny, batch, shaken, gradients, close):
    """The term alone: of a loss of zero gradient."""
    parts = [batch("llama", [0, 1], seed=s) for s in (1, 2)]
    model = made(tiny, shaken, regularisers=TERMS)
    one_by_one = [gradients(model, 0 * model(**p).logits.sum()) for p in parts]
    expected = {n: (one_by_one[0][n] + one_by_one[1][n]) / 2 for n in one_by_one[0]}
    model.penalties.scale = 0.5
    for p in parts:
        (0 * model(**p).logits.sum()).backward()
    close(gradients(model), expected, 1e-12)


def test_the_controls_and_the_base_have_no_terms(tiny, batch, shaken):
    model, inputs = made(tiny, shaken, regularisers=TERMS), batch("llama", [0, 1])
    with model.uniform_gates():
        model(**inputs).logits.sum().backward()
    with model.disable_adapter():
        model(**inputs)
    assert not model.penalties.read()


def test_rows_of_packed_batches_are_runs_of_one_task():
    context = Context([[0, 0, 1, 1], [1, 1, 0, 0]])
    rows = rows_of(context, context.plan((2, 4), "x"), "x", torch.ones(()))
    assert rows.sequences == 3 and rows.sequences_M.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert rows.tasks_M.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_mask_is_of_the_encoder_where_there_is_one():
    context = Context([0, 1])
    context.mask, context.mask_part = torch.tensor([[1, 1, 0], [1, 0, 0]]), "encoder"
    plan = context.plan((2, 3), "x")

    def weights(plan, name):
        return rows_of(context, plan, name, torch.ones(())).weights_M.tolist()

    assert weights(plan, "encoder.block.0.q") == [1, 1, 0, 1, 0, 0]
    assert weights(plan, "decoder.block.0.q") == [1] * 6
    assert weights(context.plan((2, 4), "x"), "encoder.block.0.q") == [1] * 8
