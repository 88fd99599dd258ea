"""Tokenizers trained on the training data, for models that are built from a config."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import TokenizerConfig


def _special_tokens(kind: str) -> tuple[dict[str, str], str]:
    """Special tokens of a model type, in the order of their ids, and the template around a text."""
    encoder_decoder = getattr(CONFIG_MAPPING[kind](), "is_encoder_decoder", False)
    if encoder_decoder:  # as T5
        return {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # as BERT
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return names | {"mask_token": "[MASK]"}, "[CLS] $A [SEP]"
    return {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<s> $A"


def _most_common(pieces: Iterable[str], room: int) -> list[str]:
    """The ``room`` most frequent pieces; ties go by the alphabet."""
    return [
        piece for piece, _ in sorted(Counter(pieces).items(), key=lambda item: (-item[1], item[0]))[:room]
    ]


def train_tokenizer(
    config: TokenizerConfig, model_type: str, texts: Iterable[str]
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on ``texts``, with the special tokens of a model type; deterministic.

    ``bpe`` is byte-level and loses nothing; ``wordlevel`` splits at whitespace (and joins with one space);
    ``char`` keeps every character. Words or characters beyond ``vocab_size`` become the unknown token.

    Raises:
        ConfigError: an unknown kind, or a vocabulary that is too small.
    """
    kind, size = config.kind, config.vocab_size
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3) or KINDS
        raise ConfigError(
            f"tokenizer.kind: unknown kind {kind!r}; the nearest is {near[0]} (of {', '.join(KINDS)})"
        )
    names, template = _special_tokens(model_type)
    special = list(names.values())
    least = len(special) + (256 if kind == "bpe" else 1)
    if size < least:
        raise ConfigError(f"tokenizer.vocab_size: {size} is too small for {kind}; it needs at least {least}")
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
    else:
        split = (word for text in texts for word in (text.split() if kind == "wordlevel" else text))
        pieces = _most_common(split, size)
        vocabulary = [*special, *(piece for piece in pieces if piece not in names.values())][:size]
        ids = {piece: i for i, piece in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=names["unk_token"]))
        if kind == "wordlevel":
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
    used = [(token, tokenizer.token_to_id(token)) for token in special if token in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


KINDS = ("bpe", "wordlevel", "char")
