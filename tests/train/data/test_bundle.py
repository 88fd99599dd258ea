from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import TaskError, TaskTable
from taskmoe.train.config import Config, DataConfig, DatasetConfig, SkillGymConfig
from taskmoe.train.data.bundle import RawBundle, read_tasks, tokenise
from taskmoe.train.data.errors import DataError

Write = Callable[..., Path]
Configure = Callable[..., Config]

SST = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
SUM = [{"input": "1 1", "output": "2"}, {"input": "1 2", "output": "3", "accepted": ["three"]}]


def read(config: Config, *splits: str, **settings: Any) -> RawBundle:
    said: list[str] = settings.pop("said", [])
    return read_tasks(config, splits or ("train",), say=said.append, **settings)


def column(raw: RawBundle, split: str, task: int, key: str) -> list[Any]:
    return [row[key] for row in raw.splits[split][task]]


def test_tasks_stand_in_the_order_of_the_list(write: Write, configure: Configure) -> None:
    raw = read(configure(write("sum.jsonl", SUM), write("sst.csv", "text,label\nbad,neg\ngood,pos\n")))
    assert [(t.name, t.labels) for t in raw.tasks] == [("sum", None), ("sst", ("neg", "pos"))]
    assert column(raw, "train", 0, "accepted") == [["2"], ["3", "three"]]
    assert column(raw, "train", 1, "label") == ["neg", "pos"]
    assert list(raw.texts()) == ["1 1\n", "2", "1 2\n", "3", "bad\n", "neg", "good\n", "pos"]


def test_numbers_as_labels_are_sorted_as_numbers(write: Write, configure: Configure) -> None:
    rows = [{"text": "x", "label": n} for n in (10, 9, 1.0)]
    assert read(configure(write("a.jsonl", rows))).tasks[0].labels == ("1", "9", "10")


def test_a_task_column_splits_a_file(write: Write, configure: Configure) -> None:
    path = write(
        "a.jsonl", [{**SST[0], "channel": "b"}, {**SST[1], "channel": 7}, {**SST[1], "channel": "b"}]
    )
    said: list[str] = []
    raw = read(configure(path), said=said)
    assert raw.tasks.names == ["b", "7"]
    assert [len(rows) for rows in raw.splits["train"]] == [2, 1]
    assert said == [
        f"datasets[0]: column 'channel' splits {path} into tasks (task_column: \"\" turns this off)"
    ]
    assert read(configure(DatasetConfig(path=str(path), task_column=""))).tasks.names == ["a"]


def test_a_named_task_column_joins_files(write: Write, configure: Configure) -> None:
    one = write("one.jsonl", [{**SST[0], "suite": "s"}])
    two = write("two.jsonl", [{**SST[1], "suite": "s"}])
    raw = read(configure(*(DatasetConfig(path=str(p), task_column="suite") for p in (one, two))))
    assert raw.tasks.names == ["s"]
    assert column(raw, "train", 0, "label") == ["pos", "neg"]


def test_a_template_may_name_the_task(write: Write, configure: Configure) -> None:
    by_file = configure(write("sum.jsonl", SUM), write("b.jsonl", [{**SUM[0], "task": "own"}]))
    asked = dataclasses.replace(
        by_file, data=dataclasses.replace(by_file.data, template="{{ task }}: {{ input }}\n")
    )
    raw = read(asked)
    assert column(raw, "train", 0, "prompt") == ["sum: 1 1\n", "sum: 1 2\n"]
    assert column(raw, "train", 1, "prompt") == ["own: 1 1\n"]  # of the column that splits the file


def test_a_row_without_the_task_column(write: Write, configure: Configure) -> None:
    path = write("a.jsonl", [{**SST[0], "task": "b"}, SST[1]])
    with pytest.raises(DataError, match=r"a\.jsonl:2: no task column 'task'; the row has text, label"):
        read(configure(path))


def test_root_folders(write: Write, tmp_path: Path, configure: Configure) -> None:
    write("root/sum/train.jsonl", SUM)
    write("root/sst/train.jsonl", SST)
    write("root/sst/validation.jsonl", SST[:1])
    said: list[str] = []
    raw = read(configure(root=str(tmp_path / "root")), "train", "validation", said=said)
    assert raw.tasks.names == ["sst", "sum"]
    assert [len(rows) for rows in raw.splits["validation"]] == [1, 0]
    assert said == ["no validation split for sum: nothing is measured there (none is cut off train)"]


def test_bad_rows_stop_or_are_counted(write: Write, configure: Configure) -> None:
    lines = ['{"text": "good", "label": "pos"}', '{"text": "", "label": "pos"}', '{"text"', '{"text": "x"}',
             '{"text": " "}']  # fmt: skip
    path = write("a.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match=rf"^{path}:2: column 'text' is empty"):
        read(configure(path))
    said: list[str] = []
    raw = read(configure(path, on_bad_row="skip"), said=said)
    assert column(raw, "train", 0, "where") == [f"{path}:1"]
    assert raw.skipped == {"empty text": 2, "broken JSON": 1, "missing column": 1}
    assert said == [
        "skipped 4 bad rows (data.on_bad_row: skip): 2 empty text, 1 broken JSON, 1 missing column"
    ]


def test_a_label_outside_the_set(write: Write, configure: Configure) -> None:
    train, test = write("a.jsonl", SST), write("b.jsonl", [SST[0], {"text": "x", "label": "poss"}])
    entry = DatasetConfig(path=str(train), validation_path=str(test))
    with pytest.raises(DataError) as error:
        read(configure(entry), "train", "validation")
    assert str(error.value) == (
        f"{test}:2: label 'poss' is outside the labels of task 'a': neg, pos; did you mean 'pos'?"
    )
    raw = read(configure(entry, on_bad_row="skip"), "train", "validation")
    assert raw.skipped == {"label outside the set": 1}
    assert len(raw.splits["validation"][0]) == 1
    given = dataclasses.replace(entry, labels=("pos", "poss", "neg"))
    assert read(configure(given), "train", "validation").tasks[0].labels == ("pos", "poss", "neg")


def test_given_labels_close_the_set_of_any_format(write: Write, configure: Configure) -> None:
    entry = DatasetConfig(path=str(write("a.jsonl", SUM)), labels=("2", "4"))
    with pytest.raises(DataError, match=r"a\.jsonl:2: label '3' is outside .*: 2, 4"):
        read(configure(entry))


@pytest.mark.parametrize("content", ["", "text,label\n", "\n\n"])
def test_an_empty_task_is_named(write: Write, configure: Configure, content: str) -> None:
    path = write("a.csv", content)
    with pytest.raises(DataError, match=rf"{path}: task 'a' has no train rows left"):
        read(configure(path, write("sst.jsonl", SST)))


def test_a_task_of_bad_rows_alone_is_empty(write: Write, configure: Configure) -> None:
    path = write("a.jsonl", "{\n")
    with pytest.raises(DataError, match=f"{path}: task 'a' has no train rows left"):
        read(configure(path, on_bad_row="skip"))


def test_an_empty_validation_file_is_no_missing_split(write: Write, configure: Configure) -> None:
    entry = DatasetConfig(path=str(write("a.jsonl", SST)), validation_path=str(write("b.jsonl", "")))
    with pytest.raises(DataError, match=r"b\.jsonl: task 'a' has no validation rows left"):
        read(configure(entry), "train", "validation")


def test_no_data_and_unknown_split() -> None:
    with pytest.raises(ConfigError, match=r"no data: set data\.root, datasets or data\.skill_gym"):
        read(Config())
    with pytest.raises(ConfigError, match="split 'dev' is unknown"):
        read(Config(), "dev")


def test_a_split_that_no_task_has(write: Write, configure: Configure) -> None:
    with pytest.raises(DataError, match="no task has rows of the split test"):
        read(configure(write("a.jsonl", SST)), "test")


def test_row_limits_take_the_same_sample_every_time(write: Write, configure: Configure) -> None:
    path = write("a.jsonl", [{"text": str(i), "label": str(i // 50)} for i in range(100)])
    for config in (
        configure(DatasetConfig(path=str(path), max_rows=10)),
        configure(path, max_rows_per_task=10),
    ):
        raw = read(config)
        texts = column(raw, "train", 0, "prompt")
        assert len(texts) == 10
        assert texts == sorted(texts, key=int) == column(read(config), "train", 0, "prompt")
        assert raw.tasks[0].labels == ("0", "1")


def test_evaluation_takes_ids_and_labels_from_the_table(write: Write, tmp_path: Path) -> None:
    table = TaskTable.from_names(["sum"])
    table.add("sst", ("pos", "neg", "mixed"))
    write("root/sst/test.jsonl", SST)
    config = Config(data=DataConfig(root=str(tmp_path / "root")))
    raw = read(config, "test", tasks=table)
    assert raw.tasks is table
    assert [len(rows) for rows in raw.splits["test"]] == [0, 2]
    write("root/sst/test.jsonl", [{"text": "x", "label": "other"}])
    with pytest.raises(DataError, match=r"test\.jsonl:1: label 'other' is outside .*pos, neg, mixed"):
        read(config, "test", tasks=table)
    write("root/sst/test.jsonl", SST)
    write("root/sums/test.jsonl", SUM)
    with pytest.raises(TaskError, match="unknown task 'sums'; the nearest of 2 are sum"):
        read(config, "test", tasks=table)


def test_training_may_extend_a_table_but_not_change_it(write: Write, configure: Configure) -> None:
    sst = DatasetConfig(path=str(write("sst.jsonl", SST)), validation_path=str(write("v.jsonl", SST)))
    config = configure(sst, write("sum.jsonl", SUM))
    table = TaskTable()
    table.add("sst", ("pos", "neg"))
    grown = read(config, "train", "validation", tasks=table).tasks
    assert grown.names == ["sst", "sum"]
    assert grown[0].labels == ("pos", "neg")  # the checkpoint's order, not the sorted one
    with pytest.raises(TaskError, match="unknown task 'sum'"):
        read(config, "train", "validation", tasks=table, grow=False)
    with pytest.raises(TaskError, match="task 0 is 'sst' here but 'other' in the checkpoint"):
        read(config, "train", "validation", tasks=TaskTable.from_names(["other"]))


def test_a_classifier_needs_labels(write: Write, configure: Configure) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write("a.jsonl", [{"messages": turns}])
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.format: messages has no label"):
        read(configure(path, task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match=r"data\.skill_gym: its tasks are text to text"):
        read(configure(task_type="SEQ_CLS", skill_gym=SkillGymConfig()))
    raw = read(configure(write("sum.jsonl", SUM), task_type="SEQ_CLS"))
    assert raw.tasks[0].labels == ("2", "3")


def test_the_gym_gives_tasks_with_families(configure: Configure) -> None:
    gym = SkillGymConfig(num_tasks=3, train_rows=5, validation_rows=0, test_rows=2, unseen_tasks=2)
    said: list[str] = []
    raw = read(configure(skill_gym=gym), "train", "validation", "test", said=said)
    assert len(raw.tasks) == 3
    assert {t.group for t in raw.tasks} == {"order", "letters"}
    assert [len(rows) for rows in raw.splits["train"] + raw.splits["test"]] == [5, 5, 5, 2, 2, 2]
    assert len(said) == 1
    assert said[0].startswith("no validation split for ")


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_tokens_and_rows_go_together(
    write: Write, configure: Configure, char_tokenizer: Any, task_type: str
) -> None:
    entry = DatasetConfig(path=str(write("a.jsonl", SST)), validation_path=str(write("v.jsonl", SST[1:])))
    config = configure(entry, write("b.jsonl", SST), task_type=task_type)
    raw = read(config, "train", "validation", "test")
    bundle = tokenise(raw, char_tokenizer, config, say=lambda line: None)
    assert bundle.tasks == raw.tasks
    for split, of_tasks in bundle.splits.items():
        assert [s.task for s in of_tasks] == [0, 1]
        for one, rows in zip(of_tasks, raw.splits[split], strict=True):
            assert list(one.raw) == rows
            assert list(one.tokens["row"]) == list(range(len(rows)))
            assert (
                set(one.tokens.column_names)
                == {
                    "CAUSAL_LM": {"input_ids", "labels", "length", "prompt_length", "row"},
                    "SEQ_2_SEQ_LM": {"input_ids", "labels", "length", "row"},
                    "SEQ_CLS": {"input_ids", "label", "length", "row"},
                }[task_type]
            )
    if task_type == "SEQ_CLS":
        assert list(bundle.splits["train"][0].tokens["label"]) == [1, 0]


def test_long_rows_are_said(write: Write, configure: Configure, char_tokenizer: Any) -> None:
    path = write("a.jsonl", [*SST, {"text": "x" * 50, "label": "pos"}])
    config = configure(path, max_length=20, on_long_row="skip")
    said: list[str] = []
    bundle = tokenise(read(config), char_tokenizer, config, say=said.append)
    assert said == ["1 rows longer than data.max_length 20"]
    assert bundle.skipped == {"longer than data.max_length 20": 1}
    one = bundle.splits["train"][0]
    assert [row["where"] for row in one.raw] == [f"{path}:1", f"{path}:2"]
    assert list(one.tokens["row"]) == [0, 1]


def test_a_task_of_long_rows_alone(write: Write, configure: Configure, char_tokenizer: Any) -> None:
    config = configure(write("a.jsonl", SST), max_length=3, on_long_row="skip")
    with pytest.raises(DataError, match=r"task 'a' has no train rows left within data\.max_length 3"):
        tokenise(read(config), char_tokenizer, config, say=lambda line: None)
