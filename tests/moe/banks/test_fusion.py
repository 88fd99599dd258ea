"""AdapterFusion against the attention written out over every adapter's output, behind plain models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, TaskTable, attach
from taskmoe.moe.banks.fusion import FusedAdapters, identity_penalty
from taskmoe.moe.growth import grow
from taskmoe.moe.sub_blocks import BlockOutput

NAMES = ["sort", "sum", "translate"]
EXPERTS, ATTENTION = ("experts",), ("router",)


def built(model, options=None, **settings):
    table = {"gate": "one_hot", "router_init_std": 0.5}
    config = TaskMoEConfig(bank="fusion", r=3, num_experts=3, bank_options=options, **table, **settings)
    return attach(model, config, NAMES)


def outputs(y, bank):
    """What each adapter gives without its residual, [E, ..., N]."""
    given = []
    for down, bias, up in zip(bank.down_ErN, bank.bias_Er, bank.up_EsN, strict=True):
        given.append(functional.linear(y, down, bias).clamp(min=0) @ up[:-1] + up[-1])
    return torch.stack(given)


def attended(y, fused, task, temperature, per_task):
    attention = fused.attention
    names = ("query", "key", "value")
    if per_task:
        q, k, v = (getattr(attention, f"{n}_TNN")[task] for n in names)
    else:
        q, k, v = (getattr(attention, f"{n}_NN") for n in names)
    z = outputs(y, fused.adapters)
    scores = torch.stack([((y @ q.T) * (z_e @ k.T)).sum(-1) for z_e in z]) / temperature
    weights = scores.exp() / scores.exp().sum(0)
    return y + sum(w[..., None] * (z_e @ v.T) for w, z_e in zip(weights, z, strict=True))


def written_out(plain, model, change):
    for name, module in model.base_model.named_modules():
        if isinstance(module, BlockOutput):
            hook = lambda _, args, y, fused=module.bank: change(y, fused)  # noqa: E731
            plain.get_submodule(name).register_forward_hook(hook)
    return plain


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("behind", ["ffn", "both"])
def test_equals_attention_over_every_output(
    per_task, behind, kind, tiny, batch, shaken, head, gradients, close
):
    model = shaken(built(tiny(kind), {"per_task": per_task, "behind": behind}, router_temperature=2.0))
    model.double().eval()
    inputs = batch(kind, [2, 0, 1])
    out = head(model(**inputs))
    weights = torch.randn(out.shape, dtype=torch.float64)
    found = gradients(model, (out * weights).sum())
    expected = []
    for i, task in enumerate(inputs.pop("task_ids").tolist()):
        change = lambda y, fused, t=task: attended(y, fused, t, 2.0, per_task)  # noqa: E731
        plain = written_out(tiny(kind).double().eval(), model, change)
        expected.append(head(plain(**{n: v[i : i + 1] for n, v in inputs.items()})))
    expected = torch.cat(expected)
    close(out, expected, 1e-12)
    (expected * weights).sum().backward()
    table = model.routing.router.logits_STHE  # the attention reads no gates
    assert not found["routing.router.logits_STHE"].any() and table.grad is None
    table.grad = torch.zeros_like(table)
    close(found, gradients(model), 1e-12)


def test_first_adapters_alone_then_the_attention(tiny, batch, shaken, head, close):
    model, inputs = shaken(built(tiny("llama"))).double().eval(), batch("llama", [1, 2])
    fused = head(model(**inputs))
    model.set_trainable(EXPERTS)
    alone = head(model(**inputs))
    with torch.no_grad():
        assert torch.equal(head(model(**inputs)), alone)  # evaluation in the phase is of the same model
    tasks = inputs.pop("task_ids").tolist()
    for i, task in enumerate(tasks):
        chosen = model.routing.router.logits_STHE[:, task, 0].argmax(-1).tolist()
        change = lambda y, f, c=chosen: y + outputs(y, f.adapters)[c[f.adapters.group]]  # noqa: E731
        plain = written_out(tiny("llama").double().eval(), model, change)
        close(alone[i : i + 1], head(plain(**{n: v[i : i + 1] for n, v in inputs.items()})), 1e-12)
    for groups in (ATTENTION, (), EXPERTS + ATTENTION):
        model.set_trainable(groups)
        assert torch.equal(head(model(**inputs, task_ids=tasks)), fused)


def test_each_phase_trains_what_it_names(tiny, batch, head):
    model = built(tiny("llama"))
    parts = {"experts": "bank.adapters.", "router": "bank.attention."}
    for group, part in parts.items():
        names = [n for n in model.set_trainable([group]) if not n.startswith("routing.")]
        assert names and all(part in n for n in names)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(3):
            optimizer.zero_grad()
            head(model(**batch("llama", [0, 1, 2], seed=step))).square().mean().backward()
            optimizer.step()
        for name, p in model.named_parameters():
            assert p.requires_grad == (p.grad is not None), name
        assert all(model.get_parameter(n).grad.any() for n in names if group == "router")
        model.zero_grad()


def test_the_start_of_each_phase(tiny, batch, shaken, head, close):
    inputs = batch("llama", [2, 0])
    model = built(tiny("llama"))
    with model.disable_adapter():
        base = head(model(**inputs))
    assert torch.equal(head(model(**inputs)), base)  # nothing to attend to
    model.set_trainable(EXPERTS)
    assert torch.equal(head(model(**inputs)), base)
    # The attention starts at what the values leave unchanged: nearly the average of the adapters.
    attention = next(m for m in model.modules() if isinstance(m, FusedAdapters)).attention
    off = attention.value_NN - torch.eye(16)
    assert torch.allclose(off, 1e-6 * (1 - torch.eye(16)), atol=1e-9)
    for module in model.modules():
        if isinstance(module, FusedAdapters):
            torch.nn.init.normal_(module.adapters.up_EsN, std=0.1)
    model.set_trainable(ATTENTION)
    fused = head(model(**inputs))
    with model.uniform_gates():
        average = head(model(**inputs))
    assert not torch.equal(fused, average)
    close(fused - base, average - base, 0.05)


def test_the_average_is_the_control(tiny, batch, shaken, head, close):
    model, inputs = shaken(built(tiny("llama"))).double().eval(), batch("llama", [1])
    with model.uniform_gates():
        out = head(model(**inputs))
    del inputs["task_ids"]

    def change(y, fused):
        return y + outputs(y, fused.adapters).mean(0) @ fused.attention.value_NN.T

    close(out, head(written_out(tiny("llama").double().eval(), model, change)(**inputs)), 1e-12)


def test_new_tasks_get_an_attention_of_their_own(tiny, shaken, tmp_path):
    model = shaken(built(tiny("llama"), {"per_task": True}))
    model.save_pretrained(tmp_path)
    grown = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path, TaskTable.from_names([*NAMES, "copy"]))
    name = "base_model.model.layers.0.mlp.down_proj.bank.attention.value_TNN"
    new, old = grown.get_parameter(name), model.get_parameter(name)
    assert new.shape == (4, 16, 16) and torch.equal(new[:3], old)
    assert torch.allclose(new[3], old.mean(0))


def test_the_penalty():
    values = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    penalty = identity_penalty(values)
    assert penalty.item() == (4 + 9 + 1) / 2
    penalty.backward()
    assert torch.equal(values.grad, values.detach() - torch.eye(2))  # 2 (Wv - I) / 2 matrices


def test_dropout_is_of_the_weights_and_in_training_only(tiny, batch, shaken, head):
    model, inputs = shaken(built(tiny("llama"), {"dropout": 0.5})), batch("llama", [1, 2])
    model.train()
    assert not torch.equal(head(model(**inputs)), head(model(**inputs)))
    model.eval()
    assert torch.equal(head(model(**inputs)), head(model(**inputs)))
    with pytest.raises(ConfigError, match=r"moe.bank_options.dropout: 1.0 must be in \[0, 1\)"):
        built(tiny("llama"), {"dropout": 1.0})


def test_a_library_under_an_attention_does_not_grow(tiny, tmp_path):
    model = built(tiny("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"moe.bank: 'fusion' weighs all experts in .*attention"):
        grow(tiny("llama"), tmp_path, 4)
    assert len(grow(tiny("llama"), tmp_path, 3, TaskTable.from_names([*NAMES, "copy"])).tasks) == 4
