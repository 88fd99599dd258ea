"""New tasks in a trained run: each mode does what it says, and tells the truth about it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.representations.files import read_vectors
from taskmoe.train.adapt.data import draw_shots, read_new_tasks
from taskmoe.train.adapt.modes import MODES
from taskmoe.train.adapt.settings import AdaptError, AdaptSettings
from taskmoe.train.adapt.study import adapt
from taskmoe.train.commands import adapt as command
from taskmoe.train.config import Config, DataConfig, DatasetConfig, TokenizerConfig
from taskmoe.train.config_io import load
from taskmoe.train.export import export_run
from taskmoe.train.loop import train
from taskmoe.train.models import build_model
from taskmoe.train.run_eval import score_run
from taskmoe.train.task_vectors import text_vectors
from taskmoe.train.trained_run import load_run, open_run

LEARNS = ("router", "router+experts", "mean", "new_lora")


@torch.no_grad()
def logits(run: Path, task: str) -> torch.Tensor:
    model = load_run(run).model
    return model(**example_inputs(model.base_model), task_ids=[task] * 3).logits


@pytest.fixture(scope="module")
def study(run, settings, tmp_path_factory):
    """All modes at once, saved."""
    out = tmp_path_factory.mktemp("out") / "adapted"
    found = adapt(run, settings(), tuple(MODES), (8,), (0,), out)
    assert not found.remarks
    return found, out


def of(study, mode: str, task: str):
    (score,) = (s for s in study[0].scores if (s.mode, s.task) == (mode, task))
    return score


def test_every_mode_scores_every_new_task(study):
    found, _ = study
    assert {(s.mode, s.task) for s in found.scores} == {(m, t) for m in MODES for t in ("citrus", "date")}
    assert found.split == "test" and all(s.rows == 12 and s.metric == "exact_match" for s in found.scores)
    assert tuple(MODES) == command.MODES, "the command names the modes without importing them"


@pytest.mark.parametrize("mode", LEARNS)
def test_what_is_learned_serves_the_task(study, mode):
    citrus = of(study, mode, "citrus")
    assert citrus.value == 1.0 and citrus.steps > 0 and citrus.parameters > 0
    assert citrus.loss < of(study, "zero", "citrus").loss
    assert citrus.validation_loss < 0.7


def test_tasks_that_others_are_like(study):
    assert of(study, "nearest", "citrus").start == "berry"
    assert of(study, "nearest", "citrus").value == 1.0
    assert of(study, "retrieve", "date").start == "apple"
    for mode in ("nearest", "retrieve", "zero"):
        for task in ("citrus", "date"):
            score = of(study, mode, task)
            assert (score.steps, score.parameters, score.validation_loss) == (0, 0, None)
    assert of(study, "zero", "citrus").shots == 0 and of(study, "zero", "citrus").start is None


def test_other_tasks_are_as_they_were_bit_for_bit(study, run):
    for mode in ("router", "nearest", "retrieve", "zero"):
        adapted = Path(of(study, mode, "citrus").folder)
        for task in ("apple", "berry"):
            assert torch.equal(logits(adapted, task), logits(run, task)), (mode, task)
    assert not torch.equal(logits(adapted, "citrus"), logits(run, "apple"))
    changed = Path(of(study, "router+experts", "citrus").folder)
    assert not torch.equal(logits(changed, "apple"), logits(run, "apple")), "it says that the others change"


@pytest.mark.parametrize("mode", MODES)
def test_a_result_is_a_run_that_scores_the_same(study, mode):
    score = of(study, mode, "citrus")
    _, found = score_run(score.folder, split="test")
    assert found["tasks"]["citrus"]["loss"] == pytest.approx(score.loss, rel=1e-5)
    assert found["tasks"]["citrus"]["exact_match"] == score.value
    known = {"apple", "berry"} if mode not in ("mean", "new_lora") else set()
    assert set(found["tasks"]) == known | {"citrus", "date"}
    saved = json.loads((Path(score.folder) / "eval_results.json").read_text())
    assert saved["experts"]["tasks"]["citrus"]["exact_match"] == score.value
    state = json.loads((load_run(score.folder).checkpoint / "trainer_state.json").read_text())
    assert state["adapted"]["mode"] == mode and state["step"] >= 40 + score.steps


def test_a_result_is_exported_and_not_trained_on(study, run, tmp_path):
    folder = of(study, "mean", "date").folder
    (found,) = export_run(folder, "date", tmp_path / "lora")
    assert found.difference < 1e-5 and (tmp_path / "lora" / "adapter_config.json").is_file()
    config = load(Path(of(study, "router", "date").folder) / "config.yaml")
    with pytest.raises(ConfigError, match="made by taskmoe adapt and has no optimiser"):
        train(replace(config, resume_from_checkpoint=config.output_dir, output_dir=str(tmp_path / "on")))


def test_a_result_can_be_adapted_further(study, settings, new_tasks):
    folder = of(study, "router", "citrus").folder
    again = replace(new_tasks[0], name="elder")
    (score,) = adapt(folder, settings(datasets=(again,)), ["nearest"], (8,)).scores
    assert score.start in ("berry", "citrus") and score.value == 1.0
    with pytest.raises(AdaptError, match="'citrus' is a task of the run"):
        adapt(folder, settings(), ["zero"])


def test_each_task_is_learned_as_if_it_were_alone(run, settings, new_tasks, study):
    for mode, own, task in (("router", 0, "citrus"), ("mean", 0, "citrus"), ("new_lora", 1, "date")):
        (alone,) = adapt(run, settings(datasets=new_tasks[own : own + 1]), [mode], (8,)).scores
        together = of(study, mode, task)
        assert alone.steps == together.steps
        assert alone.loss == pytest.approx(together.loss, rel=1e-3)
        assert alone.validation_loss == pytest.approx(together.validation_loss, rel=1e-3)


def test_the_same_call_gives_the_same_and_another_seed_another(run, settings):
    first, again = (adapt(run, settings(max_steps=5), ["new_lora"], (4,), (0, 1)) for _ in range(2))
    assert first.scores == again.scores
    losses = {s.seed: s.loss for s in first.scores if s.task == "date"}
    assert len(losses) == 2 and losses[0] != losses[1]


def test_the_best_of_the_validation_rows_is_kept(run, settings):
    """At a rate that ruins everything nothing is kept."""
    (score,) = adapt(
        run, settings(datasets=settings().datasets[:1], learning_rate=1e4, router_learning_rate=1e4,
                      max_steps=10), ["new_lora"], (8,),
    ).scores  # fmt: skip
    assert score.steps == 0
    (kept,) = adapt(
        run, settings(datasets=settings().datasets[:1], learning_rate=1e4, max_steps=10, validation=0.0),
        ["new_lora"], (8,),
    ).scores  # fmt: skip
    assert kept.steps == 10 and kept.loss > score.loss


def test_a_token_router_has_nothing_of_a_task(run_with, tmp_path, settings):
    folder = run_with(
        tmp_path, TaskMoEConfig(r=2, num_experts=2, router="token_linear"), ("base", "experts", "router")
    )
    for mode in ("router", "nearest", "retrieve"):
        with pytest.raises(AdaptError, match=f"--mode {mode}: .* nothing that belongs to one task"):
            adapt(folder, settings(), [mode], (8,))
    found = adapt(folder, settings(max_steps=2), ["router", "mean", "router+experts", "zero"], (8,))
    assert [line.partition(":")[0] for line in found.remarks] == ["router"]
    assert {s.mode for s in found.scores} == {"mean", "router+experts", "zero"}


def test_a_given_map_sends_new_tasks_to_an_expert(run_with, tmp_path, settings):
    experts = {"apple": 0, "berry": 1}
    moe = TaskMoEConfig(r=2, num_experts=2, router="fixed", gate="raw", router_options={"experts": experts})
    folder = run_with(tmp_path, moe, ("base", "experts"))
    with pytest.raises(AdaptError, match="'fixed' is a map that is given"):
        adapt(folder, settings(), ["zero"], (8,))
    found = adapt(folder, settings(), ["nearest"], (8,), out=tmp_path / "out")
    assert {s.task: s.start for s in found.scores}["citrus"] == "berry"
    saved = load_run(tmp_path / "out")
    assert saved.config.moe.router_options["experts"]["citrus"] == 1
    assert torch.equal(logits(tmp_path / "out", "citrus"), logits(folder, "berry"))


def test_zero_reads_nothing_where_the_run_starts_new_tasks_at_the_nearest(run, settings, monkeypatch):
    opened = open_run(run)
    moe = replace(opened.config.moe, new_task_rows="nearest")
    near = replace(opened, config=replace(opened.config, moe=moe))
    monkeypatch.setattr("taskmoe.train.adapt.study.open_run", lambda path: near)
    only = settings(datasets=settings().datasets[:1], max_steps=1)
    zero, router = adapt(run, only, ["zero", "router"], (8,)).scores
    assert (zero.shots, zero.start) == (0, None) and (router.shots, router.start) == (8, "berry")


def test_results_are_replaced_only_when_asked(run, settings, tmp_path):
    out = tmp_path / "out"
    adapt(run, settings(), ["zero"], out=out)
    with pytest.raises(AdaptError, match="is not empty; give another folder, or --force"):
        adapt(run, settings(), ["zero"], out=out)
    for wrong in ({"run": tmp_path / "no run"}, {"shots": (99,)}):
        with pytest.raises((ConfigError, AdaptError), match=r"no such run folder|--shots 99"):
            adapt(**{"run": run, "settings": settings(), "modes": ["zero"], "out": out, **wrong}, force=True)
        assert (out / "adapt.json").is_file(), "nothing goes before something can take its place"
    for inside in (out, next(out.glob("checkpoint-*"))):
        with pytest.raises(AdaptError, match="holds the run that is adapted"):
            adapt(inside, settings(), ["zero"], out=out, force=True)
    adapt(run, settings(), ["nearest"], (8,), out=out, force=True)
    assert json.loads((out / "adapt.json").read_text())["scores"][0]["mode"] == "nearest"
    (out / "adapt.json").unlink()
    with pytest.raises(AdaptError, match="holds other things than results of adapt"):
        adapt(run, settings(), ["zero"], out=out, force=True)
    assert (out / "config.yaml").is_file()


def test_vectors_of_new_tasks_are_made_of_the_shots_as_the_run_made_its_own(
    run_with, tmp_path, settings, new_tasks
):
    options = {"rows": 4, "targets": True}
    moe = TaskMoEConfig(
        r=2, num_experts=2, representation="text", representation_options=options, router="task_linear"
    )
    folder = run_with(tmp_path, moe, ("base", "experts", "router"))
    out = tmp_path / "out"
    (score,) = adapt(folder, settings(datasets=new_tasks[:1]), ["zero"], (3,), out=out).scores
    assert (score.parameters, score.shots) == (0, 3)
    before = read_vectors(load_run(folder).checkpoint / "task_vectors.safetensors")
    after = read_vectors(load_run(out).checkpoint / "task_vectors.safetensors")
    assert set(after) - set(before) == {"citrus"}
    assert all(torch.equal(after[name], vector) for name, vector in before.items())
    opened = open_run(folder)  # the shots with their answers, read by the base as it was at the start
    untrained = build_model(opened.config, opened.tokenizer, opened.tasks)
    new = read_new_tasks(opened, settings(datasets=new_tasks[:1]))
    drawn = draw_shots(new.train(2), "citrus", 3, 0).all
    assert drawn != [0, 1, 2]
    texts = {"citrus": [f"w{i % 4} w{i % 3} no" for i in drawn]}
    expected = text_vectors(untrained, opened.tokenizer, texts)["citrus"]
    assert torch.allclose(after["citrus"], expected, atol=1e-6)
    for task in ("apple", "berry"):
        assert torch.equal(logits(out, task), logits(folder, task))
    (on,) = adapt(out, settings(datasets=new_tasks[1:]), ["zero"], (3,), out=tmp_path / "on").scores
    assert on.task == "date" and torch.equal(logits(tmp_path / "on", "citrus"), logits(out, "citrus"))
    assert score_run(out, split="test")[1]["tasks"]["citrus"]["loss"] == pytest.approx(score.loss, rel=1e-5)
    with pytest.raises(AdaptError, match=r"--mode router: .* nothing that belongs to one task"):
        adapt(folder, settings(datasets=new_tasks[:1]), ["router"], (8,))


def test_classifiers_learn_a_head_whatever_the_mode(tmp_path):
    """The labels are new, so without a head no answer is right."""
    labels = {"irony": ("no", "yes"), "mood": ("bad", "ok"), "tone": ("cold", "warm")}
    for task, names in labels.items():
        (tmp_path / task).mkdir()
        rows = [{"text": f"{word} w{i % 3}", "label": label} for i in range(8) for word, label in
                zip(("dark", "light"), names, strict=True)]  # fmt: skip
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = {name: DatasetConfig(name=name, path=str(tmp_path / name)) for name in labels}
    config = Config(
        model={
            "type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
        task_type="SEQ_CLS",
        moe=TaskMoEConfig(r=2, num_experts=2),
        datasets=(entries["irony"], entries["mood"]),
        data=DataConfig(max_length=16, cache_dir=str(tmp_path / "cache")),
        max_steps=2,
        report_to=(),
        output_dir=str(tmp_path / "run"),
        eval_split="test",
    )  # fmt: skip
    assert train(config) == 0
    new = AdaptSettings(datasets=(entries["tone"],), max_steps=30, learning_rate=0.03)
    modes = [mode for mode in MODES if mode != "nearest"]
    found = adapt(tmp_path / "run", new, modes, (16,), out=tmp_path / "out")
    assert [s.mode for s in found.scores] == modes and not found.remarks
    assert all(s.steps > 0 and s.loss < math.log(2) for s in found.scores), "better than by chance"
    assert {s.mode for s in found.scores if s.value == 1.0} >= {"router+experts", "mean", "new_lora"}
    head = next(s.parameters for s in found.scores if s.mode == "zero")
    assert all(s.parameters > head for s in found.scores if s.mode in LEARNS) and head > 0
    for score in found.scores:
        assert score_run(score.folder, split="test")[1]["tasks"]["tone"]["accuracy"] == score.value
    with pytest.raises(AdaptError, match="no task of the run has the labels cold, warm of 'tone'"):
        adapt(tmp_path / "run", new, ["nearest"], (16,))
