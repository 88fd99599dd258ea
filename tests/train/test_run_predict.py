"""``taskmoe predict``: the answers of an evaluation, row by row; order, streaming, bad lines and settings."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from taskmoe.moe import ConfigError, TaskError
from taskmoe.train.adapt.unknown import load_with_unknown
from taskmoe.train.cli import main
from taskmoe.train.config_io import load
from taskmoe.train.data.errors import DataError
from taskmoe.train.loop import train
from taskmoe.train.run_eval import score_run
from taskmoe.train.run_predict import WINDOW, TaskPredictor
from taskmoe.train.trained_run import open_run

LLAMA = """\
model: {type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"""
T5 = "model: {type: t5, d_model: 16, d_kv: 8, d_ff: 24, num_layers: 1, num_heads: 2}"
BERT = LLAMA.replace("llama", "bert")
COMMON = """
tokenizer: {kind: char, vocab_size: 96}
data: {root: data, max_length: 40, cache_dir: cache}
mixing: {strategy: equal}
max_steps: 2
per_device_train_batch_size: 4
per_device_eval_batch_size: 3
learning_rate: 0.1
report_to: [none]
"""
TEXT = f"{LLAMA}\nevaluation: {{max_new_tokens: 4}}"
CLUSTERS = "router: token_cluster, gate: raw, router_options: {dim: 16}"
DATASETS = """
datasets:
- {name: say, path: x, template: "{{ task }}: {{ input }} ="}
- {name: mood, path: x, labels: [bad, good]}
moe: {r: 2, num_experts: 2}"""
RUNS = {
    "generator": f"{TEXT}{DATASETS}",
    "seq2seq": f"{TEXT.replace(LLAMA, T5)}\ntask_type: SEQ_2_SEQ_LM{DATASETS}",
    "clusters": f"{TEXT}\nmoe: {{r: 2, num_experts: 2, {CLUSTERS}}}",
    "classifier": f"{BERT}\ntask_type: SEQ_CLS\nmoe: {{r: 2, num_experts: 2}}",
    "encoder": f"{BERT}\ntask_type: FEATURE_EXTRACTION\npooling: mean\nmoe: {{r: 2, num_experts: 2}}",
}
WORDS = ("a bc", "de", "f g h i j k", "l", "mn op", "q", "rst u v w", "x y z")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> its run folder, trained once."""
    home = tmp_path_factory.mktemp("predict")

    @cache
    def make(name: str) -> Path:
        folder = home / name
        for task in ("say", "mood"):
            (folder / "data" / task).mkdir(parents=True)
            for split in ("train", "validation"):
                text = "".join(json.dumps(row) + "\n" for row in rows_of(name))
                (folder / "data" / task / f"{split}.jsonl").write_text(text)
        (folder / "config.yaml").write_text(f"{RUNS[name]}{COMMON}output_dir: {folder / 'run'}\n")
        given = [f"--data.root={folder / 'data'}", f"--data.cache_dir={folder / 'cache'}"]
        assert train(load(folder / "config.yaml", given)) == 0
        return folder / "run"

    return make


def rows_of(name: str) -> list[dict[str, Any]]:
    """With their answers, which prediction must not need."""
    columns = {"classifier": ("text", "label"), "encoder": ("query", "positive")}.get(
        name, ("input", "output")
    )
    return [dict(zip(columns, (w, ("good", "bad")[i % 2]), strict=True)) for i, w in enumerate(WORDS)]


def questions(name: str, *more: dict[str, Any]) -> list[bytes]:
    rows = [{"id": i, **row} for i, row in enumerate(rows_of(name))]
    for row in rows:
        del row[list(row)[-1]]
    return [json.dumps(row).encode() + b"\n" for row in (*rows, *more)]


@pytest.mark.parametrize("name", ["generator", "seq2seq", "clusters", "classifier"])
def test_the_answers_of_an_evaluation_in_the_order_of_the_rows(name: str, run_of: Any) -> None:
    _, scored = score_run(run_of(name), return_predictions=True)
    for task, expected in scored["predictions"].items():
        found = list(TaskPredictor(str(run_of(name)), task)(questions(name)))
        assert [row["prediction"] for row in found] == expected
        assert [row["id"] for row in found] == list(range(len(WORDS)))
        assert [next(iter(set(row.values()) & set(WORDS))) for row in found] == list(WORDS)


def test_an_encoder_gives_vectors(run_of: Any) -> None:
    predictor = TaskPredictor(str(run_of("encoder")), "mood")
    found = torch.tensor([row["prediction"] for row in predictor(questions("encoder"))])
    for word, vector in zip(WORDS, found, strict=True):
        ids = torch.tensor([predictor.tokenizer(word)["input_ids"]])
        with torch.no_grad():
            expected = predictor.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=["mood"]
            ).logits[0]
        torch.testing.assert_close(vector, expected.cpu(), rtol=1e-5, atol=1e-5)
    assert torch.pdist(found).min() > 1e-3


def test_answers_come_before_the_last_line_is_read(run_of: Any) -> None:
    read = 0

    def lines() -> Iterator[bytes]:
        nonlocal read
        for i in range(50):
            read += 1
            yield json.dumps({"text": WORDS[i % len(WORDS)], "id": i}).encode()

    predictor = TaskPredictor(str(run_of("classifier")), "mood", ["--per_device_eval_batch_size=2"])
    answers = predictor(lines())
    assert next(answers)["id"] == 0 and read == 2 * WINDOW
    assert [row["id"] for row in answers] == list(range(1, 50))


# -- as a command -------------------------------------------------------------------------------------------


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_of: Any) -> Any:
    """``predict(name, lines, *argv)``: exit code, the rows on stdout, the lines on stderr."""

    def call(name: str, lines: list[bytes], *argv: str) -> tuple[int, list[dict[str, Any]], list[str]]:
        run = str(run_of(name))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines))))
        capsys.readouterr()
        code = main(["predict", run, *argv])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err.splitlines()

    return call


def test_rows_keep_their_columns(predict: Any) -> None:
    more = [{"text": "é \ud83d", "n": [1, {"a": None}]}, {"text": "a", "n": "half \ud83d"}]
    code, rows, said = predict(
        "classifier", questions("classifier", more[1]), "--task=mood", "--column", "said"
    )
    assert code == 0 and said[-1] == "taskmoe: 9 rows"
    assert rows[-1] == {**more[1], "said": rows[-1]["said"]} and rows[-1]["said"] in ("bad", "good")
    code, rows, said = predict("classifier", questions("classifier", more[0]), "--task", "mood")
    assert (code, len(rows)) == (2, 8) and said[-1].startswith(
        "taskmoe: error: stdin:9: column 'text' holds half"
    )


BAD = [  # the first is no row
    b"\n",
    b'{"text": "a"\n',
    b'{"txt": "a"}\n',
    b'{"text": " "}\n',
    b'{"text": "a", "prediction": 1}\n',
]


def test_a_bad_line_is_named_after_the_answers_before_it(predict: Any) -> None:
    code, rows, said = predict("classifier", [*questions("classifier")[:2], *BAD], "--task", "mood")
    assert code == 2 and [row["id"] for row in rows] == [0, 1]
    assert said[-1].startswith("taskmoe: error: stdin:4:13: broken JSON")


def test_bad_lines_that_are_skipped_keep_their_place(predict: Any) -> None:
    lines = [*questions("classifier")[:1], *BAD, *questions("classifier")[1:2]]
    code, rows, said = predict("classifier", lines, "--task", "mood", "--on_bad_row", "skip")
    assert code == 0 and [row.get("id") for row in rows] == [0, None, None, None, None, 1]
    assert [row["prediction"] is None for row in rows] == [False, True, True, True, True, False]
    for row, start in zip(
        rows[1:5],
        (
            "stdin:3:13: broken JSON",
            "stdin:4: no column 'text' (did you mean 'txt'?); format text_label needs text, the row has txt",
            "stdin:5: column 'text' is empty",
            "stdin:6: the row has a column 'prediction'; name another for the answers with --column",
        ),
        strict=True,
    ):
        assert row["prediction_error"].startswith(start)
    assert rows[2]["txt"] == "a"
    assert said[-1] == "taskmoe: 6 rows, 1 broken JSON, 1 missing column, 1 empty text, 1 bad row"


def test_long_rows_follow_the_settings(predict: Any) -> None:
    long = [json.dumps({"input": "ab " * 30}).encode() + b"\n", *questions("generator")[:1]]
    code, rows, said = predict("generator", long, "--task", "mood")
    assert (code, rows) == (2, []) and "stdin:1: 92 tokens, over data.max_length 40" in said[-1]
    code, rows, said = predict("generator", long, "--task", "mood", "--on_long_row", "skip")
    assert code == 0 and rows[0]["prediction"] is None and rows[1]["prediction"] in ("bad", "good")
    assert said[-1] == "taskmoe: 2 rows, 1 longer than data.max_length 40"
    code, rows, said = predict("generator", long, "--task", "mood", "--on_long_row", "truncate")
    assert code == 0 and rows[0]["prediction"] in ("bad", "good")
    assert said[-1] == "taskmoe: 2 rows, 1 cut to data.max_length 40"


@pytest.mark.parametrize(
    "argv, error, message",
    [
        (["moo"], TaskError, "unknown task 'moo'; the nearest of 2 are mood"),
        (["mood", ["--moe.r=3"]], ConfigError, "moe: what the experts are is read from the checkpoint"),
        (["mood", ["--dta.root=x"]], ConfigError, "unknown key"),
    ],
)
def test_user_errors(argv: list[Any], error: type, message: str, run_of: Any) -> None:
    with pytest.raises(error, match=message):
        TaskPredictor(str(run_of("classifier")), *argv)


def test_no_rows(predict: Any) -> None:
    assert predict("classifier", [], "--task", "mood") == (0, [], ["taskmoe: 0 rows"])


def test_a_task_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run"]) == 2
    assert (
        capsys.readouterr().err == "taskmoe: error: predict: --task is missing; see taskmoe predict --help\n"
    )


def test_rows_without_columns_to_read(run_of: Any) -> None:
    with pytest.raises(DataError, match=r"stdin:1: columns x hold no prompt; known are messages, .*text"):
        list(TaskPredictor(str(run_of("classifier")), "mood")([b'{"x": 1}']))


@pytest.mark.parametrize("policy", ["average", "nearest"])
def test_a_task_that_the_run_does_not_know(policy: str, run_of: Any, predict: Any) -> None:
    """It answers as the model does that has it in its table."""
    lines = questions("clusters")
    code, rows, said = predict("clusters", lines, "--task", "new")
    assert (code, rows) == (2, []) and "unknown task 'new'; the nearest of 2 are" in said[-1]
    code, rows, said = predict("generator", lines, "--task", "new", "--unknown_task", policy)
    assert code == 0 and [row["id"] for row in rows] == list(range(len(WORDS)))
    texts = {"new": list(WORDS)}
    how = {"average": "by the run's rule for new tasks", "nearest": "as mood"}[policy]
    assert f"taskmoe: task 'new' is not of the run: routed {how}" in said
    model = load_with_unknown(open_run(run_of("generator")), texts, policy).model
    predictor = TaskPredictor(str(run_of("generator")), "new", unknown=policy)
    assert [row["prediction"] for row in predictor(lines)] == [row["prediction"] for row in rows]
    assert all(
        torch.equal(p, dict(model.named_parameters())[n]) for n, p in predictor.model.named_parameters()
    )
    code, _, said = predict("classifier", questions("classifier"), "--task", "new", "--unknown_task", policy)
    assert code == 2 and "'new' is not of the run, which has no head" in said[-1]
