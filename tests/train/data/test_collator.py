from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taskmoe.moe.tasks import TaskError
from taskmoe.train.data.collator import Collator

TOKENIZER = SimpleNamespace(pad_token_id=9, eos_token_id=1)


def causal(task: int, ids: list[int], prompt_length: int) -> dict[str, Any]:
    labels = [-100] * prompt_length + ids[prompt_length:]
    return {
        "task": task,
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "prompt_length": prompt_length,
    }


ROWS = [causal(2, [5, 6, 1], 1), causal(0, [7, 1], 1), causal(2, [8, 1], 1), causal(0, [4, 3, 2, 1], 2)]


def same(tensor: torch.Tensor, values: Any) -> None:
    assert tensor.dtype == torch.int64
    assert tensor.device.type == "cpu"
    assert tensor.tolist() == values


def test_rows_are_sorted_by_task_and_padded_on_the_right() -> None:
    batch = Collator(TOKENIZER, "CAUSAL_LM", 3)(ROWS)
    assert batch["order"] == [1, 3, 0, 2]  # stable
    same(batch["task_ids"], [0, 0, 2, 2])
    same(batch["input_ids"], [[7, 1, 9, 9], [4, 3, 2, 1], [5, 6, 1, 9], [8, 1, 9, 9]])
    same(batch["attention_mask"], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    same(
        batch["labels"],
        [[-100, 1, -100, -100], [-100, -100, 2, 1], [-100, 6, 1, -100], [-100, 1, -100, -100]],
    )


def test_seq2seq_and_class_labels() -> None:
    rows = [
        {"task": 1, "input_ids": [5], "labels": [6, 7, 1]},
        {"task": 0, "input_ids": [5, 6], "labels": [1]},
    ]
    batch = Collator(TOKENIZER, "SEQ_2_SEQ_LM", 2)(rows)
    same(batch["labels"], [[1, -100, -100], [6, 7, 1]])
    same(batch["input_ids"], [[5, 6], [5, 9]])
    rows = [{"task": 1, "input_ids": [5], "label": 2}, {"task": 0, "input_ids": [5, 6], "label": 1}]
    same(Collator(TOKENIZER, "SEQ_CLS", 2, [2, 3])(rows)["labels"], [1, 2])


def test_the_padding_id_falls_back_to_the_end_and_to_zero() -> None:
    for pad, eos, expected in ((None, 1, 1), (None, None, 0), (0, 1, 0)):
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
        batch = Collator(tokenizer, "CAUSAL_LM", 3)(ROWS[:2])
        assert batch["input_ids"][0, -1] == expected


@pytest.mark.parametrize("task", [3, -1, None, "sst"])
def test_ids_outside_the_table_name_the_id_and_its_size(task: Any) -> None:
    with pytest.raises(TaskError) as error:
        Collator(TOKENIZER, "CAUSAL_LM", 3)([ROWS[0], {**ROWS[1], "task": task}])
    assert str(error.value) == f"task id {task!r} is not in the table of 3 tasks (0 to 2)"


@pytest.mark.parametrize("label", [2, -1])
def test_labels_outside_a_tasks_classes(label: int) -> None:
    with pytest.raises(TaskError, match=f"label id {label} of task 0 is not one of its 2 classes"):
        Collator(TOKENIZER, "SEQ_CLS", 2, [2, 3])([{"task": 0, "input_ids": [5], "label": label}])


def test_prompts_are_padded_on_the_left_without_targets() -> None:
    batch = Collator(TOKENIZER, "CAUSAL_LM", 3).prompts(ROWS)
    same(batch["input_ids"], [[9, 7], [4, 3], [9, 5], [9, 8]])
    same(batch["attention_mask"], [[0, 1], [1, 1], [0, 1], [0, 1]])
    assert batch["order"] == [1, 3, 0, 2]
    assert "labels" not in batch
    rows = [{"task": 0, "input_ids": [5], "labels": [1]}, {"task": 0, "input_ids": [5, 6], "labels": [1]}]
    same(Collator(TOKENIZER, "SEQ_2_SEQ_LM", 1).prompts(rows)["input_ids"], [[5, 9], [5, 6]])


def test_packs_restart_positions_and_keep_first_tokens_out_of_the_loss() -> None:
    batch = Collator(TOKENIZER, "CAUSAL_LM", 3, packing=True, max_length=6)(
        [*ROWS, {**causal(1, [3, 2], 0), "prompt_length": 0}]
    )
    assert batch["order"] == [1, 3, 4, 0, 2]
    same(batch["input_ids"], [[7, 1, 4, 3, 2, 1], [3, 2, 5, 6, 1, 9], [8, 1, 9, 9, 9, 9]])
    same(batch["position_ids"], [[0, 1, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]])
    same(batch["task_ids"], [[0] * 6, [1, 1, 2, 2, 2, 2], [2] * 6])
    same(batch["segment_ids"], [[0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, -1], [4, 4, -1, -1, -1, -1]])
    same(
        batch["labels"],
        [[-100, 1, -100, -100, 2, 1], [-100, 2, -100, 6, 1, -100], [-100, 1, -100, -100, -100, -100]],
    )
    assert "attention_mask" not in batch


def test_flat_packs_are_one_sequence_without_padding() -> None:
    batch = Collator(TOKENIZER, "CAUSAL_LM", 3, packing=True, max_length=6, flat=True)(ROWS)
    same(batch["position_ids"], [[0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1]])
    same(batch["task_ids"], [[0] * 6 + [2] * 5])


def test_packing_is_for_causal_models_with_a_length() -> None:
    for settings in ({"task_type": "SEQ_CLS", "max_length": 6}, {"task_type": "CAUSAL_LM"}):
        with pytest.raises(ValueError, match="packing needs"):
            Collator(TOKENIZER, n_tasks=1, packing=True, **settings)


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_of_loss_tokens_and_rows(packing: bool) -> None:
    collator = Collator(TOKENIZER, "CAUSAL_LM", 4, packing=packing, max_length=5)
    tokens_T, samples_T = collator.counts(collator(ROWS))
    same(tokens_T, [3, 0, 3, 0])
    same(samples_T, [2, 0, 2, 0])


def test_counts_of_other_objectives() -> None:
    rows = [
        {"task": 1, "input_ids": [5, 6], "labels": [6, 1]},
        {"task": 1, "input_ids": [5, 6], "labels": [1]},
    ]
    collator = Collator(TOKENIZER, "SEQ_2_SEQ_LM", 2)
    assert [c.tolist() for c in collator.counts(collator(rows))] == [[0, 3], [0, 2]]
    collator = Collator(TOKENIZER, "SEQ_CLS", 2, [2, 2])
    batch = collator([{"task": 0, "input_ids": [5], "label": 1}] * 3)
    assert [c.tolist() for c in collator.counts(batch)] == [[3, 0], [3, 0]]
