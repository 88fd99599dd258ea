"""Predictions and losses of rows, shared among ranks.

Batches are made once, in one order, of rows of similar length from all tasks; ranks take turns, as many each
(a rank without one left repeats the last: under ZeRO-3 every forward is a collective). So the composition of
a batch, and with it every number, is the same on one rank and on eight.

- Classification by an encoder: the label with the largest logit.
- Classification by a language model: every label's text is scored by its mean log-likelihood a token.
- Encoders of texts: the text that is nearest to the query among those of its task's rows.
- Everything else: greedy or beam generation.

Legend: B sequences of a batch, n targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from taskmoe.train.config import Config
from taskmoe.train.contrastive import positive_ranks, similarities
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.encode import encode_targets
from taskmoe.train.data.pairs import QUERY, TEXT
from taskmoe.train.distributed import Ranks, gather_objects
from taskmoe.train.objectives import IGNORE, ONE_TARGET, model_inputs, token_losses

# One sequence to run: (length, task, row, index of the label whose text stands as the answer, or -1).
Item = tuple[int, int, int, int]
Result = TypeVar("Result")


class Predictor:
    """The forward passes of one evaluation; made and used inside ``evaluate``, on all ranks.

    Args:
        model: in evaluation mode; splits: {task: rows}; the others as for ``evaluate``.
    """

    def __init__(
        self,
        model: Any,
        splits: dict[int, TaskSplit],
        tokenizer: Any,
        config: Config,
        collator: Collator,
        ranks: Ranks,
    ) -> None:
        self.model, self.splits, self.tokenizer = model, splits, tokenizer
        self.config, self.ranks = config, ranks
        self.task_type, self.tasks = config.task_type, model.tasks
        # Packed rows cannot be told apart when sums are taken per row.
        self.collator = Collator(tokenizer, config.task_type, collator.n_tasks, collator.label_counts)
        self.device = next(model.parameters()).device
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        if self.positions is not None:  # those of prompts are taken
            self.positions -= getattr(getattr(model, "prompts", None), "length", 0)
        most = config.evaluation.max_rows
        self.rows = {task: spread(len(split.tokens), most) for task, split in splits.items()}
        # The labels' tokens, of the tasks whose labels are scored by likelihood.
        self.answers: dict[int, list[list[int]]] = {}
        self.reciprocal: dict[int, float] = {}  # FEATURE_EXTRACTION: mean of 1 / rank of the right text
        if self.task_type not in ONE_TARGET:
            for task in splits:
                if self.tasks[task].labels:
                    self.answers[task] = encode_targets(tokenizer, self.tasks[task].labels, self.task_type)

    @torch.no_grad()
    def run(self) -> tuple[dict[int, list[str]], dict[int, tuple[float, int]]]:
        """Predicted texts of each task in the order of ``rows[task]``, and (loss sum, target tokens)."""
        if self.task_type == "FEATURE_EXTRACTION":
            return self._find()
        scored = self._shared(self._scored_items(self.splits), self._score)
        losses: dict[int, tuple[float, int]] = {}
        for task, rows in self.rows.items():
            answers = [(row, self._right(task, row)) for row in rows]
            right = [scored[task, row, answer] for row, answer in answers if answer is not None]
            losses[task] = (sum(total for total, _, _ in right), sum(tokens for _, tokens, _ in right))
        return self._predictions(scored), losses

    @torch.no_grad()
    def respond(self) -> dict[int, list[Any]]:
        """What is said of rows whose right answer is not known, in the order of ``rows[task]``.

        Texts, as from :meth:`run`; of an encoder of texts their vectors, lists of D numbers.
        """
        if self.task_type == "FEATURE_EXTRACTION":
            found = self._shared(self._prompt_items(list(self.rows)), self._vectors)
            return {task: [found[task, row, -1] for row in rows] for task, rows in self.rows.items()}
        labelled = [task for task in self.rows if self.tasks[task].labels]
        return dict(self._predictions(self._shared(self._scored_items(labelled), self._score)))

    def _predictions(
        self, scored: dict[tuple[int, int, int], tuple[float, int, int]]
    ) -> dict[int, list[str]]:
        """The label of each row, of what :meth:`_score` found, or a generated text where there are none."""
        free = [task for task in self.rows if not self.tasks[task].labels]
        generated = self._shared(self._prompt_items(free), self._generate)
        return {
            task: [generated[task, row, -1] for row in rows] if task in free else self._choose(task, scored)
            for task, rows in self.rows.items()
        }

    def _find(self) -> tuple[dict[int, list[str]], dict[int, tuple[float, int]]]:
        """The text that each query finds among the texts of its task's rows, and the losses.

        Losses are those of training, so they depend on the rows that are run together; the rest does not.
        """
        seen = self._shared(self._scored_items(self.splits), self._embed)
        predictions: dict[int, list[str]] = {}
        losses: dict[int, tuple[float, int]] = {}
        for task, rows in self.rows.items():
            mine = [seen[task, row, -1] for row in rows]
            losses[task] = (sum(loss for loss, _, _ in mine), len(mine))
            targets = [self.splits[task].raw[row]["target"] for row in rows]
            places: dict[str, int] = {}  # of each text where it comes first
            for i, text in enumerate(targets):
                places.setdefault(text, i)
            texts, first = list(places), torch.tensor(list(places.values()))
            numbers = {text: i for i, text in enumerate(texts)}
            queries_QD = torch.stack([query for _, query, _ in mine])
            texts_CD = torch.stack([text for _, _, text in mine])[first]
            right_Q = torch.tensor([numbers[text] for text in targets])
            tasks_Q, tasks_C = torch.zeros_like(right_Q), torch.zeros_like(first)
            ranks_Q = positive_ranks(queries_QD, texts_CD, right_Q, tasks_Q, tasks_C)
            self.reciprocal[task] = float((1 / ranks_Q.double()).mean())
            best_Q = similarities(queries_QD, texts_CD, "dot").argmax(1).tolist()
            predictions[task] = [texts[i] for i in best_Q]
        return predictions, losses

    def _embed(self, items: list[Item]) -> list[tuple[float, Tensor, Tensor]]:
        """(loss, vector of the query, vector of its text) of each item, on the CPU."""
        batch = self.collator([self._columns(item) for item in items])
        vectors = self.model(**model_inputs(batch, self.task_type, self.model.config, self.device)).logits
        losses_n, _, _ = token_losses(vectors, batch, self.task_type)
        vectors, roles = vectors.cpu().double(), batch["roles"]
        parts = (losses_n.cpu().double().tolist(), vectors[roles == QUERY], vectors[roles == TEXT])
        return _in_order(list(zip(*parts, strict=True)), batch["order"])

    def _vectors(self, items: list[Item]) -> list[list[float]]:
        """The vector of each item's prompt."""
        batch = self.collator.prompts([self._columns(item) for item in items])
        vectors = self.model(**model_inputs(batch, self.task_type, self.model.config, self.device)).logits
        return _in_order(vectors.cpu().tolist(), batch["order"])

    def _choose(self, task: int, scored: dict[tuple[int, int, int], tuple[float, int, int]]) -> list[str]:
        """The predicted label of each row; among equals the first."""
        labels = self.tasks[task].labels
        if task not in self.answers:
            return [labels[scored[task, row, -1][2]] for row in self.rows[task]]
        chosen = []
        for row in self.rows[task]:
            means = [scored[task, row, i][0] / scored[task, row, i][1] for i in range(len(labels))]
            chosen.append(labels[means.index(min(means))])
        return chosen

    def _right(self, task: int, row: int) -> int | None:
        """Which item of a row holds the right answer; None: none does (an answer outside the labels)."""
        if task not in self.answers:
            return -1
        target, labels = self.splits[task].raw[row]["target"], self.tasks[task].labels
        return labels.index(target) if target in labels else None

    def _scored_items(self, tasks: Iterable[int]) -> list[Item]:
        items: list[Item] = []
        for task in tasks:
            split = self.splits[task]
            column = "prompt_length" if task in self.answers and self.task_type == "CAUSAL_LM" else "length"
            lengths = split.tokens[column][:]
            answers = enumerate(self.answers[task]) if task in self.answers else [(-1, [])]
            own = [(i, len(ids) if column == "prompt_length" else 0) for i, ids in answers]
            items += [(lengths[row] + extra, task, row, i) for row in self.rows[task] for i, extra in own]
        return items

    def _prompt_items(self, tasks: Sequence[int]) -> list[Item]:
        column = "prompt_length" if self.task_type == "CAUSAL_LM" else "length"
        lengths = {task: self.splits[task].tokens[column][:] for task in tasks}
        return [(lengths[task][row], task, row, -1) for task in tasks for row in self.rows[task]]

    def _shared(
        self, items: list[Item], run: Callable[[list[Item]], list[Result]]
    ) -> dict[tuple[int, int, int], Result]:
        """Run all items in batches, longest first, every rank its share: {(task, row, answer): result}."""
        items = sorted(items, key=lambda item: (-item[0], *item[1:]))
        size, world = self.config.per_device_eval_batch_size, self.ranks.world_size
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        mine: dict[tuple[int, int, int], Result] = {}
        for first in range(0, len(batches), world):
            at = first + self.ranks.rank
            results = run(batches[min(at, len(batches) - 1)])
            if at < len(batches):
                mine.update({item[1:]: result for item, result in zip(batches[at], results, strict=True)})
        everything: dict[tuple[int, int, int], Result] = {}
        for part in gather_objects(mine):
            everything.update(part)
        return everything

    def _columns(self, item: Item) -> dict[str, Any]:
        """The token row of an item; with a label's text in place of the row's own answer."""
        _, task, row, answer = item
        columns = {**self.splits[task].tokens[row], "task": task}
        if answer >= 0:
            ids = self.answers[task][answer]
            if self.task_type == "CAUSAL_LM":
                prompt = columns["input_ids"][: columns["prompt_length"]]
                if self.positions is not None:  # a label longer than the row's own answer may not fit
                    prompt = prompt[max(0, len(prompt) + len(ids) - self.positions) :]
                columns["input_ids"] = prompt + ids
                columns["labels"] = [IGNORE] * len(prompt) + ids
            else:
                columns["labels"] = ids
        return columns

    def _score(self, items: list[Item]) -> list[tuple[float, int, int]]:
        """(loss sum, target tokens, class with the largest logit or -1) of each item."""
        batch = self.collator([self._columns(item) for item in items])
        logits = self.model(**model_inputs(batch, self.task_type, self.model.config, self.device)).logits
        losses_n, _, sequences_n = token_losses(logits, batch, self.task_type)
        # On the CPU and in fp64: the same sums in the same order on every machine.
        sequences_n, losses_n = sequences_n.cpu(), losses_n.cpu().double()
        sums_B = torch.bincount(sequences_n, weights=losses_n, minlength=len(items)).tolist()
        tokens_B = torch.bincount(sequences_n, minlength=len(items)).tolist()
        classes_B = logits.argmax(-1).tolist() if self.task_type == "SEQ_CLS" else [-1] * len(items)
        return _in_order(list(zip(sums_B, tokens_B, classes_B, strict=True)), batch["order"])

    def _generate(self, items: list[Item]) -> list[str]:
        batch = self.collator.prompts([self._columns(item) for item in items])
        width, evaluation = batch["input_ids"].shape[1], self.config.evaluation
        new = evaluation.max_new_tokens
        if self.positions is not None and self.task_type == "CAUSAL_LM":
            new = max(1, min(new, self.positions - width + 1))  # the last new token is not read again
        partitioned = any(hasattr(p, "ds_id") for p in self.model.parameters())
        defaults = getattr(self.model, "generation_config", None)
        ids = self.model.generate(
            input_ids=batch["input_ids"].to(self.device),
            attention_mask=batch["attention_mask"].to(self.device),
            task_ids=batch["task_ids"],
            **{n: batch[n].to(self.device) for n in ("instance_embeddings",) if n in batch},
            generation_config=GenerationConfig(
                max_new_tokens=new,
                num_beams=evaluation.num_beams,
                do_sample=False,
                pad_token_id=self.collator.pad_id,
                bos_token_id=self.tokenizer.bos_token_id,
                # A chat model's own list (end of turn, end of text) knows more than its tokenizer.
                eos_token_id=getattr(defaults, "eos_token_id", None) or self.tokenizer.eos_token_id,
                decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
            ),
            # Ranks finish at different lengths; ZeRO-3 needs them to go on together.
            synced_gpus=partitioned and self.ranks.world_size > 1,
        )
        answers = ids[:, width:] if self.task_type == "CAUSAL_LM" else ids
        return _in_order(self.tokenizer.batch_decode(answers, skip_special_tokens=True), batch["order"])


def _in_order(results: list[Result], order: Sequence[int]) -> list[Result]:
    """Undo the collator's sort: ``order[i]`` is where the i-th result belongs."""
    sorted_back: list[Any] = [None] * len(results)
    for result, place in zip(results, order, strict=True):
        sorted_back[place] = result
    return sorted_back


def spread(rows: int, most: int | None) -> list[int]:
    """At most ``most`` of ``rows`` indices, evenly spread: files are often sorted by label."""
    if most is None or most >= rows:
        return list(range(rows))
    return [i * rows // most for i in range(most)]
