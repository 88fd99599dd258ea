"""Which linears end a block, on many architectures; what stands behind one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.moe.sub_blocks import find_sub_blocks

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "vocab_size": 61}  # fmt: skip
# Leaf names of one layer, in the order of the model.
BLOCKS = {
    "llama": (SMALL, ["self_attn.o_proj", "mlp.down_proj"]),
    "qwen2": ({**SMALL, "num_key_value_heads": 1}, ["self_attn.o_proj", "mlp.down_proj"]),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61}, ["attn.c_proj", "mlp.c_proj"]),
    "gpt_neox": (SMALL, ["attention.dense", "mlp.dense_4h_to_h"]),
    "bert": (SMALL, ["attention.output.dense", "output.dense"]),
    "roberta": (SMALL, ["attention.output.dense", "output.dense"]),
    "distilbert": (
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 61},
        ["attention.out_lin", "ffn.lin2"],
    ),
    "vit": (SMALL, ["attention.o_proj", "mlp.fc2"]),
    "opt": (
        {**SMALL, "word_embed_proj_dim": 16, "ffn_dim": 24},
        ["self_attn.out_proj", "fc2"],
    ),
}  # fmt: skip


def found(model, **settings):
    behind = settings.pop("behind", "both")
    config = TaskMoEConfig.from_dict({"bank": "adapter", **settings})
    return find_sub_blocks(model, config, behind, dry_run=False)[0]


@pytest.mark.parametrize("kind", BLOCKS)
def test_both_blocks_of_each_layer_are_found(kind):
    settings, leaves = BLOCKS[kind]
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    blocks = found(model)
    layers = list(dict.fromkeys(b.layer for b in blocks.values()))
    assert len(layers) == 2
    assert list(blocks) == [f"{layer}.{leaf}" for layer in layers for leaf in leaves]
    assert [(b.position, b.width) for b in blocks.values()] == [(0, 16), (1, 16)] * 2
    assert all(b.linear is model.get_submodule(n) for n, b in blocks.items())


def test_a_decoder_has_three_blocks_a_layer(tiny):
    blocks = found(tiny("t5"))
    decoder = [n.removeprefix("decoder.block.0.layer.") for n in blocks if n.startswith("decoder.block.0")]
    assert decoder == ["0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo"]
    assert [b.position for n, b in blocks.items() if n.startswith("decoder.block.1")] == [0, 1, 2]
    assert [b.position for n, b in blocks.items() if n.startswith("encoder")] == [0, 1, 0, 1]


def test_bart_has_its_ffn_beside_two_attentions():
    config = AutoConfig.for_model(
        "bart", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=61,
    )  # fmt: skip
    names = list(found(AutoModel.from_config(config)))
    assert names == [
        "encoder.layers.0.self_attn.out_proj", "encoder.layers.0.fc2", "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.encoder_attn.out_proj", "decoder.layers.0.fc2",
    ]  # fmt: skip


def test_one_kind_of_block_some_layers_and_named_linears(tiny):
    model = tiny("llama")
    assert [n.rpartition(".")[2] for n in found(model, behind="attention")] == ["o_proj"] * 2
    assert [n.rpartition(".")[2] for n in found(model, behind="ffn")] == ["down_proj"] * 2
    assert {b.layer for b in found(model, layers_to_transform=1).values()} == {"model.layers.1"}
    left = found(model, exclude_modules=["model.layers.0.mlp.down_proj"], behind="ffn")
    assert list(left) == ["model.layers.1.mlp.down_proj"]
    assert [b.width for b in found(model, target_modules=["up_proj"]).values()] == [24, 24]


def test_a_model_without_blocks_and_wrong_settings_are_errors(tiny):
    with pytest.raises(ConfigError, match=r"moe.bank: 'adapter' finds no .* block in Sequential; name"):
        found(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(ConfigError, match=r"moe.bank_options.behind: 'attention' leaves no block"):
        found(tiny("llama"), behind="attention", target_modules=["down_proj"])
