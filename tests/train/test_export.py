"""Exported tasks of runs: the code on their cards loads them, and they say what the run says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe.collapse import Pair
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.heads import MeanPoolClassifier
from taskmoe.moe.text_encoder import TextEncoder
from taskmoe.moe.wrappers import inside, load_head
from taskmoe.train import export_formats
from taskmoe.train.cli import main
from taskmoe.train.config_io import load
from taskmoe.train.export import ExportError, export_run
from taskmoe.train.export_average import Losses
from taskmoe.train.export_check import CheckError
from taskmoe.train.loop import train
from taskmoe.train.run_eval import score_run
from taskmoe.train.trained_run import load_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Was not able")  # peft's and others'

LLAMA = """\
model: {type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"""
BERT = LLAMA.replace("llama", "bert").replace(
    "}", ", hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
)
COMMON = """
tokenizer: {kind: char, vocab_size: 64}
data: {root: data, max_length: 24, cache_dir: cache}
mixing: {strategy: equal}
max_steps: 3
per_device_train_batch_size: 6
learning_rate: 0.1
report_to: [none]
"""
TEXT = f"{LLAMA}\nevaluation: {{max_new_tokens: 2}}"
RUNS = {
    "generator": f"{TEXT}\nmoe: {{r: 2, num_experts: 2}}\nphases: [{{train: [base, experts, router]}}]",
    "prompts": f"{TEXT}\nmoe: {{bank: prompt, bank_options: {{length: 3}}}}",
    "tokens": f"{TEXT}\nmoe: {{r: 2, num_experts: 3, router: token_linear}}",
    "instances": f"{TEXT}\nmoe: {{r: 2, num_experts: 3, router: token_cluster, gate: raw, "
    "router_options: {dim: 8}}",
    "draws": f"{TEXT}\nmoe: {{r: 2, num_experts: 3, router: random_instances, gate: raw, "
    "router_options: {experts: 2}}",
    "classifier": f"{BERT}\ntask_type: SEQ_CLS\nmoe: {{r: 2, num_experts: 2}}",
    "pooled": f"{BERT}\ntask_type: SEQ_CLS\npooling: mean\nmoe: {{r: 2, num_experts: 2}}",
    "encoder": f"{BERT}\ntask_type: FEATURE_EXTRACTION\npooling: mean\nmoe: {{r: 2, num_experts: 2}}",
}
LABELS = {"irony": ("no", "yes"), "mood": ("bad", "good", "ok")}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> its run folder, trained once."""
    home = tmp_path_factory.mktemp("runs")

    @cache
    def make(name: str) -> Path:
        folder = home / name
        (folder / "data").mkdir(parents=True)
        for task, labels in LABELS.items():
            (folder / "data" / task).mkdir()
            lines = []
            for i, letter in enumerate("abcdef"):
                text, label = f"{letter} {task}", labels[i % len(labels)]
                row = {"text": text, "label": label}
                if RUNS[name].startswith(TEXT):
                    row = {"input": text, "output": label}
                if name == "encoder":
                    row = {"query": text, "positive": 2 * letter}
                lines.append(json.dumps(row) + "\n")
            for split in ("train", "validation"):
                (folder / "data" / task / f"{split}.jsonl").write_text("".join(lines))
        (folder / "config.yaml").write_text(f"{RUNS[name]}{COMMON}output_dir: {folder / 'run'}\n")
        given = [f"--data.root={folder / 'data'}", f"--data.cache_dir={folder / 'cache'}"]
        assert train(load(folder / "config.yaml", given)) == 0
        return folder / "run"

    return make


def loaded(folder: Path) -> Any:
    """What the code on a card makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    code = code.replace('model(**inputs, task_ids=["irony"])\n', "")
    exec(compile(code.replace("FOLDER", str(folder)), str(folder), "exec"), names)
    return names["model"].eval()


@torch.no_grad()
def logits_of(run: Path, folder: Path, task: str, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the run and of a plain model, with what the run has around its encoder written out."""
    trained = load_run(run)
    base = trained.model.base_model
    inputs = example_inputs(inside(base)[0])
    expected = trained.model(**inputs, task_ids=[task] * 3).logits
    if isinstance(base, MeanPoolClassifier):
        head, labels = load_head(folder)
        assert tuple(labels) == LABELS[task]
        return expected[:, : len(labels)], head(model(**inputs).last_hidden_state.mean(1))
    if isinstance(base, TextEncoder):
        pooled = torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=1)
        return expected, pooled * base.scale
    found = model(**inputs).logits
    return expected[..., : found.shape[-1]], found[:, -expected.shape[1] :] if found.dim() == 3 else found


BY_TOKEN = ("tokens", "instances", "draws")
WRITTEN = [(name, "peft") for name in RUNS if name not in BY_TOKEN]
WRITTEN += [(name, "merged") for name, kind in WRITTEN if name != "prompts"]


@pytest.mark.parametrize(("name", "kind"), WRITTEN)
def test_the_code_on_the_card_gives_the_run(name, kind, run_of, tmp_path, capsys) -> None:
    pytest.importorskip("peft")
    run, out = run_of(name), tmp_path / "out"
    assert main(["export", str(run), "--task", "all", "--out", str(out), "--format", kind, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert list(told) == list(LABELS) and all(t["difference"] <= 1e-5 for t in told.values())
    assert {p.name for p in out.iterdir()} == {*LABELS, *(["base"] if kind == "peft" else [])}
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    other = None
    for task in LABELS:
        folder = out / task
        expected, found = logits_of(run, folder, task, loaded(folder))
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert expected.shape == found.shape and (other is None or not torch.equal(found[:, :1], other))
        other = found[:, :1]
        card = (folder / "README.md").read_text()
        assert f"`{task}`, one of 2 tasks" in card and "From step 3 of" in card and f"| {task} |" in card
        assert ("head.safetensors" in card) == (name == "pooled")
        if kind == "peft":
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(out / "base")


@pytest.mark.parametrize("name", ["generator", "tokens", "classifier", "pooled", "encoder"])
def test_the_whole_mixture_loads_again_bit_for_bit(name, run_of, tmp_path) -> None:
    run, out = run_of(name), tmp_path / "out"
    assert main(["export", str(run), "--task", "all", "--out", str(out), "--format", "taskmoe"]) == 0
    trained = load_run(run).model
    again = loaded(out)
    inputs = example_inputs(inside(trained.base_model)[0])
    tasks = ["mood", "irony", "mood"]
    with torch.no_grad():
        found, expected = (model(**inputs, task_ids=tasks).logits for model in (again, trained))
    assert torch.equal(found, expected)


def test_one_task_goes_straight_into_the_folder_and_can_be_cut(run_of, tmp_path, capsys) -> None:
    run, out = run_of("generator"), tmp_path / "deep" / "out"
    command = ["export", str(run), "--task", "mood", "--out", str(out), "--max_rank", "1"]
    assert main(command) == 0
    table = capsys.readouterr().out
    state = load_file(out / "adapter_model.safetensors")
    assert {min(t.shape) for t in state.values()} == {1} and (out / "base" / "config.json").is_file()
    trained = load_run(run)
    trained.model.requires_grad_(False)
    card = (out / "README.md").read_text()
    for name, error in re.findall(r"\| `([\w.]+)` \| (\d\.\d+) \|", card):
        A, B = (state[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        linear = trained.model.base_model.get_submodule(name)
        gates = trained.model.gates()[name][trained.model.tasks.id("mood"), 0].double()
        parts = zip(gates, linear.bank.B_ErN.double(), linear.bank.A_ErK.double(), strict=True)
        whole = sum(g * b.T @ a for g, b, a in parts) * linear.bank.scale
        assert float(error) == pytest.approx(float((whole - B @ A).norm() / whole.norm()), abs=1e-4)
        assert error in table and name in table
    assert card.count("| `model.layers.0.") == len(state) // 2, "every linear was of rank 4"


# -- what is refused ------------------------------------------------------------------------------------


def test_tokens_are_refused_or_averaged_with_the_loss(run_of, tmp_path, capsys) -> None:
    run = run_of("tokens")
    assert main(["export", str(run), "--task", "mood", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "'token_linear' gives each token gates of its own" in message
        and "taskmoe export --average" in message
    )
    assert not (tmp_path / "out").exists()
    command = ["export", str(run), "--task", "all", "--out", str(tmp_path / "out"), "--average", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    scored = score_run(run)[1]["tasks"]
    for task, found in told.items():
        assert found["loss_routed"] == pytest.approx(scored[task]["loss"], rel=1e-5)
        assert found["loss_exported"] != found["loss_routed"] and found["difference"] > 1e-5
        assert f"{found['loss_exported']:.4f}" in (tmp_path / "out" / task / "README.md").read_text()
    merged = tmp_path / "merged"
    export_run(run, "mood", merged, "merged", average=True)
    assert (merged / "config.json").is_file()


def test_the_loss_is_of_the_rows_that_the_run_is_scored_on(run_of) -> None:
    few = ["--evaluation.max_rows=2"]
    scored, losses = score_run(run_of("tokens"), few)[1]["tasks"], Losses(load_run(run_of("tokens"), few))
    for number, task in enumerate(LABELS):
        assert scored[task]["rows"] == 2
        assert losses.of(number) == pytest.approx(scored[task]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["instances", "draws"])
def test_instances_are_refused_or_averaged_or_kept(name, run_of, tmp_path, capsys) -> None:
    run, out = run_of(name), tmp_path / "out"
    assert main(["export", str(run), "--task", "mood", "--out", str(out)]) == 2
    assert "gives each token gates of its own" in capsys.readouterr().err
    (found,) = export_run(run, "mood", out, average=True)
    assert found.losses is not None and found.losses[0] == pytest.approx(found.losses[1], rel=0.5)
    assert found.losses[0] != found.losses[1]
    kept = export_run(run, "all", tmp_path / "mixture", "taskmoe")
    assert [e.difference for e in kept] == [0.0, 0.0]


def test_folders_in_use_are_left_alone(run_of, tmp_path, capsys) -> None:
    run, out = run_of("generator"), tmp_path / "out"
    (out / "mood").mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="out is not empty; give another folder, or --force"):
        export_run(run, "all", out, check=False)
    assert main(["export", str(run), "--task", "all", "--out", str(out), "--no_check", "--force"]) == 0
    assert (out / "mine.txt").read_text() == "mine" and (out / "mood" / "adapter_config.json").is_file()
    assert "not checked" in capsys.readouterr().out
    with pytest.raises(ExportError, match=r"mine\.txt is a file; give a folder"):
        export_run(run, "all", out / "mine.txt", force=True)


@torch.no_grad()
def test_a_model_over_an_adapter_is_read_alone(run_of, tmp_path) -> None:
    pytest.importorskip("peft")
    run, out = run_of("generator"), tmp_path / "out"
    export_run(run, "mood", out, check=False)
    export_run(run, "mood", out, "merged", force=True, check=False)
    expected, found = logits_of(run, out, "mood", loaded(out))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_wrong_adapter_is_not_written(run_of, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft")
    true = export_formats.save_lora

    def scaled(model, task, folder, *, pairs):
        true(model, task, folder, pairs={n: Pair(p.A_RK, 1.01 * p.B_RN) for n, p in pairs.items()})

    monkeypatch.setattr(export_formats, "save_lora", scaled)
    with pytest.raises(CheckError, match=r"task 'mood': read again, the logits are .* of the largest away"):
        export_run(run_of("generator"), "mood", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_run(run_of("generator"), "mood", tmp_path / "out", check=False)


def test_without_peft_the_check_says_so_before_anything_is_read(tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ExportError, match="the check needs peft: pip install peft, or give --no_check"):
        export_run(tmp_path / "no run", "all", tmp_path / "out")


def test_a_base_with_a_name_of_its_own_stays_where_it_is(run_of, tmp_path) -> None:
    folder = run_of("generator")
    export_run(folder, "all", tmp_path / "loras", check=False)
    base = tmp_path / "loras" / "base"
    given = ["--model=null", "--tokenizer=null", "--phases.0.train=[experts, router]"]
    given += [f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'run'}"]
    settings = load(folder / "config.yaml", given)
    assert train(settings) == 0
    (found,) = export_run(tmp_path / "run", "mood", tmp_path / "out")
    assert not (tmp_path / "out" / "base").exists() and found.difference <= 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task moo --out x", "unknown task 'moo'; the nearest of 2 are mood"),
        ("--out x", "export: --task is missing"),
        ("--task mood", "export: --out is missing"),
        (
            "--task mood --out x --format merge",
            "'merge' is not one of peft, merged, taskmoe; the nearest is 'merged'",
        ),
        ("--task mood --out x --max_rank 0", "--max_rank: '0' is not a whole number, at least 1"),
        ("--task mood --out x --format taskmoe", "--format taskmoe writes the whole mixture as it is"),
        ("--task all --out x --format taskmoe --max_rank 2", "without --max_rank and --average"),
        ("--task mood --out x --average", "--average: no LoRA beside a linear is routed by token"),
        ("--task mood --out x --rank 2", "unexpected argument '--rank'"),
    ],
)
def test_what_is_asked_for_wrongly(arguments, message, run_of, tmp_path, monkeypatch, capsys) -> None:
    run = run_of("generator")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *arguments.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_has_no_ranks_or_is_no_run(run_of, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"--max_rank: moe\.bank 'prompt' has no ranks to cut"):
        export_run(run_of("prompts"), "mood", tmp_path / "out", max_rank=2, check=False)
    with pytest.raises(ValueError, match=r"generato: no such run folder"):
        load_run(run_of("generator").parent / "generato")
    with pytest.raises(ValueError, match=r"not a run folder \(it has no config.yaml\)"):
        load_run(tmp_path)


def test_the_document_is_run(run_of, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("peft")
    document = (Path(__file__).parents[2] / "docs" / "EXPORT.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(.*?)```", document, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run_of("generator"))
    for line in commands.splitlines():
        assert main(line.split()[1:]) == 0, line
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "loras", "small", "merged", "mixture"}
    names: dict[str, Any] = {}
    exec(compile(code, "EXPORT.md", "exec"), names)
    assert (tmp_path / "lora" / "adapter_config.json").is_file() and any(names["errors"].values())
    assert type(names["plain"]).__name__ == "LlamaForCausalLM"
