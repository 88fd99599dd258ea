"""Copies of modules as experts against a loop over deep copies: outputs, gradients, start, choice of rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.banks.module.experts import LayerExperts, ModuleExperts, PairExperts

TASKS = ["a", "b", "c"]
OFS = ("layer", "attention", "ffn")
GATES = {
    "softmax": {"gate": "softmax"},
    "sigmoid": {"gate": "sigmoid"},
    "top_k": {"gate": "top_k", "top_k": 2},
    "one_hot": {"gate": "one_hot"},
    "uniform": {"router": "none", "gate": "uniform"},
}
MIX = [2, 0, 1, 0]


def config_of(of: str, gate: str = "softmax", **options) -> TaskMoEConfig:
    return TaskMoEConfig(
        num_experts=3, bank="module", bank_options={"of": of, **options},
        **{"router_init_std": 0.5, **GATES[gate]} if gate != "uniform" else GATES[gate],
    )  # fmt: skip


def experts_of(model) -> dict[str, ModuleExperts]:
    return {n: m for n, m in model.base_model.named_modules() if isinstance(m, ModuleExperts)}


def gate_row(logits_E, gate):
    """The gates of one task: a dense row, from the formulas."""
    if gate == "uniform":
        return torch.full_like(logits_E, 1 / len(logits_E))
    if gate == "sigmoid":
        odds = 1 / (1 + (-logits_E).exp())
        return odds / (odds.sum() + 1e-12)
    soft = logits_E.exp() / logits_E.exp().sum()
    if gate == "one_hot":
        return soft + ((logits_E == logits_E.max()).to(soft.dtype) - soft).detach()
    if gate == "top_k":
        kept = logits_E >= logits_E.sort(descending=True).values[1]
        return torch.where(kept, logits_E.exp(), 0.0) / logits_E[kept].exp().sum()
    return soft


class Loop(nn.Module):
    """Deep copies of a module, run one after the other on one task's sequences and summed with its gates."""

    def __init__(self, copies):
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.gates = None

    def forward(self, *args, **kwargs):
        outs = [copied(*args, **kwargs) for copied in self.copies]
        if isinstance(outs[0], torch.Tensor):
            return sum(g * o for g, o in zip(self.gates, outs, strict=True))
        floats = [isinstance(o, torch.Tensor) for o in outs[0]]
        return tuple(
            sum(g * o[i] for g, o in zip(self.gates, outs, strict=True)) if is_float else outs[0][i]
            for i, is_float in enumerate(floats)
        )

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("copies")[0], name)


def run(loop, x):
    """With the one argument that transformers counts."""
    return loop(x)


class TwoParts(nn.Module):
    """BERT's FFN in one place."""

    def __init__(self, intermediate, output):
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x):
        return self.output(self.intermediate(x), x)


def loops(plain, model):
    """Replace in ``plain`` what ``model`` has experts for; {name: Loop} with the experts' weights."""
    found = {}
    for name, experts in experts_of(model).items():
        E = experts.stack.num_experts
        if isinstance(experts, PairExperts):
            layer = plain.get_submodule(name.rpartition(".")[0])
            whole = TwoParts(layer.intermediate, layer.output)
            copies = [copy.deepcopy(whole) for _ in range(E)]
            loop = Loop(copies)
            layer.__dict__["feed_forward_chunk"] = partial(run, loop)
        else:
            module = plain.get_submodule(name)
            copies = [copy.deepcopy(module) for _ in range(E)]
            loop = Loop(copies)
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, loop)
        with torch.no_grad():
            for e, copied in enumerate(copies):
                for n, p in copied.named_parameters():
                    p.copy_(getattr(experts.stack, experts.stack.keys[n])[e])
        found[name] = loop
    return found


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("of", OFS)
def test_outputs_and_gradients_equal_a_loop_over_deep_copies(
    kind, of, gate, tiny, batch, shaken, head, gradients, close
):
    model = shaken(attach(tiny(kind), config_of(of, gate), TASKS)).double().eval()
    plain = tiny(kind).double().eval()
    reference = loops(plain, model)
    inputs = {**batch(kind, MIX), **({} if kind == "bert" else {"use_cache": False})}
    out = head(model(**inputs))
    weights = torch.randn_like(out)
    found = gradients(model, (out * weights).sum())

    numbers = {name: model.routing.groups.index(name) for name in reference}
    logits_STE = torch.zeros(len(numbers), len(TASKS), 3, dtype=torch.float64)
    if gate != "uniform":
        logits_STE = model.routing.router.logits_STHE.detach()[:, :, 0].clone().requires_grad_()
    for i, task in enumerate(MIX):
        for name, loop in reference.items():
            loop.gates = gate_row(logits_STE[numbers[name], task], gate)
        one = {n: v[i : i + 1] for n, v in inputs.items() if n not in ("task_ids", "use_cache")}
        if kind != "bert":
            one["use_cache"] = False
        alone = head(plain(**one))
        close(out[i : i + 1], alone, 1e-12)
        (alone * weights[i : i + 1]).sum().backward()
    expected = {}
    for name, experts in experts_of(model).items():
        for n, key in experts.stack.keys.items():
            parts = [dict(c.named_parameters())[n] for c in reference[name].copies]
            whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
            expected[f"base_model.{name}.stack.{key}"] = torch.stack(whole)
    if gate != "uniform":
        expected["routing.router.logits_STHE"] = logits_STE.grad.unsqueeze(2)
    close(found, expected, 1e-12)


@pytest.mark.parametrize("of", OFS)
def test_step_0_is_the_base_to_a_millionth(kind, of, tiny, batch, head, close):
    inputs = batch(kind, MIX)
    tasks = inputs.pop("task_ids")
    model = attach(tiny(kind), config_of(of), TASKS).eval()
    with torch.no_grad():  # with gradients torch may choose another kernel of attention
        expected = head(tiny(kind).eval()(**inputs))
        close(head(model(**inputs, task_ids=tasks)), expected, 1e-6)
        with model.disable_adapter():
            assert torch.equal(head(model(**inputs)), expected)


@pytest.mark.parametrize("of", OFS)
def test_what_trains_is_the_copies_and_the_router(kind, of, tiny):
    model = attach(tiny(kind), config_of(of), TASKS)
    names = model.trainable_names()
    assert len(names) == 1 + sum(len(m.stack.keys) for m in experts_of(model).values())
    assert {n for n in names if ".stack." not in n} == {"routing.router.logits_STHE"}
    assert all(p.shape[0] == 3 and p.dtype == torch.float32
               for m in experts_of(model).values() for p in m.stack.parameters())  # fmt: skip


def test_noise_sets_the_copies_apart(tiny):
    model = attach(tiny("llama"), config_of("ffn", noise=1e-2), TASKS)
    original = dict(tiny("llama").named_parameters())["model.layers.0.mlp.up_proj.weight"]
    copies = experts_of(model)["model.layers.0.mlp"].stack.up_proj__weight_E
    assert 0.5e-2 < float((copies - original).detach().std()) < 2e-2
    assert not torch.equal(copies[0], copies[1])


class Count:
    """How many sequences each expert ran on, call by call."""

    def __init__(self, stack):
        self.rows = []
        stack.register_forward_pre_hook(self.hook)

    def hook(self, module, args):
        body, *rest = args
        seen = {}
        self.rows.append(seen)

        def counted(run, args, kwargs):
            def look(place, job, args, kwargs):
                seen[job[1]] = len(next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)))
                return run(place, job, args, kwargs)

            return body(look, args, kwargs)

        return counted, *rest


def test_a_sparse_gate_runs_an_expert_on_the_tasks_that_chose_it(tiny, batch):
    model = attach(tiny("llama"), config_of("layer", "top_k"), TASKS).eval()
    with torch.no_grad():
        logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
        model.routing.router.logits_STHE[:] = logits.unsqueeze(1)
    count = Count(experts_of(model)["model.layers.0"].stack)
    model(**batch("llama", MIX), use_cache=False)  # tasks 2, 0, 1, 0
    assert count.rows == [{0: 3, 1: 3, 2: 2}]


def test_a_one_hot_gate_runs_one_expert_where_no_gradient_asks_for_more(tiny, batch):
    model = attach(tiny("llama"), config_of("ffn", "one_hot"), TASKS).eval()
    with torch.no_grad():
        model.routing.router.logits_STHE[:, :, 0] = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0, 1.0]])
    count = Count(experts_of(model)["model.layers.1.mlp"].stack)
    inputs = {**batch("llama", MIX), "use_cache": False}
    model(**inputs)
    with torch.no_grad():
        model(**inputs)
    assert count.rows == [{0: 4, 1: 4, 2: 4}, {0: 2, 2: 2}]


def test_an_expert_nobody_chose_gets_a_gradient_of_zero(tiny, batch, head, gradients):
    model = attach(tiny("llama"), config_of("layer", "top_k"), TASKS)
    with torch.no_grad():
        model.routing.router.logits_STHE[:, :, 0] = torch.tensor([2.0, 1.0, 0.0])
    found = gradients(model, head(model(**batch("llama", MIX), use_cache=False)).square().sum())
    for name, gradient in found.items():
        if ".stack." in name:
            assert gradient[0].any(), name
            assert not gradient[2].any(), name


@pytest.mark.parametrize("of", OFS)
def test_packed_rows_route_by_position(of, tiny, shaken, close):
    """Two sequences of two tasks in one row, kept apart by their positions and the mask."""
    model = shaken(attach(tiny("llama"), config_of(of), TASKS)).double().eval()
    ids = torch.randint(4, 60, (1, 7))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    mask = torch.ones(1, 1, 7, 7).tril().double()
    mask[..., 4:, :4] = 0
    out = model(
        input_ids=ids, position_ids=positions, attention_mask=(1 - mask) * torch.finfo(torch.float64).min,
        task_ids=torch.tensor([[0, 0, 0, 0, 2, 2, 2]]), use_cache=False,
    ).logits  # fmt: skip
    for part, task in ((slice(0, 4), 0), (slice(4, 7), 2)):
        close(out[:, part], model(input_ids=ids[:, part], task_ids=[task], use_cache=False).logits, 1e-12)


def test_in_bf16_experts_stay_in_fp32_and_compute_in_bf16(tiny, batch, head, gradients):
    model = attach(tiny("llama").bfloat16(), config_of("layer"), TASKS)
    out = head(model(**batch("llama", MIX), use_cache=False))
    assert out.dtype == torch.bfloat16
    found = gradients(model, out.float().square().sum())
    assert {g.dtype for g in found.values()} == {torch.float32}


def test_layers_by_number(tiny):
    names = list(experts_of(attach(tiny("t5"), config_of("ffn", first=1), TASKS)))
    assert names == ["encoder.block.1.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"]
    names = list(experts_of(attach(tiny("llama"), config_of("layer", every=2), TASKS)))
    assert names == ["model.layers.0"]
    assert list(experts_of(attach(tiny("llama"), config_of("mlp", first=1), TASKS))) == ["model.layers.1.mlp"]


def test_layers_are_checkpointed_as_layers_are(tiny):
    model = attach(tiny("gpt2"), config_of("layer"), TASKS)
    assert all(type(m) is LayerExperts for m in experts_of(model).values())


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("of", OFS)
def test_checkpointing_changes_nothing(
    kind, of, mode, tiny, batch, shaken, head, gradients, close, checkpoint
):
    model = shaken(attach(tiny(kind), config_of(of), TASKS)).double().train()
    inputs = {**batch(kind, MIX), **({} if kind == "bert" else {"use_cache": False})}
    plain = head(model(**inputs))
    expected = gradients(model, plain.square().sum())
    out = head(checkpoint(model, mode)(**inputs))
    close(out, plain, 1e-12)
    close(gradients(model, out.square().sum()), expected, 1e-12)
    with model.disable_adapter():  # the original is under its own checkpointing too
        head(model(**inputs))


def test_copies_are_recomputed_not_kept(tiny, batch, head, checkpoint):
    model = checkpoint(attach(tiny("llama"), config_of("layer"), TASKS), "non-reentrant")
    count = Count(experts_of(model)["model.layers.0"].stack)
    out = head(model(**batch("llama", MIX), use_cache=False))
    assert len(count.rows) == 1
    out.square().sum().backward()
    assert len(count.rows) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank_options": {"of": "mpl"}}, "moe.bank_options.of: 'mpl' matches no module; the closest.*mlp"),
        ({"bank_options": {"of": "mlp("}}, "moe.bank_options.of: 'mlp\\(' is neither"),
        ({"bank_options": {"of": "model|.*mlp"}}, "matches model and model.layers.0.mlp inside it"),
        ({"bank_options": {"first": 7}}, "moe.bank_options.first: 7 .*leaves none of layers 0 to 1"),
        ({"bank_options": {"first": -1}}, "moe.bank_options.first: -1 must be at least 0"),
        ({"bank_options": {"every": 0}}, "moe.bank_options.every: 0 must be at least 1"),
        ({"bank_options": {"noise": -1.0}}, "moe.bank_options.noise: -1.0"),
        ({"bank_options": {"off": "ffn"}}, "moe.bank_options.off: unknown option"),
        ({"modules_to_save": ("input_layernorm",)}, "moe.modules_to_save: 'input_layernorm' lies inside"),
        ({"router": "token_linear"}, "moe.bank_options.of: 'layer' is each layer of the model, where tok"),
        ({"num_heads": 2, "compose": "before"}, "moe.num_heads: 2 needs bank: low_rank"),
    ],
)
def test_settings_that_cannot_be_used(settings, message, tiny):
    model = tiny("llama")
    with pytest.raises(ConfigError, match=message):
        attach(model, TaskMoEConfig(bank="module", **settings), TASKS)
    assert not any(isinstance(m, ModuleExperts) for m in model.modules())


def test_a_model_without_layers_says_so():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    with pytest.raises(ConfigError, match=r"moe\.bank_options\.of: no layer found in Tiny: it has no list"):
        attach(Tiny(), TaskMoEConfig(bank="module"), TASKS, dry_run=False)


def test_what_copies_do_is_not_recorded_silently(tiny, batch):
    inputs = batch("llama", MIX)
    with pytest.raises(ValueError, match="hidden_states of experts cannot be recorded"):
        attach(tiny("llama"), config_of("layer"), TASKS)(**inputs, output_hidden_states=True)
    with pytest.raises(ValueError, match="attentions of experts cannot be recorded"):
        attach(tiny("llama"), config_of("attention"), TASKS)(**inputs, output_attentions=True)
    out = attach(tiny("llama"), config_of("ffn"), TASKS)(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 3




def test_the_original_stands_aside_while_its_copies_train(tiny, batch, head, gradients):
    model = attach(tiny("llama"), config_of("ffn"), TASKS)
    names = model.set_trainable(("base", "experts", "router"))
    assert not [n for n in names if ".mlp.original." in n]
    assert [n for n in names if ".self_attn." in n]
    gradients(model, head(model(**batch("llama", MIX))).square().sum())  # none is missing
    assert [n for n in model.set_trainable(("base",)) if ".mlp.original." in n]


def test_copies_start_again_from_a_trained_original(tiny, shaken):
    model = shaken(attach(tiny("llama"), config_of("ffn"), TASKS))
    experts = experts_of(model)["model.layers.0.mlp"]
    with torch.no_grad():
        experts.original.up_proj.weight.add_(1.0)
    experts.refresh()
    for copied in experts.stack.up_proj__weight_E:
        assert torch.equal(copied, experts.original.up_proj.weight)
