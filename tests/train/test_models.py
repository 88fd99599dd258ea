from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5EncoderModel

from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config, DataConfig, PhaseConfig, TokenizerConfig
from taskmoe.train.models import build_model, build_tokenizer

TEXTS = ["reverse abc -> cba", "shift  abd -> bce", "über\nzwei Zeilen"] * 3
LLAMA = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
BERT = LLAMA | {"type": "bert"}
GPT2 = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def make(model: dict | None = LLAMA, **changes) -> Config:
    return Config(model=model, data=DataConfig(max_length=32), tokenizer=TokenizerConfig("char"), **changes)


def labelled() -> TaskTable:
    tasks = TaskTable()
    tasks.add("two", ["no", "yes"])
    tasks.add("three", ["a", "b", "c"])
    return tasks


def build(config: Config):
    tokenizer = build_tokenizer(config, TEXTS)
    return build_model(config, tokenizer, labelled()), tokenizer


@pytest.mark.parametrize(("kind", "size"), [("bpe", 300), ("wordlevel", 50), ("char", 50)])
def test_trained_tokenizers_are_deterministic_and_reversible(kind: str, size: int, tmp_path: Path) -> None:
    config = dataclasses.replace(make(), tokenizer=TokenizerConfig(kind, size))
    one, two = build_tokenizer(config, TEXTS), build_tokenizer(config, iter(TEXTS))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) <= size
    for text in TEXTS[:3]:
        ids = one(text, add_special_tokens=False).input_ids
        assert one.unk_token_id not in ids
        wanted = " ".join(text.split()) if kind == "wordlevel" else text
        assert one.decode(ids, skip_special_tokens=True) == wanted
    one.save_pretrained(tmp_path)
    again = build_tokenizer(_saved(tmp_path), ())
    assert again(TEXTS).input_ids == one(TEXTS).input_ids
    assert again.decode(ids, skip_special_tokens=True) == wanted
    assert (again.pad_token_id, again.eos_token_id) == (one.pad_token_id, one.eos_token_id)


def _saved(path: Path, **changes) -> Config:
    (path / "config.json").write_text("{}")
    return make(None, model_name_or_path=str(path), **changes)


def test_the_order_of_texts_does_not_matter_to_words_and_characters() -> None:
    for kind in ("wordlevel", "char"):
        config = dataclasses.replace(make(), tokenizer=TokenizerConfig(kind, 20))
        assert build_tokenizer(config, TEXTS).get_vocab() == build_tokenizer(config, TEXTS[::-1]).get_vocab()


def test_rare_words_become_unknown() -> None:
    config = dataclasses.replace(make(), tokenizer=TokenizerConfig("wordlevel", 6))
    tokenizer = build_tokenizer(config, ["a a a b b c"])
    assert set(tokenizer.get_vocab()) == {"<pad>", "<s>", "</s>", "<unk>", "a", "b"}
    assert tokenizer("a c", add_special_tokens=False).input_ids[1] == tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [(LLAMA, "<s>", None), (GPT2, "<s>", None), (T5, None, "</s>"), (BERT, "[CLS]", "[SEP]")],
)
def test_special_tokens_fit_the_model_type(model: dict, before: str | None, after: str | None) -> None:
    tokenizer = build_tokenizer(make(model), TEXTS)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids)
    assert tokens == [*filter(None, [before]), "a", "b", *filter(None, [after])]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("ab").input_ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("task_type", "model", "pooling", "name"),
    [
        ("CAUSAL_LM", LLAMA, "model", "LlamaForCausalLM"),
        ("CAUSAL_LM", GPT2, "model", "GPT2LMHeadModel"),
        ("SEQ_2_SEQ_LM", T5, "model", "T5ForConditionalGeneration"),
        ("SEQ_CLS", BERT, "model", "BertForSequenceClassification"),
        ("SEQ_CLS", BERT, "mean", "BertModel"),
        ("SEQ_CLS", LLAMA, "model", "LlamaForSequenceClassification"),
    ],
)
def test_models_from_a_config(task_type: str, model: dict, pooling: str, name: str) -> None:
    built, tokenizer = build(make(model, task_type=task_type, pooling=pooling))
    assert type(built).__name__ == name and not built.training
    assert built.config.vocab_size == len(tokenizer)
    assert built.config.pad_token_id == tokenizer.pad_token_id
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    if task_type == "SEQ_2_SEQ_LM":
        assert built.config.decoder_start_token_id == tokenizer.pad_token_id
    elif task_type == "CAUSAL_LM":
        assert built.generation_config.eos_token_id == tokenizer.eos_token_id
    elif pooling == "model":
        assert built.config.num_labels == 3
    else:
        assert built.pooler is None


def test_mean_pooling_of_an_encoder_decoder_takes_its_encoder() -> None:
    built, _ = build(make(T5, task_type="SEQ_CLS", pooling="mean"))
    assert isinstance(built, T5EncoderModel)


def test_weights_follow_the_seed_and_nothing_else() -> None:
    states = []
    for outside, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        built, _ = build(make(seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        states.append(built.state_dict()["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_bf16_is_for_frozen_weights() -> None:
    built, _ = build(make(bf16=True))
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    built, _ = build(make(bf16=True, phases=(PhaseConfig(train=("base",)), PhaseConfig())))
    assert {p.dtype for p in built.parameters()} == {torch.float32}


def test_attention_implementation_is_passed_on() -> None:
    built, _ = build(make(attn_implementation="eager"))
    assert built.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="nonsense"):
        build(make(attn_implementation="nonsense"))


def test_from_a_folder(tmp_path: Path) -> None:
    built, tokenizer = build(make(seed=3))
    built.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = build(make(None, model_name_or_path=str(tmp_path)))
    assert {p.dtype for p in again.parameters()} == {torch.float32}  # whatever the file holds
    for (name, a), b in zip(again.state_dict().items(), built.state_dict().values(), strict=True):
        assert torch.equal(a, b.float()), name
    with pytest.raises(ConfigError, match=r"SEQ_2_SEQ_LM does not fit .*llama; it fits CAUSAL_LM, SEQ_CLS"):
        build(make(None, model_name_or_path=str(tmp_path), task_type="SEQ_2_SEQ_LM"))


def test_missing_weights_are_an_error_but_new_heads_are_not(tmp_path: Path) -> None:
    small = {k: v for k, v in BERT.items() if k != "type"}
    tokenizer = build_tokenizer(make(BERT), TEXTS)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained(tmp_path)  # has no pooler
    tokenizer.save_pretrained(tmp_path)
    config = make(None, model_name_or_path=str(tmp_path), task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match=r"no weights for 2 tensors .*pooler.*pooling: mean"):
        build(config)
    build(dataclasses.replace(config, pooling="mean"))
    whole, _ = build(make(BERT, task_type="SEQ_CLS"))
    whole.config.num_labels = 2
    type(whole)(whole.config).save_pretrained(tmp_path)  # another task's head, of another size
    again, _ = build(config)
    assert again.classifier.out_features == 3


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    built, tokenizer = build(make(GPT2))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    built.config.pad_token_id = built.generation_config.pad_token_id = None
    built.save_pretrained(tmp_path)
    again, loaded = build(make(None, model_name_or_path=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == again.config.pad_token_id
    assert len(loaded) == again.config.vocab_size


def test_embeddings_are_never_resized(tmp_path: Path) -> None:
    built, tokenizer = build(make())
    built.save_pretrained(tmp_path)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not resized"):
        build(make(None, model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            make(LLAMA | {"hiden_size": 3}),
            r"model\.hiden_size: unknown key for llama; the nearest are hidden_size",
        ),
        (make(LLAMA | {"type": "lama"}), r"model\.type: unknown model type 'lama'; .*llama"),
        (make({"hidden_size": 3}), r"model\.type: None"),
        (make(LLAMA | {"vocab_size": 3}), r"model\.vocab_size: 3 is not yours to set"),
        (make(LLAMA | {"hidden_size": "big"}), r"model: llama refuses .*hidden_size"),
        (make(LLAMA | {"num_attention_heads": 3}), "model"),
        (make(LLAMA | {"max_position_embeddings": 8}), r"data\.max_length: 32 is more than the 8 positions"),
        (make(GPT2 | {"n_positions": 8}), r"data\.max_length: 32 is more than the 8 positions"),
        (make(T5), r"task_type: CAUSAL_LM does not fit model of type t5; it fits SEQ_2_SEQ_LM"),
        (make(task_type="CAUSAL"), r"task_type: 'CAUSAL'"),
        (make(BERT, task_type="SEQ_CLS", pooling="max"), r"pooling: 'max'"),
        (make(None), "neither given"),
        (make(model_name_or_path="x"), "both given"),
        (make(None, model_name_or_path="/not/there"), r"no such folder '/not/there'"),
        (make(None, model_name_or_path="./not-there"), r"no such folder"),
        (dataclasses.replace(make(), tokenizer=TokenizerConfig("bp")), r"tokenizer\.kind: .*nearest is bpe"),
        (dataclasses.replace(make(), tokenizer=TokenizerConfig("bpe", 99)), r"needs at least 260"),
    ],
)
def test_user_errors_are_one_line(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    config = make(None, model_name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"neither a model folder .* nor a run's"):
        build_tokenizer(config)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer in"):
        build_tokenizer(config)
    with pytest.raises(ConfigError, match="cannot read"):
        build_model(config, build_tokenizer(make(), TEXTS), labelled())


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    built, tokenizer = build(make())
    built.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="model_name_or_path") as caught:
        build(make(None, model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_model_from_a_config_loads_elsewhere(tmp_path: Path) -> None:
    built, _ = build(make())
    built.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == built.config.vocab_size
