from __future__ import annotations

import json
from typing import Any

import pytest

from taskmoe.train.data.encode import Encoder, encode_messages, encode_prompts, encode_targets
from taskmoe.train.data.errors import DataError

EOS = 1
BOS = 2


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def learned(tokenizer: Any, input_ids: list[int], labels: list[int]) -> str:
    assert len(input_ids) == len(labels)
    assert all(label in (-100, i) for i, label in zip(input_ids, labels, strict=True))
    return "".join("|" if x == -100 else "$" if x == EOS else tokenizer.decode([x]) for x in labels)


def encode(
    tokenizer: Any, task_type: str, cut: bool = False, limits: tuple[int, int] = (16, 4), **columns: Any
) -> Any:
    """The first row of a batch of one."""
    batch = {"prompt": ["p"], "target": ["t"], "messages": [""], "label": [0]}
    batch |= {name: [value] for name, value in columns.items()}
    encoded = Encoder(tokenizer, task_type, *limits, cut, ["f:1"])(batch, [0])
    return {name: values[0] for name, values in encoded.items()}


def special(tokenizer: Any, template: str, **names: str) -> Any:
    """The tokenizer with special tokens around each text."""
    from tokenizers.processors import TemplateProcessing

    tokens = [(t, tokenizer.convert_tokens_to_ids(t)) for t in template.split() if t != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_a_causal_row_is_prompt_target_and_end(char_tokenizer: Any) -> None:
    row = encode(char_tokenizer, "CAUSAL_LM", prompt="ab\n", target="cd")
    assert row["input_ids"] == [*ids(char_tokenizer, "ab\ncd"), EOS]
    assert row["labels"] == [-100, -100, -100, *ids(char_tokenizer, "cd"), EOS]
    assert (row["length"], row["full_length"], row["prompt_length"], row["loss_tokens"]) == (6, 6, 3, 3)


def test_prompt_tokens_do_not_depend_on_the_target() -> None:
    """A merge across the border would: "ab" is one token, but not when a ends the prompt."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [2]
    row = encode(tokenizer, "CAUSAL_LM", prompt="a", target="b")
    assert row["input_ids"] == [0, 1, 3]
    assert row["input_ids"][: row["prompt_length"]] == encode_prompts(tokenizer, ["a"], "CAUSAL_LM")[0]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_causal_prompt_keeps_the_begin_token_and_never_ends(char_tokenizer: Any, template: str) -> None:
    tokenizer = special(char_tokenizer, template)
    assert encode_prompts(tokenizer, ["ab"], "CAUSAL_LM") == [[BOS, *ids(tokenizer, "ab")]]
    assert encode_targets(tokenizer, ["ab"], "CAUSAL_LM") == [[*ids(tokenizer, "ab"), EOS]]


def test_seq2seq_targets_end_once(char_tokenizer: Any) -> None:
    plain = encode(char_tokenizer, "SEQ_2_SEQ_LM", prompt="ab", target="cd")
    assert plain["input_ids"] == ids(char_tokenizer, "ab")
    assert plain["labels"] == [*ids(char_tokenizer, "cd"), EOS]
    ended = encode(special(char_tokenizer, "$A </s>"), "SEQ_2_SEQ_LM", prompt="ab", target="cd")
    assert ended["input_ids"] == [*ids(char_tokenizer, "ab"), EOS]
    assert ended["labels"] == plain["labels"]


def test_turns_without_a_template(char_tokenizer: Any) -> None:
    turns = [("system", "S"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    messages = [{"role": r, "content": c} for r, c in turns]
    input_ids, labels, prompt_length = encode_messages(char_tokenizer, messages)
    text = "".join("$" if i == EOS else char_tokenizer.decode([i]) for i in input_ids)
    assert text == "system: S\nuser: u\nassistant: one$user: v\nassistant: two$"
    assert learned(char_tokenizer, input_ids, labels).strip("|").replace("|", "") == " one$ two$"
    assert text[:prompt_length].endswith("v\nassistant:")
    row = encode(char_tokenizer, "CAUSAL_LM", limits=(99, 9), messages=json.dumps(messages))
    assert (row["input_ids"], row["labels"], row["loss_tokens"]) == (input_ids, labels, 10)


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_turns_with_a_chat_template(char_tokenizer: Any) -> None:
    char_tokenizer.chat_template = CHATML
    turns = [("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    messages = [{"role": r, "content": c} for r, c in turns]
    input_ids, labels, prompt_length = encode_messages(char_tokenizer, messages)
    whole = char_tokenizer.apply_chat_template(messages, tokenize=False)
    assert input_ids == char_tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert (
        learned(char_tokenizer, input_ids, labels).replace("|", "") == "one$two$"
    )  # what follows the end is no answer
    prompt = char_tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert input_ids[:prompt_length] == char_tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_chat_template_without_an_end_gets_one(char_tokenizer: Any) -> None:
    char_tokenizer.chat_template = CHATML.replace("</s>", "")
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}]
    input_ids, labels, _ = encode_messages(char_tokenizer, messages)
    assert learned(char_tokenizer, input_ids, labels).replace("|", "") == "one\n$"


def test_a_chat_template_that_rewrites_the_past_is_refused(char_tokenizer: Any) -> None:
    char_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = json.dumps([{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}])
    with pytest.raises(DataError, match="f:1: the tokenizer's chat template rewrites earlier turns"):
        encode(char_tokenizer, "CAUSAL_LM", messages=messages)


def test_a_chat_template_that_refuses_the_turns(char_tokenizer: Any) -> None:
    char_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    messages = json.dumps([{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}])
    with pytest.raises(
        DataError, match=r"f:1: the tokenizer's chat template refuses .*: roles must alternate"
    ):
        encode(char_tokenizer, "CAUSAL_LM", messages=messages)


def test_a_long_causal_row_loses_the_beginning_of_its_prompt(char_tokenizer: Any) -> None:
    tokenizer = special(char_tokenizer, "<s> $A")
    row = encode(tokenizer, "CAUSAL_LM", True, (6, 0), prompt="abcdef", target="xy")
    assert row["input_ids"] == [BOS, *ids(tokenizer, "ef"), *ids(tokenizer, "xy"), EOS]
    assert row["labels"] == [-100] * 3 + [*ids(tokenizer, "xy"), EOS]
    assert (row["length"], row["full_length"], row["prompt_length"]) == (6, 10, 3)


def test_a_long_target_keeps_one_token_of_its_prompt(char_tokenizer: Any) -> None:
    row = encode(char_tokenizer, "CAUSAL_LM", True, (4, 0), prompt="ab", target="uvwxyz")
    assert row["input_ids"] == ids(char_tokenizer, "buvw")
    assert (row["prompt_length"], row["loss_tokens"]) == (1, 3)


def test_long_turns_lose_their_end(char_tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}])
    row = encode(char_tokenizer, "CAUSAL_LM", True, (20, 0), messages=messages)
    assert char_tokenizer.decode(row["input_ids"]) == "user: u\nassistant: o"
    assert row["loss_tokens"] == 2
    assert encode(char_tokenizer, "CAUSAL_LM", True, (8, 0), messages=messages)["loss_tokens"] == 0


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_a_long_input_keeps_its_special_tokens(char_tokenizer: Any, task_type: str) -> None:
    tokenizer = special(char_tokenizer, "<s> $A </s>")
    row = encode(tokenizer, task_type, True, (5, 3), prompt="abcdef", target="wxyz")
    assert row["input_ids"] == [BOS, *ids(tokenizer, "abc"), EOS]
    assert (row["length"], row["full_length"]) == (5, 8)
    if task_type == "SEQ_2_SEQ_LM":
        assert (len(row["labels"]), row["target_length"]) == (3, 6)


def test_rows_that_teach_nothing_are_marked(char_tokenizer: Any) -> None:
    char_tokenizer.eos_token = None
    assert encode(char_tokenizer, "CAUSAL_LM", prompt="", target="x")["loss_tokens"] == 0
    assert encode(char_tokenizer, "CAUSAL_LM", prompt="x", target="")["loss_tokens"] == 0
    assert encode(char_tokenizer, "SEQ_2_SEQ_LM", prompt="", target="x")["loss_tokens"] == 0
    assert encode(char_tokenizer, "SEQ_CLS", prompt="x", label=3)["label"] == 3
