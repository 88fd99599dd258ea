"""Tiny config-built models of four architectures, with their inputs."""

import pytest
import torch
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

VOCAB = 61


def build(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
        return LlamaForCausalLM(config)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
                            bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
        return GPT2LMHeadModel(config)
    if kind == "t5":
        config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4,
                          dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
                          feed_forward_proj="gated-gelu")  # fmt: skip
        return T5ForConditionalGeneration(config)
    if kind == "bert":
        config = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        return BertModel(config)
    raise ValueError(kind)


@pytest.fixture
def tiny():
    """kind -> a fresh tiny model with seed 0."""
    return build


@pytest.fixture
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


@pytest.fixture
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
