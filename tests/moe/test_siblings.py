"""Linears that read the same rows share a pass over them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskmoe.kernels import low_rank as low_rank_module
from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.moe import siblings as siblings_module
from taskmoe.moe.layer import MoELinear

METHODS = {
    "softmax": {},
    "top_k": {"gate": "top_k", "top_k": 2},
    "before": {"compose": "before"},
    "heads": {"compose": "before", "num_heads": 2},
    "layer": {"router_scope": "layer", "lora_alpha": 3.0},
}
FAMILIES = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
    "gpt2": [],
    "bert": [["query", "key", "value"]],
    # In the decoder's cross-attention the queries read other rows than keys and values.
    "t5": [["q", "k", "v"], ["wi_0", "wi_1"], ["k", "v"]],
}


def families(model: nn.Module) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for module in model.modules():
        if isinstance(module, MoELinear) and module.siblings is not None:
            found.setdefault(id(module.siblings), []).append(module.name.rpartition(".")[2])
    unique: list[list[str]] = []
    for names in found.values():
        if names not in unique:
            unique.append(names)
    return unique


def apart(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, MoELinear):
            module.siblings = None
    return model


@pytest.fixture
def shrinks(monkeypatch) -> list[int]:
    """How many linears each shared pass served."""
    seen: list[int] = []
    real = siblings_module.shrink

    def count(x, banks, slots, plan):
        seen.append(len(banks))
        return real(x, banks, slots, plan)

    monkeypatch.setattr(siblings_module, "shrink", count)
    return seen


def test_families_are_found_in_the_dry_run(kind, routed) -> None:
    assert families(routed(kind)) == FAMILIES[kind]


def test_other_ranks_or_one_target_alone_are_no_family(routed) -> None:
    assert families(routed("llama", rank_pattern={"k_proj": 3})) == [["gate_proj", "up_proj"]]
    assert families(routed("llama", target_modules=["q_proj", "down_proj"])) == []


@pytest.mark.parametrize("method", METHODS)
def test_together_as_apart(kind, method, routed, batch, gradients, close, reading, shrinks) -> None:
    model, inputs = routed(kind, **METHODS[method]).double(), batch(kind, [2, 0, 1, 0])
    out, loss = reading(model, inputs)
    together = gradients(model, loss)
    served = {"llama": [3, 2] * 2, "gpt2": [], "bert": [3] * 2, "t5": [3, 2] * 4}[kind]
    # (T5's decoder has 20 rows: few enough for gate and up to stay apart.)
    assert sorted(shrinks) == sorted(served)
    out_apart, loss_apart = reading(apart(model), inputs)
    assert len(shrinks) == len(served)
    close(out, out_apart, 1e-12)
    close(together, gradients(model, loss_apart), 1e-12)


def test_generation_with_a_cache_and_beams(kind, routed, batch, shrinks) -> None:
    if kind == "bert":
        pytest.skip("an encoder generates nothing")
    model, inputs = routed(kind), batch(kind, [2, 0, 1])
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = model.generate(**inputs, **options)
    assert torch.equal(together, apart(model).generate(**inputs, **options))


def test_rows_that_only_look_the_same_are_not_shared(routed, shrinks) -> None:
    model = routed("llama")
    attention = model.base_model.model.layers[0].self_attn
    context, x = model.context([0, 1]), torch.randn(2, 10, 16)
    from taskmoe.moe.context import use

    with torch.no_grad(), use(context):
        first = [linear(x) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert shrinks == [3] and not context.shared
        again = [linear(x.clone()) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert shrinks == [3, 3, 3, 3]
        # Called twice with the same rows: the second time nothing is waiting.
        twice = [linear(x) for linear in (attention.q_proj, attention.q_proj)]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(twice[0], twice[1])


def test_sharing_must_be_worth_it(routed, batch, shrinks, monkeypatch) -> None:
    model = routed("llama")
    # q, k and v have 18 columns of experts side by side, gate and up 12.
    model(**batch("llama", [0], length=18))
    assert shrinks == []
    model(**batch("llama", [0], length=19))
    assert shrinks == [3] * 2
    monkeypatch.setattr(siblings_module, "SMALL", 30 * 16 + 1)
    model(**batch("llama", [0], length=30))
    assert shrinks == [3] * 2
    monkeypatch.setattr(siblings_module, "SMALL", 30 * 16)
    model(**batch("llama", [0], length=30))
    assert shrinks == [3] * 2 + [3, 2] * 2


def test_dropout_gives_each_linear_its_own_rows(routed, batch, shrinks) -> None:
    model, inputs = routed("llama", lora_dropout=0.5), batch("llama", [0, 1], length=20)
    model.train()
    model(**inputs)
    assert shrinks == []
    model.eval()
    model(**inputs)
    assert shrinks == [3, 2] * 2


def test_under_autocast_each_works_alone(routed, batch, shrinks, head) -> None:
    model, inputs = routed("llama"), batch("llama", [0, 1], length=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(model(**inputs))
        assert shrinks == []
        assert torch.equal(out, head(apart(model)(**inputs)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("families", [True, False])
def test_experts_first_is_the_sum(
    method, families, routed, batch, gradients, close, reading, monkeypatch
) -> None:
    """As on a GPU: the experts write, the frozen product is accumulated onto them; biases and none."""
    used: list[int] = []
    real = torch.Tensor.addmm_

    def count(self, *args):
        used.append(1)
        return real(self, *args)

    for kind in ("llama", "bert"):
        model, inputs = routed(kind, **METHODS[method]).double(), batch(kind, [2, 0, 1, 0])
        if not families:
            apart(model)
        out, loss = reading(model, inputs)
        plain = gradients(model, loss)
        with monkeypatch.context() as patch:
            patch.setattr(MoELinear, "experts_first", True)
            patch.setattr(torch.Tensor, "addmm_", count)
            first, loss = reading(model, inputs)
            found = gradients(model, loss)
        assert used
        close(first, out, 1e-12)
        close(found, plain, 1e-12)


def test_experts_first_only_beside_a_plain_frozen_linear(routed, batch, monkeypatch) -> None:
    monkeypatch.setattr(MoELinear, "experts_first", True)
    model = routed("llama")
    linear = next(m for m in model.modules() if isinstance(m, MoELinear))
    x = torch.randn(2, 3, 16)
    assert linear._experts_first(x)
    assert not linear._experts_first(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear._experts_first(x)
    handle = linear.base.register_forward_hook(lambda *_: None)
    assert not linear._experts_first(x)
    handle.remove()
    linear.base.weight.requires_grad_(True)
    assert not linear._experts_first(x)
    linear.base.weight.requires_grad_(False)
    linear.base.weight.ds_id = 0
    assert not linear._experts_first(x)
    del linear.base.weight.ds_id
    assert linear._experts_first(x)
    linear.base.forward = lambda x: x  # as accelerate's offloading does
    assert not linear._experts_first(x)
    del linear.base.forward
    linear.base.bias = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16), requires_grad=False)
    assert not linear._experts_first(x)
    assert not any(m._experts_first(x) for m in routed("gpt2").modules() if isinstance(m, MoELinear)), (
        "GPT-2's Conv1D is no nn.Linear"
    )


def test_step_zero_with_experts_first_is_the_base(tiny, batch, head, monkeypatch) -> None:
    monkeypatch.setattr(MoELinear, "experts_first", True)
    inputs = batch("llama", [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(tiny("llama").eval().requires_grad_(False)(**inputs))
    model = attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=3), 3).eval()
    assert (head(model(**inputs, task_ids=tasks)) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_accumulating_linear_has_the_gradients_of_a_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    out, x = (torch.randn(5, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o, x: low_rank_module.add_linear_(o * 1, x, weight), (out, x))
    torch.testing.assert_close(low_rank_module.add_linear_(out * 1, x, weight), out + x @ weight.t())
