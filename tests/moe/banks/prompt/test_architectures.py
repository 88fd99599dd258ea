"""Prompts on more architectures: the formula before the text, and a cache that agrees with none."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from taskmoe.moe import ConfigError, TaskMoEConfig, attach

SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FFN = {**SIZES, "intermediate_size": 24}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
BLOOM = {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 4}
BART = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**FFN, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**FFN, "num_key_value_heads": 2, "head_dim": 4}),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, FFN),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, BLOOM),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig, SIZES),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, FFN),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig, {**FFN, "embedding_size": 8}),
    "modernbert": (
        hf.ModernBertForMaskedLM, hf.ModernBertConfig, {**FFN, **IDS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
}  # fmt: skip
DEEP = ["opt", "qwen3", "phi", "roberta"]
GENERATE = [(n, "input") for n in MODELS if n not in ("roberta", "albert", "modernbert")] + [
    (n, "layers") for n in DEEP if n != "roberta"
]


def build(name, where):
    torch.manual_seed(0)
    kind, config, settings = MODELS[name]
    base = kind(config(**{**IDS, **settings})).double().eval()
    plain = copy.deepcopy(base)
    options = {"length": 3, "where": where, "start_std": 0.5}
    model = attach(base, TaskMoEConfig(bank="prompt", bank_options=options), 3).double().eval()
    with torch.no_grad():
        model.prompts.bank.prompts_TlW.normal_()
    return model, plain


def text(name):
    ids = torch.randint(4, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    rest = {"decoder_input_ids": ids[:, :4]} if name == "bart" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}


def largest(x, y):
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-9))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_text_stands_behind_its_tasks_prompt(name):
    model, plain = build(name, "input")
    inputs = text(name)
    found = model(**inputs, task_ids=[2, 0, 1]).logits
    for i, task in enumerate([2, 0, 1]):
        embedded = plain.get_input_embeddings()(inputs["input_ids"][i : i + 1])
        both = torch.cat([model.prompts.bank.prompts_TlW[task].unsqueeze(0), embedded], dim=1)
        rest = {n: v[i : i + 1] for n, v in inputs.items() if n == "decoder_input_ids"}
        expected = plain(inputs_embeds=both, attention_mask=torch.ones(1, 10), **rest).logits
        assert largest(found[i], expected[0] if rest else expected[0, 3:]) < 1e-6


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_keys_and_values_are_those_of_each_texts_task(name):
    model, _ = build(name, "layers")
    inputs = text(name)
    logits = model(**inputs, task_ids=[2, 0, 1]).logits
    alone = model(**{n: v[1:2] for n, v in inputs.items()}, task_ids=[0]).logits
    assert largest(logits[1:2], alone) < 1e-6
    assert largest(logits[:1], model(**inputs, task_ids=[0, 0, 1]).logits[:1]) > 1e-4


@pytest.mark.parametrize("name", [n for n in MODELS if n not in DEEP])
def test_attention_that_takes_none_is_refused(name):
    with pytest.raises(ConfigError, match="where: 'layers' does not work on"):
        build(name, "layers")


@pytest.mark.parametrize(("name", "where"), GENERATE)
@torch.no_grad()
def test_a_cache_gives_what_reading_everything_again_gives(name, where):
    model, _ = build(name, where)
    inputs = text(name)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "output_scores": True,
                "return_dict_in_generate": True}  # fmt: skip
    cached = model.generate(**inputs, task_ids=[2, 0, 1], **settings)
    again = model.generate(**inputs, task_ids=[2, 0, 1], use_cache=False, **settings)
    assert torch.equal(cached.sequences, again.sequences)
    for found, expected in zip(cached.scores, again.scores, strict=True):
        shown = expected.isfinite()
        assert torch.equal(found.isfinite(), shown)
        assert largest(found[shown], expected[shown]) < 1e-6
