"""Adapters against adapters written out one by one, behind the blocks of plain models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskTable, attach
from taskmoe.moe.banks.adapter import AdapterBank
from taskmoe.moe.growth import grow
from taskmoe.moe.sub_blocks import BlockOutput

NAMES = ["sort", "sum", "translate"]
GATES = {"softmax": {}, "top_k": {"top_k": 2}, "one_hot": {}}
FUNCTIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def built(shaken, model, **settings):
    config = TaskMoEConfig.from_dict(
        {"bank": "adapter", "r": 3, "num_experts": 3, "router_init_std": 0.5, **settings}
    )
    return shaken(attach(model, config, NAMES)).double().eval()


def by_hand(y, bank, e, nonlinearity):
    """What adapter e adds to y."""
    hidden = FUNCTIONS[nonlinearity](functional.linear(y, bank.down_ErN[e], bank.bias_Er[e]))
    *rows, bias = bank.up_EsN[e].unbind(0)
    return hidden @ torch.stack(rows) + bias


def written_out(plain, model, task, nonlinearity="relu"):
    """``plain`` with hooks that add the adapters of one task."""
    gates = model.routing(torch.tensor([task]))
    values, slots = gates

    def hook(bank):
        def add(module, args, y):
            row = values[bank.group, 0, 0]
            chosen = range(len(row)) if slots is None else slots[bank.group, 0, 0].tolist()
            return y + sum(g * by_hand(y, bank, e, nonlinearity) for g, e in zip(row, chosen, strict=True))

        return add

    for name, module in model.base_model.named_modules():
        if isinstance(module, BlockOutput):
            plain.get_submodule(name).register_forward_hook(hook(module.bank))
    return plain


@pytest.mark.parametrize("gate", GATES)
def test_equals_adapters_behind_a_plain_model(kind, gate, tiny, batch, shaken, head, gradients, close):
    model = built(shaken, tiny(kind), gate=gate, **GATES[gate])
    inputs = batch(kind, [2, 0, 1])
    out = head(model(**inputs))
    weights = torch.randn(out.shape, dtype=torch.float64)
    found = gradients(model, (out * weights).sum())
    expected = []
    for i, task in enumerate(inputs.pop("task_ids").tolist()):
        plain = written_out(tiny(kind).double().eval(), model, task)
        expected.append(head(plain(**{n: v[i : i + 1] for n, v in inputs.items()})))
    expected = torch.cat(expected)
    close(out, expected, 1e-12)
    close(found, gradients(model, (expected * weights).sum()), 1e-12)


@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
def test_nonlinearities(nonlinearity, tiny, batch, shaken, head, close):
    options = {"nonlinearity": nonlinearity, "behind": "ffn"}
    model = built(shaken, tiny("llama"), bank_options=options)
    inputs = batch("llama", [1, 1])
    out = head(model(**inputs))
    del inputs["task_ids"]
    close(out, head(written_out(tiny("llama").double(), model, 1, nonlinearity)(**inputs)), 1e-12)


def test_one_expert_a_task_is_independent_adapters(tiny, batch, shaken, head, gradients):
    model = built(shaken, tiny("llama"), gate="one_hot")
    with torch.no_grad():
        model.routing.router.logits_STHE.copy_(torch.eye(3)[None, :, None].expand(4, -1, -1, -1))
    grads = gradients(model, head(model(**batch("llama", [1, 1]))).square().sum())
    for name, grad in grads.items():
        if ".bank." in name:
            assert grad[1].any() and not grad[0].any() and not grad[2].any(), name


def test_what_trains_and_what_is_added(tiny):
    model = attach(tiny("llama"), TaskMoEConfig(bank="adapter", r=3, num_experts=2), NAMES)
    groups = model.trainable_groups()
    leaves = {n.rpartition("_proj.")[2] for n, _ in groups["experts"]}
    assert leaves == {"bank.down_ErN", "bank.bias_Er", "bank.up_EsN"} and not groups["base"]
    banks = [m for m in model.modules() if isinstance(m, AdapterBank)]
    assert [b.group for b in banks] == [0, 1, 2, 3]
    assert all(b.down_ErN.shape == (2, 3, 16) and b.up_EsN.shape == (2, 4, 16) for b in banks)


def test_generation_runs_behind_every_beam(tiny, batch, shaken):
    model = built(shaken, tiny("llama"))
    inputs = batch("llama", [2, 0])
    together = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    for i in range(2):
        alone = model.generate(**{n: v[i : i + 1] for n, v in inputs.items()}, num_beams=3, max_new_tokens=4)
        assert torch.equal(alone[0], together[i, : alone.shape[1]])


def test_wrong_settings_are_errors(tiny):
    with pytest.raises(ConfigError, match=r"moe.bank_options.nonlinearity: 'tanh' is unknown; known are"):
        attach(tiny("llama"), TaskMoEConfig(bank="adapter", bank_options={"nonlinearity": "tanh"}), NAMES)
    with pytest.raises(ConfigError, match=r"moe.bank_options.behind: 'mlp' is unknown; known are both, att"):
        attach(tiny("llama"), TaskMoEConfig(bank="adapter", bank_options={"behind": "mlp"}), NAMES)
    with pytest.raises(ConfigError, match=r"moe.bank_options.behnd: unknown option .* 'behind'"):
        attach(tiny("llama"), TaskMoEConfig(bank="adapter", bank_options={"behnd": "ffn"}), NAMES)


@pytest.mark.parametrize("bank", ["adapter", "generated", "fusion"])
def test_beside_a_base_in_bf16_the_adapters_stay_fp32(bank, tiny, batch, shaken, head, gradients):
    model = shaken(attach(tiny("llama"), TaskMoEConfig(bank=bank, r=3, num_experts=3), NAMES)).eval()
    inputs = batch("llama", [2, 0, 1, 0])
    expected = head(model(**inputs))
    grads = gradients(model, expected.square().mean())
    for _, p in model.parameter_groups()["base"]:
        p.data = p.data.bfloat16()
    found = head(model(**inputs))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    rounded = gradients(model, found.float().square().mean())
    for name, grad in rounded.items():
        assert grad.dtype == torch.float32, name
    off = torch.cat([(rounded[n] - g).flatten() for n, g in grads.items()])
    assert off.norm() < 0.2 * torch.cat([g.flatten() for g in grads.values()]).norm()


def test_a_library_of_adapters_grows(tiny, batch, shaken, head, close, tmp_path):
    experts = {name: i for i, name in enumerate(NAMES)}
    settings = {"router": "fixed", "gate": "raw", "router_init_std": 1e-3}
    model = built(shaken, tiny("llama"), router_options={"experts": experts}, **settings).float()
    model.save_pretrained(tmp_path)
    table = TaskTable.from_names([*NAMES, "copy"])
    grown = grow(tiny("llama"), tmp_path, 4, table, router_options={"experts": {**experts, "copy": 3}}).eval()
    inputs = batch("llama", [2, 0, 1])
    close(head(grown(**inputs)), head(model(**inputs)))
    new = batch("llama", [3])
    with grown.disable_adapter():
        base = head(grown(**new))
    assert torch.equal(head(grown(**new)), base)  # an adapter of its own, at its start
