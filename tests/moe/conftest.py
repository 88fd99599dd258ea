"""Tiny models of four architectures, their inputs, and the dense models to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from taskmoe.moe import TaskMoEConfig, attach, siblings
from taskmoe.moe.layer import MoELinear

VOCAB = 61


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        llama = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                            eos_token_id=2)  # fmt: skip
        return LlamaForCausalLM(llama)
    if kind == "gpt2":
        gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
                          bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0,
                          attn_pdrop=0)  # fmt: skip
        return GPT2LMHeadModel(gpt2)
    if kind == "t5":
        t5 = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2,
                      num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
                      feed_forward_proj="gated-gelu")  # fmt: skip
        return T5ForConditionalGeneration(t5)
    if kind == "bert":
        bert = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=24, hidden_dropout_prob=0.0,
                          attention_probs_dropout_prob=0.0)  # fmt: skip
        return BertModel(bert)
    raise ValueError(kind)


@pytest.fixture(autouse=True)
def siblings_share_small_batches_too(monkeypatch):
    """A CPU leaves small batches alone; here they are all small."""
    monkeypatch.setattr(siblings, "SMALL", 0)


@pytest.fixture(scope="session")
def tiny():
    """kind -> a fresh tiny model with seed 0."""
    return build


@pytest.fixture(scope="session")
def batch():
    """kind, task list, seed -> inputs for one sequence per task, decoder length unlike encoder length."""

    def make(kind, tasks, length=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, VOCAB, (len(tasks), length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": torch.tensor(tasks)}
        if kind == "t5":
            inputs["decoder_input_ids"] = torch.randint(4, VOCAB, (len(tasks), 5), generator=generator)
        return inputs

    return make


@pytest.fixture(scope="session")
def shaken():
    """Give every adapter tensor of a model seeded values of ordinary size (B is zero at the start)."""

    def shake(model, seed=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for group, parameters in model.parameter_groups().items():
                if group != "base":
                    for _, p in parameters:
                        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
        return model

    return shake


@pytest.fixture(params=("llama", "gpt2", "t5", "bert"))
def kind(request):
    """Runs a test once an architecture."""
    return request.param


@pytest.fixture(scope="session")
def routed(shaken):
    """kind, settings -> a tiny model with experts of ordinary size for three tasks, in evaluation mode."""

    def make(kind, **settings):
        config = TaskMoEConfig.from_dict({"r": 2, "num_experts": 3, "router_init_std": 0.5, **settings})
        return shaken(attach(build(kind), config, ["sort", "sum", "translate"])).eval()

    return make


@pytest.fixture(scope="session")
def reading(head):
    """model, inputs -> (what it reads, a loss that weighs every number of it differently)."""

    def read(model, inputs):
        out = head(model(**inputs))
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        return out, (out * weights).sum()

    return read


@pytest.fixture(scope="session")
def head():
    """What a loss reads: the logits, or the hidden states and the pooler's output."""

    def read(output) -> Tensor:
        if hasattr(output, "logits"):
            return output.logits
        return torch.cat([output.last_hidden_state, output.pooler_output.unsqueeze(1)], dim=1)

    return read


@pytest.fixture(scope="session")
def adapters():
    """A model's trainable tensors by name."""
    return lambda model: {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def gradients():
    """Back-propagate ``loss``; {name: gradient} of all that trains, cleared from the model."""

    def collect(model, loss=None):
        if loss is not None:
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        missing = [n for n, g in found.items() if g is None]
        assert not missing, f"no gradient: {missing}"
        for p in model.parameters():
            p.grad = None
        return found

    return collect


@pytest.fixture(scope="session")
def close():
    """Assert that two tensors, or dicts of them, agree to ``bound`` x the largest entry of the second."""

    def check(found, expected, bound=1e-6):
        if not isinstance(expected, dict):
            found, expected = {"": found.detach()}, {"": expected.detach()}
        assert found.keys() == expected.keys()
        largest = max(float(e.abs().max()) for e in expected.values())
        for name, e in expected.items():
            assert found[name].shape == e.shape, name
            error = float((found[name] - e).abs().max())
            assert error <= bound * largest, f"{name}: {error} > {bound} * {largest}"

    return check


@pytest.fixture(scope="session")
def checkpoint():
    """Switch a model's activation checkpointing on, and leave it in training mode."""

    def switch(model, mode):
        model.train()
        base, kwargs = model.base_model, {"use_reentrant": mode == "reentrant"}
        if mode != "none":  # the second name goes away with transformers 6, the first came with 5.2x
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(kwargs)
        return model

    return switch


def merged_weights(model, task: int) -> dict[str, Tensor]:
    """{name: weight} of the linears that the experts of one task amount to: an implementation of its own.

    Written from the formulas, one expert at a time, with the package's tensors but none of its code.
    """
    config = model.moe_config
    E, H = config.num_experts, config.num_heads
    noise_STHE = model.routing.noise([task])
    weights: dict[str, Tensor] = {}
    for name, layer in model.base_model.named_modules():
        if not isinstance(layer, MoELinear):
            continue
        A, B = layer.bank.A_ErK, layer.bank.B_ErN
        logits_HE = _logits(model, layer.group, task)
        noise_HE = [None] * H if noise_STHE is None else noise_STHE[layer.group, 0].to(logits_HE.dtype)
        gates_HE = torch.stack([_gate(logits_HE[h], config, noise_HE[h]) for h in range(H)])
        rank = (config.rank_pattern or {}).get(name.rpartition(".")[2], config.r)
        scale = 1.0 if config.lora_alpha is None else config.lora_alpha / rank
        if config.compose == "after":
            delta_NK = sum(gates_HE[0, e] * B[e].T @ A[e] for e in range(E))
        else:
            K, N = A.shape[-1] // H, B.shape[-1] // H
            blocks = [(h, slice(h * K, (h + 1) * K), slice(h * N, (h + 1) * N)) for h in range(H)]
            mixed_A = torch.cat([sum(gates_HE[h, e] * A[e, :, k] for e in range(E)) for h, k, _ in blocks], 1)
            mixed_B = torch.cat([sum(gates_HE[h, e] * B[e, :, n] for e in range(E)) for h, _, n in blocks], 1)
            delta_NK = mixed_B.T @ mixed_A
        delta = scale * delta_NK
        weight = layer.base.weight
        transposed = type(layer.base).__name__ == "Conv1D"
        weights[f"{name}.weight"] = weight + (delta.T if transposed else delta)
    return weights


def _logits(model, group: int, task: int) -> Tensor:
    config, router = model.moe_config, model.routing.router
    E, H = config.num_experts, config.num_heads
    if config.router == "task_table":
        return router.logits_STHE[group, task]
    if config.router == "none":
        return router.zero.new_zeros(H, E)
    if config.router == "random_tasks":
        return router.route_STHE[group, task]
    if config.router == "fixed":
        expert = next(iter(config.router_options["experts"].values())) if task == 0 else E - 1
        return nn.functional.one_hot(torch.tensor([expert] * H), E).to(router.route_TE.dtype)
    vector = model.routing.representation.embedding_TD[task]
    if config.router == "task_linear":
        return (vector @ router.w_SDE[group] + router.b_SE[group]).view(H, E)
    if config.router == "task_mlp":
        hidden = vector @ router.w1_SDF[group] + router.b1_SF[group]
        return (nn.functional.gelu(hidden) @ router.w2_SFE[group] + router.b2_SE[group]).view(H, E)
    assert config.router == "shared_mlp"
    hidden = nn.functional.gelu(vector @ router.w1_DF + router.b1_F)
    of_group = slice(group * H * E, (group + 1) * H * E)
    return (hidden @ router.w2_FE[:, of_group] + router.b2_E[of_group]).view(H, E)


def _gate(logits_E: Tensor, config, noise_E: Tensor | None) -> Tensor:
    options, T = config.gate_options or {}, config.router_temperature
    if config.gate == "raw":
        return logits_E
    if options.get("normalise") == "l2":
        return logits_E / (logits_E.pow(2).sum() + 1e-12) ** 0.5  # the bound on the gradient at zero
    if config.gate.startswith("gumbel"):
        logits_E = logits_E if noise_E is None else logits_E - (-noise_E.log()).log()
    if config.gate == "bernoulli":
        odds = 1 / (1 + (-logits_E / T).exp())
        if noise_E is not None:
            odds = 1 / (1 + ((1 - noise_E) / noise_E * (-logits_E).exp()) ** (1 / T))
        if options.get("straight_through"):
            on = (odds > 0.5) if (odds > 0.5).any() else (odds == odds.max())
            odds = odds + (on.to(odds.dtype) - odds).detach()
        if options.get("shared"):
            odds = torch.cat([odds[:-1], odds.new_ones(1)])
        return odds / (odds.sum() + 1e-12)
    logits_E = logits_E / T
    if config.gate in ("softmax", "gumbel"):
        return logits_E.exp() / logits_E.exp().sum()
    if config.gate == "sigmoid":
        odds = 1 / (1 + (-logits_E).exp())
        return odds / (odds.sum() + 1e-12)  # peft's constant, kept for parity
    if config.gate == "top_k":
        kept = logits_E >= logits_E.sort(descending=True).values[config.top_k - 1]
        return torch.where(kept, logits_E.exp(), 0.0) / logits_E[kept].exp().sum()
    if config.gate in ("one_hot", "gumbel_one_hot"):
        soft = logits_E.exp() / logits_E.exp().sum()
        return soft + ((logits_E == logits_E.max()).to(soft.dtype) - soft).detach()
    assert config.gate == "uniform"
    return torch.full_like(logits_E, 1 / len(logits_E))


@pytest.fixture(scope="session")
def merged() -> Callable:
    """model, task -> {name: merged weight}, see :func:`merged_weights`."""
    return merged_weights


@pytest.fixture(scope="session")
def dense() -> Callable:
    """kind, attached model, task -> a plain tiny model in which the experts of the task are merged."""

    def make(kind, model, task):
        plain = copy.deepcopy(build(kind)).to(next(model.parameters()).dtype).eval()
        with torch.no_grad():
            for name, weight in merged_weights(model, task).items():
                plain.get_parameter(name).copy_(weight)
        return plain

    return make
