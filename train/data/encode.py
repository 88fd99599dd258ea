"""Text to tokens.

Prompt and target are tokenised separately and concatenated, so a prompt's tokens never depend on the answer:
what is generated from ``input_ids[:prompt_length]`` starts exactly where training did.

Messages: the tokenizer's chat template when it has one; else ``role: content`` lines, where a turn of the
assistant is ``assistant:`` (no loss), then `` content`` and the end-of-sequence token (loss).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jinja2

from taskmoe.train.data.errors import DataError

Ids = list[int]
Columns = dict[str, list[Any]]

IGNORE = -100


def encode_prompts(tokenizer: Any, texts: Sequence[str], task_type: str) -> list[Ids]:
    """Ids of prompts with the tokenizer's special tokens, but for a causal LM none that ends the sequence."""
    if not texts:
        return []  # the tokenizer refuses
    ids = _call(tokenizer, texts, add_special_tokens=True)
    if task_type != "CAUSAL_LM":
        return ids
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return [one[:-1] if len(one) > 1 and one[-1] in ends else one for one in ids]


def encode_targets(tokenizer: Any, texts: Sequence[str], task_type: str) -> list[Ids]:
    """Ids of targets, ended by the end-of-sequence token when the tokenizer has one."""
    if task_type == "SEQ_2_SEQ_LM":
        ids = _call(tokenizer, None, text_target=list(texts), add_special_tokens=True)
    else:
        ids = _call(tokenizer, texts, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    return [one if eos is None or (one and one[-1] == eos) else [*one, eos] for one in ids]


def _call(tokenizer: Any, texts: Sequence[str] | None, **settings: Any) -> list[Ids]:
    if texts is not None:
        settings["text"] = list(texts)
    # verbose=False: lengths are checked here, with file and line; the tokenizer would only warn.
    return tokenizer(return_attention_mask=False, return_token_type_ids=False, verbose=False, **settings)[
        "input_ids"
    ]


def encode_messages(tokenizer: Any, messages: list[dict[str, str]], where: str = "") -> tuple[Ids, Ids, int]:
    """(input_ids, labels, prompt_length): loss on every assistant turn; the prompt ends before the last one.

    Raises:
        DataError: the chat template rewrites earlier turns, so that no prefix can be cut off.
    """
    if tokenizer.chat_template:
        segments = _chat_segments(tokenizer, messages, where)
    else:
        segments = _plain_segments(tokenizer, messages)
    ids: Ids = []
    labels: Ids = []
    prompt_length = 0
    eos = tokenizer.eos_token_id
    for i, ((text, learned), piece) in enumerate(
        zip(segments, _call(tokenizer, [t for t, _ in segments], add_special_tokens=False), strict=True)
    ):
        if i == 0 and not tokenizer.chat_template:
            piece = encode_prompts(tokenizer, [text], "CAUSAL_LM")[0]
        if learned:
            prompt_length = len(ids)
            if eos is not None and eos not in piece:
                piece = [*piece, eos]
            # A template may close a turn with text after its end token ("<|im_end|>\n"), never generated.
            end = len(piece) if eos is None else piece.index(eos) + 1
            labels += piece[:end] + [IGNORE] * (len(piece) - end)
        else:
            labels += [IGNORE] * len(piece)
        ids += piece
    return ids, labels, prompt_length


def _plain_segments(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    segments: list[tuple[str, bool]] = []
    open_text = ""
    for message in messages:
        if message["role"] == "assistant":
            end = "" if tokenizer.eos_token_id is not None else "\n"
            segments += [(f"{open_text}assistant:", False), (f" {message['content']}{end}", True)]
            open_text = ""
        else:
            open_text += f"{message['role']}: {message['content']}\n"
    return segments


def _chat_segments(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    segments: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the tokenizer's chat template refuses the turns: {error.message}", where
            ) from error
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the tokenizer's chat template rewrites earlier turns, so the assistant's turn cannot be "
                "told from its prompt; use rows with one assistant turn, or clear the tokenizer's template",
                where,
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


class Encoder:
    """A batch of rows (columns ``prompt``, ``target``, ``messages``, ``label``) to token columns."""

    def __init__(
        self,
        tokenizer: Any,
        task_type: str,
        max_length: int,
        max_target_length: int,
        cut: bool,
        places: Sequence[str],
    ) -> None:
        self.tokenizer, self.task_type, self.cut, self.places = tokenizer, task_type, cut, places
        self.max_length, self.max_target_length = max_length, max_target_length

    def __call__(self, batch: Columns, rows: list[int]) -> Columns:
        if self.task_type == "CAUSAL_LM":
            columns = self._causal(batch, rows)
        elif self.task_type == "SEQ_2_SEQ_LM":
            columns = self._seq2seq(batch)
        elif self.task_type == "FEATURE_EXTRACTION":
            columns = self._pairs(batch)
        else:
            columns = self._inputs(batch["prompt"])
            columns["label"] = batch["label"]
            columns["target_length"] = [0] * len(rows)
            columns["loss_tokens"] = [1] * len(rows)
        if "length" not in columns:
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
        columns["row"] = rows
        return columns

    def _inputs(self, texts: list[str], max_length: int | None = None) -> Columns:
        max_length = self.max_length if max_length is None else max_length
        ids = encode_prompts(self.tokenizer, texts, self.task_type)
        full = [len(one) for one in ids]
        if self.cut:
            # The tokenizer itself cuts, because it knows which special tokens must survive.
            for i in [i for i, n in enumerate(full) if n > max_length]:
                (ids[i],) = _call(
                    self.tokenizer,
                    [texts[i]],
                    add_special_tokens=True,
                    truncation=True,
                    max_length=max_length,
                )
        return {"input_ids": ids, "full_length": full}

    def _pairs(self, batch: Columns) -> Columns:
        """Queries, the texts they must find, and wrong ones: all of them as an encoder reads texts."""
        columns = self._inputs(batch["prompt"])
        texts = self._inputs(batch["target"], self.max_target_length)
        wrong = [json.loads(row) for row in batch["negatives"]]
        ids = self._inputs([text for row in wrong for text in row], self.max_target_length)
        found = iter(zip(ids["input_ids"], ids["full_length"], strict=True))
        others = [[next(found) for _ in row] for row in wrong]
        columns["labels"] = texts["input_ids"]
        columns["negatives"] = [[one for one, _ in row] for row in others]
        full = zip(texts["full_length"], others, strict=True)
        columns["target_length"] = [max([length, *(n for _, n in row)]) for length, row in full]
        rows = list(zip(columns["input_ids"], columns["labels"], columns["negatives"], strict=True))
        columns["loss_tokens"] = [int(bool(query and text)) for query, text, _ in rows]
        columns["length"] = [max(map(len, [query, text, *others])) for query, text, others in rows]
        return columns

    def _seq2seq(self, batch: Columns) -> Columns:
        columns = self._inputs(batch["prompt"])
        targets = encode_targets(self.tokenizer, batch["target"], self.task_type)
        columns["target_length"] = [len(one) for one in targets]
        if self.cut:
            targets = [one[: self.max_target_length] for one in targets]
        columns["labels"] = targets
        columns["loss_tokens"] = [len(one) if source else 0 for one, source in
                                  zip(targets, columns["input_ids"], strict=True)]  # fmt: skip
        return columns

    def _causal(self, batch: Columns, rows: list[int]) -> Columns:
        columns: Columns = {"input_ids": [], "labels": [], "prompt_length": [], "full_length": []}
        prompts = encode_prompts(self.tokenizer, batch["prompt"], self.task_type)
        targets = encode_targets(self.tokenizer, batch["target"], self.task_type)
        for row, prompt, target, messages in zip(rows, prompts, targets, batch["messages"], strict=True):
            if messages:
                turns = json.loads(messages)
                ids, labels, prompt_length = encode_messages(self.tokenizer, turns, self.places[row])
            else:
                ids, labels, prompt_length = prompt + target, [IGNORE] * len(prompt) + target, len(prompt)
            columns["full_length"].append(len(ids))
            if self.cut and len(ids) > self.max_length:
                ids, labels, prompt_length = self._shorten(ids, labels, prompt_length, bool(messages))
            columns["input_ids"].append(ids)
            columns["labels"].append(labels)
            columns["prompt_length"].append(prompt_length)
        # The first position predicts nothing, and a row without a prompt cannot be continued.
        columns["loss_tokens"] = [sum(x != IGNORE for x in labels[1:]) if n else 0 for labels, n in
                                  zip(columns["labels"], columns["prompt_length"], strict=True)]  # fmt: skip
        columns["target_length"] = [0] * len(prompts)
        return columns

    def _shorten(self, ids: Ids, labels: Ids, prompt_length: int, chat: bool) -> tuple[Ids, Ids, int]:
        if chat:  # the first turns explain the rest
            return ids[: self.max_length], labels[: self.max_length], min(prompt_length, self.max_length)
        # The question usually stands at the end of the prompt, so its beginning goes, except for a BOS token.
        target = len(ids) - prompt_length
        keep = max(self.max_length - target, 1)
        head = 1 if keep > 1 and ids[0] == self.tokenizer.bos_token_id else 0
        cut = ids[:head] + ids[prompt_length - keep + head :]
        marks = [IGNORE] * keep + labels[prompt_length:]
        return cut[: self.max_length], marks[: self.max_length], keep
