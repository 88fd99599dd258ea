"""Whatever a user can get wrong ends in one line: what, where and what to do; nothing is half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from taskmoe.train.cli import main

BASE = """\
model: {type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}
tokenizer: {kind: char, vocab_size: 64}
moe: {r: 1, num_experts: 2}
datasets:
  - {name: sums, path: sums.jsonl, validation_path: sums.jsonl}
  - {name: mood, path: mood.jsonl, validation_path: mood.jsonl, labels: [good, bad]}
data: {max_length: 16, cache_dir: cache}
evaluation: {max_new_tokens: 2, max_rows: 1}
mixing: {strategy: equal}
output_dir: run
max_steps: 2
per_device_train_batch_size: 2
report_to: [none]
"""
SUMS = '{"input": "1 2", "output": "3"}\n{"input": "2 2", "output": "4"}\n'
MOOD = '{"text": "oh no", "label": "bad"}\n{"text": "oh yes", "label": "good"}\n'
CLASSES = (
    BASE.replace("max_new_tokens: 2, ", "")
    .replace("llama", "bert")
    .replace("datasets:", "task_type: SEQ_CLS\ndatasets:")
    .replace("  - {name: sums, path: sums.jsonl, validation_path: sums.jsonl}\n", "")
)
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "%s", "content": "ho"}]}\n'
RUN = "one finished run"  # a file name that stands for a copy of it in ./run


def rows(text: str) -> dict[str, str | bytes]:
    """The file of the task sums, with a good row before the bad one."""
    return {"sums.jsonl": SUMS + text}


def first_row(text: str) -> dict[str, str | bytes]:
    return {"sums.jsonl": text}


# name: (files beside the good ones, arguments after "train cfg.yaml", what the line must say)
ROWS = {
    "broken JSON": (
        rows('{"input": "3 3", "output" "6"}\n'),
        "",
        ["sums.jsonl:3:27", "broken JSON", "one JSON object"],
    ),
    "missing column": (rows('{"input": "3 3"}\n'), "", ["sums.jsonl:3", "'output'", "the row has input"]),
    "empty text": (rows('{"input": "  ", "output": "6"}\n'), "", ["sums.jsonl:3", "input", "is empty"]),
    "label outside the set": (
        {"mood.jsonl": MOOD + '{"text": "hm", "label": "badd"}\n'},
        "",
        ["mood.jsonl:3", "'badd' is outside the labels of task 'mood'", "did you mean 'bad'?"],
    ),
    "wrong encoding": (
        {"sums.jsonl": SUMS.encode() + b'{"input": "caf\xe9", "output": "6"}\n'},
        "",
        ["sums.jsonl:3:15", "0xe9 is not UTF-8", "save the file as UTF-8"],
    ),
    "UTF-16": ({"sums.jsonl": SUMS.encode("utf-16")}, "", ["sums.jsonl:1:1", "UTF-16", "save it as UTF-8"]),
    "row too long": (
        rows('{"input": "%s", "output": "6"}\n' % ("1 " * 20)),
        "",
        ["sums.jsonl:3", "data.max_length", "16", "data.on_long_row"],
    ),
    "not an object": (rows("[1, 2]\n"), "", ["sums.jsonl:3", "JSON object", "list [1, 2]"]),
    "wrong type": (rows('{"input": ["3", "3"], "output": "6"}\n'), "", ["sums.jsonl:3", "'input'", "list"]),
    "empty task": (
        {"sums.jsonl": SUMS.replace("1 2", "").replace("2 2", "")},
        "--data.on_bad_row skip",
        ["sums", "has no train rows left", "give it rows"],
    ),
    "unknown columns": (
        first_row('{"question": "3 3", "reply": "6"}\n'),
        "",
        ["sums.jsonl:1", "question, reply"],
    ),
    "unknown role": (first_row(CHAT % "assistent"), "", ["sums.jsonl:1", "assistent", "assistant"]),
    "no assistant turn": (first_row(CHAT % "user"), "", ["sums.jsonl:1", "assistant"]),
    "template names a missing column": (
        {"cfg.yaml": BASE.replace("name: sums,", 'name: sums, template: "{{ inputs }}=",')},
        "",
        ["sums.jsonl:1", "inputs", "columns are task, input, output"],
    ),
    "template cannot be read": (
        {"cfg.yaml": BASE.replace("name: sums,", 'name: sums, template: "{{ input",')},
        "",
        ["datasets[0].template", "line 1"],
    ),
}
FILES = {
    "missing file": (
        {"cfg.yaml": BASE.replace("path: sums.jsonl,", "path: sum.jsonl,", 1)},
        "",
        ["datasets[0].path sum.jsonl", "no such file", "did you mean sums.jsonl?"],
    ),
    "empty file": (first_row(""), "", ["sums.jsonl", "'sums' has no train rows", "give it rows"]),
    "csv with too few cells": (
        {
            "cfg.yaml": BASE.replace("path: sums.jsonl,", "path: sums.csv,", 1),
            "sums.csv": "input,output\n1 2,3\n2 2\n",
        },
        "",
        ["sums.csv:3", "1 fields, but the header has 2 (input, output)", "quote fields"],
    ),
    "parquet that is none": (
        {"cfg.yaml": BASE.replace("path: sums.jsonl,", "path: sums.parquet,", 1), "sums.parquet": "PAR1 no"},
        "",
        ["sums.parquet", "not a readable parquet file"],
    ),
    "suffix without a reader": (
        {"cfg.yaml": BASE.replace("path: sums.jsonl,", "path: sums.xlsx,", 1), "sums.xlsx": "x"},
        "",
        ["sums.xlsx", "cannot read .xlsx", ".jsonl"],
    ),
    "data.root that is not there": ({}, "--data.root tasks", ["tasks: no such folder", "one folder a task"]),
    "data.root without tasks": ({"tasks/readme.txt": "x"}, "--data.root tasks", ["tasks: holds no folders"]),
    "output_dir is a file": ({"run": "x"}, "", ["output_dir: run", "is not a folder", "choose another"]),
    "output_dir below a file": ({"x": "x"}, "--output_dir x/run", ["output_dir: x/run", "x is not a folder"]),
}
KEYS = {
    "unknown key": ({}, "--max_lenght 3", ["--max_lenght: unknown key", "the nearest is data.max_length"]),
    "unknown key in the file": (
        {"cfg.yaml": BASE + "learning_rat: 1\n"},
        "",
        ["cfg.yaml:14: learning_rat: unknown key", "learning_rate"],
    ),
    "wrong type": ({}, "--max_steps many", ["max_steps", "whole number", "'many'"]),
    "out of range": ({}, "--moe.lora_dropout 1.5", ["moe.lora_dropout", "1.5", "< 1"]),
    "contradictory": (
        {},
        "--model_name_or_path x",
        ["both are set of model_name_or_path and model", "exactly one"],
    ),
    "without effect": ({}, "--mixing.max_epochs 2", ["mixing.max_epochs", "has no effect", "remove it"]),
    "unknown router": (
        {},
        "--moe.router task_tabel",
        ["moe.router", "'task_tabel'", "nearest is 'task_table'"],
    ),
    "unknown gate": ({}, "--moe.gate softmx", ["moe.gate", "'softmx'", "nearest is 'softmax'"]),
    "target_modules match nothing": ({}, "--target_modules q_prj", ["target_modules", "q_prj", "q_proj"]),
    "unknown model type": (
        {"cfg.yaml": BASE.replace("llama", "lama")},
        "",
        ["model.type: unknown model type 'lama'", "llama"],
    ),
    "unknown key of a model": (
        {"cfg.yaml": BASE.replace("hidden_size: 8,", "hiden_size: 8,", 1)},
        "",
        ["model.hiden_size: unknown key for llama", "hidden_size"],
    ),
    "values a model refuses": (
        {"cfg.yaml": BASE.replace("num_attention_heads: 1", "num_attention_heads: 3")},
        "",
        ["model: ", "llama"],
    ),
    "model folder that is not there": (
        {"cfg.yaml": BASE.replace("model: {", "model: null # {").replace("tokenizer:", "#")},
        "--model_name_or_path ./models/x",
        ["model_name_or_path", "no such folder './models/x'"],
    ),
    "model of another task type": (
        {},
        "--task_type SEQ_2_SEQ_LM",
        ["task_type", "SEQ_2_SEQ_LM", "CAUSAL_LM"],
    ),
    "DeepSpeed file broken": ({"ds.json": "{"}, "--deepspeed ds.json", ["deepspeed", "ds.json:1"]),
    "DeepSpeed file with bf16": (
        {"ds.json": '{"bf16": {"enabled": true}}'},
        "--deepspeed ds.json",
        ["ds.json", "bf16", "bf16: true"],
    ),
    "unknown metric": ({}, "--evaluation.metrics.sums exact_mach", ["'sums'", "exact_mach", "exact_match"]),
    "metric of no task": (
        {},
        "--evaluation.metrics.sumz exact_match",
        ["evaluation.metrics", "'sumz'", "sums, mood"],
    ),
    "metric of no label": ({}, "--evaluation.metrics.mood f1:godo", ["'mood'", "godo", "good"]),
    "no number of ranks": ({}, "--num_ranks none", ["--num_ranks: 'none'", ">= 1"]),
}
TASKS = {
    "weight of an unknown task": ({}, "--task_weights.sum 2", ["task_weights", "'sum'", "sums"]),
    "mixture of an unknown task": (
        {"cfg.yaml": BASE.replace("{strategy: equal}", "{strategy: explicit, weights: {sums: 1, mud: 1}}")},
        "",
        ["mixing.weights.mud: no such task", "mood"],
    ),
    "a later phase's mixture of an unknown task": (
        {
            "cfg.yaml": BASE + "phases:\n  - {name: a, steps: 1}\n"
            "  - {name: b, mixing: {strategy: explicit, weights: {sums: 1, mod: 1}}}\n"
        },
        "",
        ["phases.1.mixing.weights.mod: no such task", "mood"],
    ),
    "two sources of one task": (
        {"cfg.yaml": BASE.replace("name: mood", "name: sums")},
        "",
        ["datasets[1]", "'sums'", "give each a name"],
    ),
    "classes without labels": (
        {"cfg.yaml": CLASSES.replace(", labels: [good, bad]", ""), "mood.jsonl": CHAT % "assistant"},
        "",
        ["datasets[0]", "messages", "SEQ_CLS"],
    ),
}
CHECKPOINTS = {
    "nothing to resume": ({}, "--resume_from_checkpoint true", ["resume_from_checkpoint", "no folder run"]),
    "no such checkpoint": (
        {RUN: ""},
        "--resume_from_checkpoint checkpoint-9",
        ["resume_from_checkpoint", "no folder checkpoint-9"],
    ),
    "damaged": (
        {RUN: "damage"},
        "--resume_from_checkpoint true",
        ["no whole checkpoint in run", "adapter_model.safetensors", "sha256 differs"],
    ),
    "other tasks": (
        {RUN: "", "cfg.yaml": BASE.replace("name: sums", "name: sum")},
        "--resume_from_checkpoint true",
        ["task 0 is 'sum' here but 'sums' in the checkpoint", "append new ones"],
    ),
    "other labels": (
        {RUN: "", "cfg.yaml": BASE.replace("[good, bad]", "[good, bad, sad]")},
        "--resume_from_checkpoint true",
        ["task 'mood' has labels good, bad, sad but good, bad in the checkpoint"],
    ),
    "other rows a step": (
        {RUN: ""},
        "--resume_from_checkpoint true --per_device_train_batch_size 4",
        ["2 rows a step, these settings 4", "keep ranks x"],
    ),
    "other experts": (
        {RUN: ""},
        "--resume_from_checkpoint true --moe.r 2",
        ["adapter_model.safetensors", "has shape", "other settings?"],
    ),
    "other model": (
        {RUN: "", "cfg.yaml": BASE.replace("intermediate_size: 8", "intermediate_size: 9")},
        "--resume_from_checkpoint true",
        ["does not fit the model", "model settings"],
    ),
    "other number of ranks": (
        {RUN: "ranks"},
        "--resume_from_checkpoint true",
        ["written by 2 rank(s), this run has 1", "start as many"],
    ),
    "tokenizer gone": (
        {RUN: "tokenizer"},
        "--resume_from_checkpoint true",
        ["run/tokenizer", "not a readable tokenizer"],
    ),
    "the folder holds a run": (
        {RUN: ""},
        "",
        ["output_dir: run already holds a run", "--resume_from_checkpoint true"],
    ),
    "from another run into this one": (
        {RUN: "twice"},
        "--resume_from_checkpoint other/checkpoint-2",
        ["output_dir: run already holds a run"],
    ),
    "a typo does not cost the old run": (
        {RUN: ""},
        "--overwrite_output_dir --evaluation.metrics.sums exact_mach",
        ["exact_mach"],
    ),
    "nor do bad data": (
        {RUN: "", **rows("{\n")},
        "--overwrite_output_dir",
        ["sums.jsonl:3", "broken JSON"],
    ),
    "nor does a wrong module": (
        {RUN: ""},
        "--overwrite_output_dir --target_modules q_prj",
        ["target_modules", "q_proj"],
    ),
}
EVALS = {
    "no such run": ({RUN: ""}, "runn", ["runn: no such run folder", "the nearest is run"]),
    "not a run": ({"tasks/readme.txt": "x"}, "tasks", ["tasks: not a run folder", "config.yaml"]),
    "a run without checkpoint": ({RUN: "bare"}, "run", ["no checkpoint-N in run"]),
    "a damaged checkpoint": ({RUN: "damage"}, "run", ["adapter_model.safetensors", "sha256 differs"]),
    "adapter of other settings": ({RUN: ""}, "run --moe.num_experts 3", ["has shape", "other settings?"]),
    "unknown task folder": (
        {RUN: "", "other/sum/test.jsonl": SUMS},
        "run --data.root other --split test",
        ["unknown task 'sum'", "sums"],
    ),
    "label outside the run's": (
        {RUN: "", "other/mood/test.jsonl": MOOD.replace("bad", "sad")},
        "run --data.root other --split test",
        ["other/mood/test.jsonl:1", "'sad' is outside the labels", "'bad'"],
    ),
    "split that is not there": ({RUN: ""}, "run --split test", ["test"]),
    "split that does not exist": (
        {RUN: ""},
        "run --split dev",
        ["--split: 'dev'", "train, validation, test"],
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of two steps in ``run``."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, text in (("cfg.yaml", BASE), ("sums.jsonl", SUMS), ("mood.jsonl", MOOD)):
            Path(name).write_text(text)
        assert main(["train", "cfg.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


def copy_run(finished: Path, how: str) -> None:
    """A copy of the finished run as ./run, spoilt as ``how`` says."""
    shutil.copytree(finished / "run", "run")
    checkpoint = Path("run/checkpoint-2")
    if how == "damage":
        weights = checkpoint / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "ranks":
        rewrite(checkpoint, lambda state: {**state, "world_size": 2})
    elif how == "tokenizer":
        shutil.rmtree("run/tokenizer")
    elif how == "twice":
        shutil.copytree("run", "other")
    elif how == "bare":
        shutil.rmtree(checkpoint)


def rewrite(checkpoint: Path, change: Callable[[dict], dict]) -> None:
    """Change a checkpoint's state as another run would have written it."""
    from taskmoe.train.checkpoint import MANIFEST, STATE, _json, _manifest

    state = change(json.loads((checkpoint / STATE).read_text()))
    (checkpoint / STATE).write_text(_json(state))
    (checkpoint / MANIFEST).unlink()
    manifest = _manifest(checkpoint)
    (checkpoint / MANIFEST).write_text(_json(manifest))


def write(files: dict[str, str | bytes], finished: Path) -> None:
    """The files of a case, and the good ones where it has none of its own."""
    for name, text in {"cfg.yaml": BASE, "sums.jsonl": SUMS, "mood.jsonl": MOOD, **files}.items():
        if name == RUN:
            copy_run(finished, str(text))
            continue
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def content() -> dict[str, bytes | None]:
    """Everything below the working folder, but for the cache of tokenised data."""
    paths = sorted(p for p in Path().rglob("*") if p.parts[0] != "cache")
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


# The command, files beside the good ones, arguments, what the line must say.
Case = tuple[str, dict[str, str | bytes], str, list[str]]
CASES: dict[str, Case] = {
    **{
        f"train, {n}": ("train cfg.yaml", *c)
        for d in (ROWS, FILES, KEYS, TASKS, CHECKPOINTS)
        for n, c in d.items()
    },
    **{f"eval, {n}": ("eval", *c) for n, c in EVALS.items()},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_half_written(
    case: Case,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, files, arguments, words = case
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write(files, finished)
    before = content()
    capfd.readouterr()

    assert main([*command.split(), *arguments.split()]) == 2

    out, err = capfd.readouterr()
    assert err.startswith("taskmoe: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in out
    missing = [word for word in words if word not in err]
    assert not missing, f"{missing} not in {err!r}"
    assert content() == before


def main_on_a_rank(argv: list[str], folder: str) -> tuple[int, str]:
    """Exit code and stderr of the command on this rank of the shared pair."""
    os.chdir(folder)
    with redirect_stderr(StringIO()) as err, redirect_stdout(StringIO()):
        code = main(argv)
    return code, err.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "broken JSON",
        "target_modules match nothing",
        "unknown metric",
        "damaged",
        "other experts",
        "output_dir is a file",
    ],
)
def test_two_ranks_say_it_once(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawn_ranks: Callable
) -> None:
    _, files, arguments, words = CASES[f"train, {name}"]
    monkeypatch.chdir(tmp_path)
    write(files, finished)
    if name == "other experts":  # as two ranks would have left it
        rewrite(Path("run/checkpoint-2"), lambda state: {**state, "world_size": 2, "rows_per_step": 4})
    before = content()
    argv = ["train", "cfg.yaml", *arguments.split()]
    (code, err), other = spawn_ranks(main_on_a_rank, argv=argv, folder=str(tmp_path))
    assert code == 2 and other == (2, "")
    assert err.startswith("taskmoe: error: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    assert content() == before
