"""Merged LoRAs of runs and of adapters: what peft and ``taskmoe eval`` say of them, against dense sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from taskmoe.moe import ConfigError, TaskError
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.merge_weights import merge as merged_task
from taskmoe.train.cli import main
from taskmoe.train.config_io import load
from taskmoe.train.export import export_run
from taskmoe.train.loop import train
from taskmoe.train.merging import model as of_merging
from taskmoe.train.merging.merge import Result, merge
from taskmoe.train.merging.sources import MergeError
from taskmoe.train.out_folder import ExportError
from taskmoe.train.run_eval import score_run
from taskmoe.train.trained_run import load_run

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Was not able")  # peft's own

SHAPE = "hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2"
LLAMA = f"model: {{type: llama, {SHAPE}}}"
BERT = (
    f"model: {{type: bert, {SHAPE}, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}\n"
    "task_type: SEQ_CLS"
)
PLAIN = "moe: {r: 2, num_experts: 1, router: none, gate: uniform}"
RUNS = {
    "both": (LLAMA, "moe: {r: 2, num_experts: 2}", ("copy", "reverse")),
    "copy": (LLAMA, PLAIN, ("copy",)),
    "reverse": (LLAMA, PLAIN, ("reverse",)),
    "elsewhere": (f"{LLAMA}\nseed: 7", PLAIN, ("copy",)),
    "based": (LLAMA, f"{PLAIN}\nphases: [{{train: [base, experts]}}]", ("copy",)),
    "saved": (LLAMA, "moe: {r: 2, num_experts: 2, modules_to_save: [lm_head]}", ("copy", "reverse")),
    "pooled": (f"{BERT}\npooling: mean", "moe: {r: 2, num_experts: 2}", ("copy", "reverse")),
}
ANSWERS: dict[str, Callable[[str], str]] = {"copy": lambda text: text, "reverse": lambda text: text[::-1]}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> its run folder, trained once; all tasks have the same letters, and so one tokenizer."""
    home = tmp_path_factory.mktemp("runs")

    @cache
    def make(name: str) -> Path:
        model, experts, tasks = RUNS[name]
        folder = home / name
        for task in tasks:
            (folder / "data" / task).mkdir(parents=True)
            rows = [a + b + c for a, b, c in ("abc", "cab", "bbc", "aac", "bca", "cba")]
            for split in ("train", "validation", *(["test"] if task == "copy" else [])):
                lines = [{"input": text, "output": ANSWERS[task](text)} for text in rows]
                if name == "pooled":
                    lines = [{"text": text, "label": ANSWERS[task](text)[0]} for text in rows]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / "data" / task / f"{split}.jsonl").write_text(text)
        (folder / "config.yaml").write_text(
            f"{model}\n{experts}\ntokenizer: {{kind: char, vocab_size: 32}}\n"
            f"data: {{root: {folder / 'data'}, max_length: 16, cache_dir: {folder / 'cache'}}}\n"
            f"mixing: {{strategy: equal}}\nmax_steps: 3\nper_device_train_batch_size: 4\nlearning_rate: 0.1\n"
            f"report_to: [none]\noutput_dir: {folder / 'run'}\n"
        )
        with torch.enable_grad():
            assert train(load(folder / "config.yaml")) == 0
        return folder / "run"

    return make


def inputs_of(model: Any) -> dict[str, Tensor]:
    inputs = example_inputs(model)
    inputs["input_ids"] = inputs["input_ids"].clamp_max(model.config.vocab_size - 1)
    return inputs


def of_peft(out: Path, base: Path) -> nn.Module:
    found: nn.Module = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    return found.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def summed(plain: Any, tasks: list[Any], weights: list[float]) -> Any:
    """The base with sum_t w_t (W_t - W) added to its linears: dense, whatever the factors."""
    base = {n: w.clone() for n, w in linear_weights(plain).items()}
    for task, weight in zip(tasks, weights, strict=True):
        for name, own in linear_weights(task).items():
            plain.get_submodule(name).weight += weight * (own - base[name])
    return plain.eval()


@torch.no_grad()
def test_separate_runs_become_one_adapter(run_of, tmp_path) -> None:
    runs = [run_of("copy"), run_of("reverse")]
    result = merge(
        [str(run) for run in runs], "concatenation", tmp_path / "out", options={"weights": [0.5, 2.0]}
    )
    assert result.loras == ["copy", "reverse"] and result.rank == 4 and not result.errors
    trained = [load_run(run) for run in runs]
    expected = summed(trained[0].plain_base(), [merged_task(t.model, 0) for t in trained], [0.5, 2.0])
    inputs = inputs_of(expected)
    close(of_peft(tmp_path / "out", tmp_path / "out" / "base")(**inputs).logits, expected(**inputs).logits)
    assert (tmp_path / "out" / "base" / "tokenizer.json").exists()
    assert "2 LoRAs, merged" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_a_run_of_the_merged_lora_is_scored_like_any_other(run_of, tmp_path) -> None:
    merge([str(run_of("both"))], "task_arithmetic", tmp_path / "run", "run", coefficients=[0.5])
    merge([str(run_of("both"))], "task_arithmetic", tmp_path / "lora", coefficients=[0.5])
    trained = load_run(run_of("both"))
    tasks = [merged_task(trained.model, t) for t in range(2)]
    expected = summed(trained.plain_base(), tasks, [0.5, 0.5])
    inputs, found = inputs_of(expected), load_run(tmp_path / "run")
    assert found.config.output_dir == str(tmp_path / "run")
    for task in ("copy", "reverse"):
        close(found.model(**inputs, task_ids=[task] * 3).logits, expected(**inputs).logits)
    close(of_peft(tmp_path / "lora", tmp_path / "lora" / "base")(**inputs).logits, expected(**inputs).logits)
    scores = score_run(tmp_path / "run")[1]
    assert set(scores["tasks"]) == {"copy", "reverse"} and scores["step"] == 0
    again = export_run(tmp_path / "run", "copy", tmp_path / "again")[0]
    assert again.difference is not None and again.difference < 1e-5


def test_adapters_are_merged_like_the_run_they_are_from(run_of, tmp_path) -> None:
    export_run(run_of("both"), "all", tmp_path / "loras")
    settings: dict[str, Any] = {"options": {"density": 0.5}, "max_rank": 3}
    of_run = merge([str(run_of("both"))], "ties", tmp_path / "a", **settings)
    of_files = merge([str(tmp_path / "loras")], "ties", tmp_path / "b", **settings)
    assert of_run.loras == of_files.loras == ["copy", "reverse"] and of_run.rank == 3
    assert of_run.errors == pytest.approx(of_files.errors, abs=1e-4) and max(of_run.errors.values()) > 0.01
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    modules = {name.partition(".lora_")[0] for name in one}
    for module in modules:
        deltas = [x[f"{module}.lora_B.weight"] @ x[f"{module}.lora_A.weight"] for x in (one, two)]
        close(*deltas)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "loras" / "base")
    # An exported adapter names a copy of the run's base: the same weights are the same base.
    mixed = merge([str(run_of("both")), str(tmp_path / "loras" / "copy")], "svd_mean", tmp_path / "c")
    assert mixed.loras == ["copy", "reverse", f"{tmp_path / 'loras' / 'copy'}: copy"]


@torch.no_grad()
def test_experts_of_a_bank(run_of, tmp_path) -> None:
    result = merge([str(run_of("both"))], "concatenation", tmp_path / "run", "run", over="experts")
    assert result.loras == ["expert 0", "expert 1"] and result.rank == 4
    trained, found = load_run(run_of("both")), load_run(tmp_path / "run")
    inputs = inputs_of(trained.plain_base())
    with trained.model.uniform_gates():
        expected = trained.model(**inputs, task_ids=["copy"] * 3).logits
    close(found.model(**inputs, task_ids=["reverse"] * 3).logits, expected)


@torch.no_grad()
def test_heads_stay_the_tasks_own(run_of, tmp_path) -> None:
    merge([str(run_of("pooled"))], "task_arithmetic", tmp_path / "run", "run", coefficients=[0.5])
    trained, found = load_run(run_of("pooled")), load_run(tmp_path / "run")
    inputs = inputs_of(trained.model.base_model.encoder)
    tasks = [merged_task(trained.model, t) for t in range(2)]
    for number, task in enumerate(tasks):
        plain: Any = merged_task(trained.model, number)  # its head is the task's
        plain.encoder = summed(trained.plain_base(), [t.encoder for t in tasks], [0.5, 0.5])
        labels = task.classifier.out_features
        logits = found.model(**inputs, task_ids=[number] * 3).logits[:, :labels]
        close(logits, plain(**inputs).logits)
    merge([str(run_of("pooled"))], "task_arithmetic", tmp_path / "lora")
    assert "heads are not in it" in (tmp_path / "lora" / "README.md").read_text()


@torch.no_grad()
def test_modules_that_were_trained_whole_come_along_with_one_run(run_of, tmp_path) -> None:
    merge([str(run_of("saved"))], "svd_mean", tmp_path / "run", "run")
    merge([str(run_of("saved"))], "concatenation", tmp_path / "run", "run", force=True)
    merge([str(run_of("saved"))], "concatenation", tmp_path / "lora", run=str(run_of("saved")))
    found = load_run(tmp_path / "run").model
    assert not torch.equal(found.base_model.lm_head.saved.weight, found.base_model.lm_head.original.weight)
    plain = of_peft(tmp_path / "lora", tmp_path / "lora" / "base")
    inputs = inputs_of(plain)
    close(plain(**inputs).logits, found(**inputs, task_ids=[0] * 3).logits)
    with pytest.raises(MergeError, match=r"lm_head was trained whole \(moe.modules_to_save\)"):
        merge([str(run_of("saved")), str(run_of("copy"))], "svd_mean", tmp_path / "no")


@pytest.fixture
def looked_at(monkeypatch) -> list[list[int]]:
    """Tasks that were scored; a score is best at a coefficient of 0.5."""
    seen: list[list[int]] = []

    def evaluate(
        model: Any, splits: Any, tokenizer: Any, config: Any, collator: Any, ranks: Any, tasks: Any
    ) -> Any:
        seen.append(list(tasks))
        bank = next(m.bank for m in model.modules() if hasattr(m, "bank"))
        norm = float(bank.B_ErN.detach().norm())
        norms.append(norm)
        score = 1.0 - abs(norm / norms[0] - 5.0)
        own = {model.tasks.names[t]: {"metric": "x", "x": score, "loss": -score} for t in tasks}
        return {"tasks": own, "score": round(score), "macro": {"loss": -score}}

    norms: list[float] = []
    monkeypatch.setattr(of_merging, "evaluate", evaluate)
    return seen


def chosen(result: Result) -> float:
    assert [choice.coefficient for choice in result.choices] == [0.1, 0.48, 0.5, 0.9]
    assert result.choices[1].score == result.choices[2].score  # so that the loss decides
    return result.coefficient


def test_the_coefficient_is_chosen_on_held_in_tasks_alone(run_of, tmp_path, looked_at) -> None:
    grid = [0.1, 0.48, 0.5, 0.9]
    run = str(run_of("both"))
    found = merge([run], "task_arithmetic", tmp_path / "a", coefficients=grid, held_in=["reverse"])
    assert chosen(found) == 0.5 and looked_at == [[1]] * 4
    merge([run], "task_arithmetic", tmp_path / "b", coefficients=[0.5])
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert "was chosen on the `validation` rows of reverse" in (tmp_path / "a" / "README.md").read_text()
    looked_at.clear()
    assert merge([run], "ties", tmp_path / "c", coefficients=grid).held_in == ["copy", "reverse"]
    assert looked_at == [[0, 1]] * 4


def test_two_runs_of_one_task_choose_by_it_once(run_of, tmp_path, looked_at) -> None:
    twice = [str(run_of("copy")), str(next(run_of("copy").glob("checkpoint-*")))]
    found = merge(twice, "ties", tmp_path / "out", coefficients=[0.5, 1.0])
    assert len(found.loras) == 2 and found.held_in == ["copy"] and looked_at == [[0]] * 2


def test_real_rows_and_the_command_line(run_of, tmp_path, capfd) -> None:
    words = ["merge", *(str(run_of(name)) for name in ("copy", "reverse")), "--run", str(run_of("both"))]
    capfd.readouterr()  # what training said
    words += ["--method", "ties"]
    words += ["--options", "density=0.5,space=factors", "--coefficient", "0.5,1", "--held_in", "copy"]
    assert main([*words, "--out", str(tmp_path / "out"), "--max_rank", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["options"] == {"density": 0.5, "space": "factors"} and found["rank"] == 1
    assert [c["coefficient"] for c in found["choices"]] == [0.5, 1.0]
    assert all(set(c["scores"]) == {"copy"} and c["loss"] > 0 for c in found["choices"])
    assert found["choices"][0]["loss"] != found["choices"][1]["loss"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "is not empty; give another folder, or --force" in capfd.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out"), "--force"]) == 0
    assert "coefficients, on the validation rows of copy" in capfd.readouterr().out


def test_lora_of_another_base(run_of, tmp_path) -> None:
    for other in ("elsewhere", "based"):
        with pytest.raises(MergeError, match=f"{other}/run was not trained on the base of .*copy/run"):
            merge([str(run_of("copy")), str(run_of(other))], "ties", tmp_path / "out")
    export_run(run_of("elsewhere"), "copy", tmp_path / "lora", check=False)
    with pytest.raises(MergeError, match=r"lora was not trained on the base of .*copy/run"):
        merge([str(run_of("copy")), str(tmp_path / "lora")], "ties", tmp_path / "out")
    # Of the same weights, but around it another class, under which linears have other names.
    export_run(run_of("copy"), "copy", tmp_path / "named", check=False)
    weights = tmp_path / "named" / "adapter_model.safetensors"
    save_file({n.replace("model.layers", "llama.layers"): t for n, t in load_file(weights).items()}, weights)
    with pytest.raises(MergeError, match=r"llama.layers.* of the LoRAs, 24 x 16, is no linear"):
        merge([str(run_of("copy")), str(tmp_path / "named")], "svd_mean", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged(run_of, tmp_path) -> None:
    run, out = str(run_of("both")), tmp_path / "out"
    with pytest.raises(MergeError, match="copy is the only LoRA: there is nothing to merge"):
        merge([run], "ties", out, tasks=["copy"])
    with pytest.raises(TaskError, match="unknown task 'cpy'; the nearest of 2 are copy"):
        merge([run], "ties", out, tasks=["copy", "cpy"])
    with pytest.raises(TaskError, match="unknown task 'revers'"):
        merge([run], "ties", out, coefficients=[1.0, 2.0], held_in=["revers"])
    with pytest.raises(MergeError, match="--held_in: has no effect with one coefficient"):
        merge([run], "ties", out, held_in=["copy"])
    with pytest.raises(MergeError, match="--held_in: name the tasks that choose the coefficient"):
        merge([run], "ties", out, over="experts", coefficients=[1.0, 2.0])
    separate = [str(run_of(name)) for name in ("copy", "reverse")]
    with pytest.raises(MergeError, match=r"reverse was merged, but .*copy/run, whose rows .*, has no such"):
        merge(separate, "ties", out, coefficients=[1.0, 2.0])
    with pytest.raises(MergeError, match="--held_in: reverse has no test rows; leave it out"):
        merge([run], "ties", out, coefficients=[1.0, 2.0], held_in=["reverse"], split="test")
    with pytest.raises(ConfigError, match=r"merge.method: 'tie' is not one of .*; the nearest is 'ties'"):
        merge([run], "tie", out)
    with pytest.raises(MergeError, match=r"both/rum: no such folder; the nearest is .*both/run"):
        merge([run.removesuffix("n") + "m"], "ties", out)
    for kind in ("run", "peft"):
        with pytest.raises(ExportError, match="run holds a run; give another folder"):
            merge([run], "ties", run, kind, force=True)
    with pytest.raises(ExportError, match="is not empty"):
        merge([run], "ties", run)
    export_run(run_of("both"), "all", tmp_path / "loras", check=False)
    with pytest.raises(MergeError, match="no run is given, and it has the tasks and the data"):
        merge([str(tmp_path / "loras")], "ties", out, "run")
    with pytest.raises(MergeError, match="no run is given, and several coefficients are tried"):
        merge([str(tmp_path / "loras")], "ties", out, coefficients=[1.0, 2.0])
    assert not out.exists()
