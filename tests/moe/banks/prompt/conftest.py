"""Prompted models, and what they are by their formulas: a plain model that is given a prompt by hand.

The references here use the package's tensors but none of its code. They run one sequence at a time, and so
say what a batch of several tasks must be.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from taskmoe.moe import TaskMoEConfig, attach

BANKS = {
    "prompt": {},
    "multitask_prompt": {},
    "prompt_bank": {"num_experts": 3, "router_init_std": 0.5},
    "prompt_bank, top-k": {"num_experts": 3, "router_init_std": 0.5, "gate": "top_k", "top_k": 2},
}
LENGTH, TASKS = 3, ["sort", "sum", "translate"]


@pytest.fixture(params=BANKS)
def bank(request):
    """Runs a test once a kind of prompts."""
    return request.param


@pytest.fixture(scope="session")
def prompted(tiny, shaken):
    """kind, bank, options -> a tiny fp64 model with prompts of ordinary size, in evaluation mode."""

    def make(kind, bank, base=None, **options):
        options = {"length": LENGTH, **options}
        settings = {"bank": bank.partition(",")[0], "bank_options": options, **BANKS[bank]}
        model = attach(tiny(kind) if base is None else base, TaskMoEConfig.from_dict(settings), TASKS)
        return shaken(model).double().eval()

    return make


@pytest.fixture(scope="session")
def leaves():
    """Copies of what trains in a model, which require gradients: {name: tensor}."""
    return lambda model: {
        n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.fixture(scope="session")
def prompt_of():
    """model, {name: tensor}, task -> its prompt [l, W], number by number or expert by expert."""

    def build(model, tensors, task) -> Tensor:
        tensors = {n.rpartition(".")[2]: p for n, p in tensors.items()}
        if "prompts_TlW" in tensors:
            return tensors["prompts_TlW"][task]
        if "shared_lW" in tensors:
            return torch.stack([
                tensors["rows_Tl"][task, i] * tensors["shared_lW"][i] * tensors["columns_TW"][task]
                for i in range(LENGTH)
            ])  # fmt: skip
        logits_E, config = tensors["logits_STHE"][0, task, 0], model.moe_config
        kept = logits_E.exp()
        if config.gate == "top_k":
            kept = torch.where(logits_E >= logits_E.sort(descending=True).values[config.top_k - 1], kept, 0.0)
        bank_ElW = tensors["prompts_ElW"]
        return sum(kept[e] / kept.sum() * bank_ElW[e] for e in range(config.num_experts))

    return build


@pytest.fixture(scope="session")
def plain(tiny):
    """kind -> the base model of :func:`prompted`, without prompts."""
    return lambda kind: tiny(kind).double().eval()


@pytest.fixture(scope="session")
def by_hand(plain):
    """kind, where, prompt [l, W], one sequence's inputs -> what ``head`` reads of it, [L, V]."""

    def run(kind, where, prompt, inputs):
        model = plain(kind)
        return FORMULAS[kind if where == "layers" else "input"](model, kind, prompt, inputs)

    return run


def with_embeddings(model, kind, prompt, inputs):
    """The prompt before the embedded text."""
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    both = torch.cat([prompt.unsqueeze(0), embedded], dim=1)
    rest = {n: v for n, v in inputs.items() if n == "decoder_input_ids"}
    out = model(inputs_embeds=both, **rest)
    if kind == "bert":  # the pooler reads the first position of the text
        text = out.last_hidden_state[:, LENGTH:]
        return torch.cat([text, model.pooler(text).unsqueeze(1)], dim=1)[0]
    return out.logits[0] if kind == "t5" else out.logits[0, LENGTH:]


def cache_of(model, prompt):
    """A cache that holds the prompt: [l, n * 2 * h * d] as keys and values of each layer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads
    blocks = prompt.view(len(prompt), config.num_hidden_layers, 2, heads, size)
    cache = DynamicCache()
    for i in range(config.num_hidden_layers):
        keys, values = (blocks[:, i, which].transpose(0, 1).unsqueeze(0) for which in (0, 1))
        cache.update(keys, values, i)
    return cache


def with_cache(model, kind, prompt, inputs):
    """The prompt as the past of a decoder."""
    return model(input_ids=inputs["input_ids"], past_key_values=cache_of(model, prompt)).logits[0]


def with_attention(model, kind, prompt, inputs):
    """BERT written out, its attention reading the prompt's keys and values as well."""
    config, cache = model.config, cache_of(model, prompt)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hidden = model.embeddings(input_ids=inputs["input_ids"])
    length = hidden.shape[1]
    for i, layer in enumerate(model.encoder.layer):
        part = layer.attention.self

        def split(linear: nn.Linear, hidden: Tensor = hidden) -> Tensor:
            return linear(hidden).view(1, length, heads, size).transpose(1, 2)

        keys = torch.cat([cache.layers[i].keys, split(part.key)], dim=2)
        values = torch.cat([cache.layers[i].values, split(part.value)], dim=2)
        weights = (split(part.query) @ keys.transpose(2, 3) / math.sqrt(size)).softmax(-1)
        read = (weights @ values).transpose(1, 2).reshape(1, length, -1)
        attended = layer.attention.output(read, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    return torch.cat([hidden, model.pooler(hidden).unsqueeze(1)], dim=1)[0]


FORMULAS = {
    "input": with_embeddings,
    "llama": with_cache,
    "gpt2": with_cache,
    "bert": with_attention,
}
