"""FFN experts by token (Gupta et al. 2022, JiuZhang 2.0), against every expert on every token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskmoe.moe import ConfigError, RowSpaceError, TaskMoEConfig, attach
from taskmoe.moe.banks.module.experts import ModuleExperts, PairExperts
from taskmoe.moe.context import use

TASKS = ["a", "b", "c"]
MIX = [2, 0, 1, 0]
GATES = {"softmax": {}, "top_k": {"top_k": 2}, "one_hot": {}}


def config_of(gate, **settings):
    options = {"bank": "module", "bank_options": {"of": "ffn"}, "router": "token_linear"}
    return TaskMoEConfig(**{"num_experts": 4, "gate": gate, **GATES[gate], **options, **settings})


def experts_of(model):
    return {n: m for n, m in model.base_model.named_modules() if isinstance(m, ModuleExperts)}


class Dense(nn.Module):
    """Every expert on every token, one token's gates at a time: written out with the weights' own names."""

    def __init__(self, experts, gate, modules):
        super().__init__()
        self.gate = gate
        self.router = nn.Parameter(experts.routing.router.weight_E1K.detach().squeeze(1).clone())
        self.copies = nn.ModuleList(modules)
        with torch.no_grad():
            for e, copied in enumerate(self.copies):
                for n, p in copied.named_parameters():
                    p.copy_(getattr(experts.stack, experts.stack.keys[n])[e])

    def forward(self, x, *residual):
        logits = x @ self.router.T
        soft = logits.softmax(-1)
        if self.gate == "softmax":
            gates = soft
        elif self.gate == "one_hot":
            hard = (logits == logits.amax(-1, keepdim=True)).to(soft.dtype)
            gates = hard + soft - soft.detach()
        else:
            kept = logits >= logits.sort(-1, descending=True).values[..., 1:2]
            gates = torch.where(kept, logits.exp(), 0.0) / torch.where(kept, logits.exp(), 0.0).sum(-1, True)
        return sum(gates[..., e, None] * copied(x, *residual) for e, copied in enumerate(self.copies))


class TwoParts(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, x, residual):
        return self.output(self.intermediate(x), residual)


def dense_of(kind, build, model, gate):
    """{name: Dense} put into a fresh model, and that model."""
    plain, found = build(kind).double().eval(), {}
    for name, experts in experts_of(model).items():
        parent, _, leaf = name.rpartition(".")
        fresh = [build(kind).double().eval() for _ in range(4)]
        if isinstance(experts, PairExperts):
            dense = Dense(experts, gate, [TwoParts(m.get_submodule(parent)) for m in fresh])
            plain.get_submodule(parent).intermediate = nn.Identity()
        else:
            dense = Dense(experts, gate, [m.get_submodule(name) for m in fresh])
        setattr(plain.get_submodule(parent), leaf, dense)
        found[name] = dense
    return found, plain


@pytest.mark.parametrize("gate", GATES)
def test_outputs_and_gradients_equal_every_expert_on_every_token(
    kind, gate, tiny, batch, shaken, head, gradients, close
):
    model = shaken(attach(tiny(kind), config_of(gate), TASKS)).double().eval()
    dense, plain = dense_of(kind, tiny, model, gate)
    inputs = batch(kind, MIX)
    out = head(model(**inputs))
    weights = torch.randn_like(out)
    found = gradients(model, (out * weights).sum())
    inputs.pop("task_ids")
    expected_out = head(plain(**inputs))
    close(out, expected_out, 1e-12)
    (expected_out * weights).sum().backward()
    expected = {}
    for name, experts in experts_of(model).items():
        for n, key in experts.stack.keys.items():
            parts = [dict(c.named_parameters())[n] for c in dense[name].copies]
            whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
            expected[f"base_model.{name}.stack.{key}"] = torch.stack(whole)
        expected[f"base_model.{name}.routing.router.weight_E1K"] = dense[name].router.grad.unsqueeze(1)
    close(found, expected, 1e-12)


def test_step_0_is_the_base_to_a_millionth(kind, tiny, batch, head, close):
    inputs = batch(kind, MIX)
    model = attach(tiny(kind), config_of("top_k"), TASKS).eval()
    with torch.no_grad():
        found = head(model(**inputs))
        inputs.pop("task_ids")
        close(found, head(tiny(kind).eval()(**inputs)), 1e-6)


def test_experts_run_on_the_tokens_that_chose_them(tiny, batch):
    model = attach(tiny("llama"), config_of("top_k"), TASKS).eval()
    seen = []
    stack = experts_of(model)["model.layers.0.mlp"].stack

    def count(module, args):
        body, *rest = args
        found = {}
        seen.append(found)

        def counted(run, args, kwargs):
            def look(place, job, args, kwargs):
                found[job[1]] = args[0].shape[1]
                return run(place, job, args, kwargs)

            return body(look, args, kwargs)

        return counted, *rest

    stack.register_forward_pre_hook(count)
    model(**batch("llama", MIX))
    assert sum(seen[0].values()) == 2 * 4 * 9
    assert max(seen[0].values()) < 4 * 9


def test_an_expert_no_token_chose_gets_a_gradient_of_zero(tiny, batch, head, gradients):
    model = attach(tiny("llama"), config_of("top_k"), TASKS)
    with torch.no_grad():
        for experts in experts_of(model).values():
            experts.routing.router.weight_E1K.zero_()  # equal logits: the first two by order
    found = gradients(model, head(model(**batch("llama", MIX))).square().sum())
    for name, gradient in found.items():
        if ".stack." in name:
            assert sum(bool(g.any()) for g in gradient) == 2, name


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("gate", GATES)
def test_checkpointing_changes_nothing(
    kind, gate, mode, tiny, batch, shaken, head, gradients, close, checkpoint
):
    model = shaken(attach(tiny(kind), config_of(gate), TASKS)).double().train()
    inputs = {**batch(kind, MIX), **({} if kind == "bert" else {"use_cache": False})}
    plain = head(model(**inputs))
    expected = gradients(model, plain.square().sum())
    out = head(checkpoint(model, mode)(**inputs))
    close(out, plain, 1e-12)
    close(gradients(model, out.square().sum()), expected, 1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache(beams, tiny, batch, shaken):
    model = shaken(attach(tiny("llama"), config_of("top_k"), TASKS)).double().eval()
    settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": beams}
    inputs = batch("llama", MIX)
    found = model.generate(**inputs, **settings)
    assert torch.equal(found, model.generate(**inputs, use_cache=False, **settings))


def test_modules_in_which_tokens_see_each_other_are_refused(tiny):
    config = config_of("softmax", bank_options={"of": r"model\.layers\.0\.self_attn"})
    with pytest.raises(ConfigError, match=r"is model\.layers\.0\.self_attn, where tokens see each other"):
        attach(tiny("llama"), config, TASKS)


class Wrong(nn.Module):
    """A module of two linears that forgets a row, or takes a mask beside its rows."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 16)
        self.forget = True

    def forward(self, x, mask=None):
        y = self.down(self.up(x))
        return y[:, 1:] if self.forget else y if mask is None else y * mask.mean()


def test_modules_that_do_not_keep_to_their_tokens_are_refused(tiny, batch):
    inputs = batch("llama", MIX)
    for changes, message in ((True, "for 36 rows it returns"), (False, "it takes a tensor")):
        base = tiny("llama")
        base.model.layers[1].mlp = Wrong()
        config = config_of("softmax", bank_options={"of": "ffn", "first": 1})
        model = attach(base, config, TASKS, dry_run=False)
        experts = experts_of(model)["model.layers.1.mlp"]
        experts.stack._shells[0].forget = changes
        with pytest.raises(RowSpaceError, match=message):
            if changes:
                model(**inputs)
            else:
                with use(model.context(MIX)):
                    experts(torch.randn(4, 9, 16), torch.ones(4, 9, 9, 1))
