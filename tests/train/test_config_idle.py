"""Keys that the other settings leave without effect are errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskmoe.train.config_io import load

METHODS = Path(__file__).parents[2] / "configs" / "methods"

L2 = "compose: before, gate: sigmoid, gate_options: {normalise: l2}"


@pytest.mark.parametrize(
    "text, key",
    [
        ("mixing: {strategy: equal, cap: 3}", "mixing.cap"),
        ("mixing: {cap: 3}", "mixing.cap"),
        ("mixing: {temperature: 2}", "mixing.temperature"),  # also at its default
        ("mixing: {strategy: equal, max_epochs: 3}", "mixing.max_epochs"),
        ("mixing: {weights: {a: 1}}", "mixing.weights.a|mixing.weights"),
        ("mixing: {strategy: equal}\nphases: [{mixing: {strategy: proportional}}]", "mixing.strategy"),
        ("phases: [{mixing: {cap: 3}}]", "phases.0.mixing.cap"),
        ("moe: {top_k: 2}", "moe.top_k"),
        ("moe: {router_hidden_dim: 8}", "moe.router_hidden_dim"),
        ("moe: {task_embedding_dim: 8}", "moe.task_embedding_dim"),
        ("moe: {router: task_mlp, router_init_std: 1}", "moe.router_init_std"),
        ("moe: {gate: uniform, router_temperature: 2}", "moe.router_temperature"),
        ("task_embedding_learning_rate: 1", "task_embedding_learning_rate"),
        ("base_learning_rate: 1", "base_learning_rate"),
        ("phases: [{base_learning_rate: 1}]", "phases.0.base_learning_rate"),
        ("phases: [{train: [experts], router_learning_rate: 1}]", "phases.0.router_learning_rate"),
        ("phases: [{restart_schedule: true}]", "phases.0.restart_schedule"),
        ("phases: [{reinit: [experts]}]", "phases.0.reinit"),
        ("phases: [{adapters: false, train: [base], gate: gumbel}]", "phases.0.gate"),
        ("phases: [{gate: raw, router_temperature: [2, 1]}]", "phases.0.router_temperature"),
        (
            "phases: [{router_temperature_schedule: exponential}]",
            "phases.0.router_temperature_schedule",
        ),
        ("moe: {router: random_tasks, gate: raw}\nrouter_learning_rate: 1", "router_learning_rate"),
        ("moe: {router: fixed, gate: raw, router_temperature: 2}", "moe.router_temperature"),
        (f"moe: {{{L2}, router_temperature: 2}}", "moe.router_temperature"),
        (f"moe: {{{L2}}}\nphases: [{{router_temperature: [2, 1]}}]", "phases.0.router_temperature"),
        (
            "moe: {router: fixed, gate: raw}\nphases: [{router_temperature: [2, 1]}]",
            "phases.0.router_temperature",
        ),
        ("moe: {router: fixed, gate: raw}\nsurgery: {method: sum, scope: routers}", "surgery.scope"),
        (
            "phases: [{adapters: false, train: [base], router_temperature: [1, 1]}]",
            "phases.0.router_temperature",
        ),
        ("pooling: mean", "pooling"),
        ("trust_remote_code: true", "trust_remote_code"),
        ("gradient_checkpointing_reentrant: true", "gradient_checkpointing_reentrant"),
        ("optim: sgd\nadam_beta1: 0.8", "adam_beta1"),
        ("warmup_steps: 3\nwarmup_ratio: 0.03", "warmup_ratio"),
        ("report_to: []\ntrack: {wandb_project: x}", "track.wandb_project"),
        ("early_stopping_patience: 3", "early_stopping_patience"),
        ("datasets: [{path: a, name: a, weight: 2}]", "datasets.0.weight"),
        ("surgery: {scope: experts}", "surgery.scope"),
        ("surgery: {options: {reduction: mean}}", "surgery.options"),
        ("surgery: {method: sum, scope: routers}", "surgery.scope"),  # rows of a table are each one task's
        ("surgery: {method: sum, scope: experts}\nphases: [{train: [router]}]", "surgery.scope"),
    ],
)
def test_keys_without_effect(write_run, fails, text: str, key: str) -> None:
    message = fails(load, write_run(text))
    assert any(f": {k}: has no effect: " in message for k in key.split("|")), message
    assert "null" in message


def test_what_one_option_makes_idle_another_gate_of_a_phase_may_read(write_run) -> None:
    text = f"moe: {{{L2}}}\nphases: [{{gate: sigmoid, router_temperature: [2, 1]}}]"
    assert load(write_run(text)).phases[0].router_temperature == (2.0, 1.0)


@pytest.mark.parametrize(
    "text, key",
    [
        ("model_name_or_path: m\ntokenizer: {kind: char}\ndata: {root: x}", "tokenizer.kind"),
        ("model: {type: t}\ndata: {root: x, max_target_length: 3}", "data.max_target_length"),
        (
            "model: {type: t}\ndata: {root: x, packing: true, group_by_length_window: 2}",
            "data.group_by_length_window",
        ),
        (
            "model: {type: t}\ntask_type: SEQ_CLS\ndata: {root: x}\nevaluation: {num_beams: 2}",
            "evaluation.num_beams",
        ),
        (
            "model: {type: t}\nmixing: {strategy: explicit, weights: {a: 1}}\n"
            "datasets: [{path: x, name: a, weight: 1}]",
            "datasets.0.weight",
        ),
        ("model: {type: t}\ndata: {skill_gym: {conflict: 0.5}}", "data.skill_gym.conflict"),
    ],
)
def test_more_keys_without_effect(write, fails, text: str, key: str) -> None:
    assert f": {key}: has no effect: " in fails(load, write(text))


def test_heads_that_the_router_gives_one_routing(write_run, fails) -> None:
    text = "moe: {compose: before, num_heads: 8, router: none, gate: uniform}"
    assert "moe.num_heads: has no effect: " in fails(load, write_run(text))


def test_a_scope_that_the_router_ignores(write_run, fails) -> None:
    message = fails(load, write_run("moe: {router: none, gate: uniform, router_scope: layer}"))
    assert "moe.router_scope: has no effect: " in message


def overrides(given: str) -> list[str]:
    """``key value,key value`` as tokens of a command line."""
    return [token for part in re.split(r",(?=[a-z])", given) for token in f"--{part}".split(" ", 1)]


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("task_prompt", "representation text,representation_options {path: v.json, rows: 5}",
         "moe.representation_options.rows: 5 has no effect: path names vectors"),
        ("task_prompt", "representation text,representation_options {path: v.json, model: base}",
         "moe.representation_options.model: 'base' has no effect: path names vectors"),
        ("mor1e", "router_options {cluster_scale: 0, dim: 8}", "moe.router_options.dim: 8 has no effect: "),
        ("mor1e", "router_options {cluster_scale: 0, encoder: x}", "moe.router_options.encoder: 'x' has"),
        ("hydralora", "new_task_rows zero", "moe.new_task_rows: has no effect"),
        ("lora", "new_task_rows mean", "moe.new_task_rows: has no effect"),  # at its default too
        ("task_prompt", "new_task_rows zero", "moe.new_task_rows: has no effect"),  # vectors that are given
        ("adapter_fusion", "bank_options.per_task false,new_task_rows zero", "moe.new_task_rows: has no"),
        ("lora", "phases.0.train [base, experts, router]",
         "phases.0.train: 'router' has no effect: moe.router is 'none', which does not train; leave it out"),
        ("poly", "phases.0.train [task_embedding, experts]",
         "phases.0.train: 'task_embedding' has no effect: moe.b"),
        ("task_prompt", "phases.0.train [task_embedding, experts]",
         "phases.0.train: 'task_embedding' has no effect: moe.representation is 'frozen'"),
        ("moram", "phases.0.train [router, experts]",
         "phases.0.train: 'router' has no effect: moe.bank 'own_keys'"),
        ("imported", "phases.0.train [experts, router]",
         "phases.0.train: 'experts' has no effect: moe.bank is 'imported' with {'adapters': "),
        ("mola", "phases.0.train [experts, heads]",
         "phases.0.train: 'heads' has no effect: task_type is 'CAUSAL_LM'"),
        ("mola", "phases.0.train [experts, saved]",
         "phases.0.train: 'saved' has no effect: moe.modules_to_save"),
        ("mhr_z", "phases.1.reinit [task_embedding]", "phases.1.reinit: 'task_embedding' has no effect"),
        ("mor1e", "task_embedding_learning_rate 1", "task_embedding_learning_rate: has no effect"),
        ("hyperformer", "router_learning_rate 1", "router_learning_rate: has no effect"),
        ("gate_per_task", "phases.0.train [router],surgery {method: sum, scope: routers}",
         "surgery.scope: has no effect: no phase trains routers that tasks share"),
    ],
)  # fmt: skip
def test_what_a_method_leaves_without_effect(method: str, given: str, message: str, fails) -> None:
    assert message in fails(load, METHODS / f"{method}.yaml", overrides(given))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("task_prompt", "representation text,representation_options {rows: 5}"),
        ("task_prompt", "representation text,representation_options {path: v.json, normalise: true}"),
        ("mor1e", "router_options {cluster_scale: 1, dim: 8}"),
        ("poly", "new_task_rows random"),
        ("moelora", "new_task_rows random"),
        ("gate_per_task", "new_task_rows random"),
        ("prompt_tuning", "new_task_rows random"),
        ("adapter_fusion", "new_task_rows random"),
        (
            "hydralora",
            "task_type SEQ_CLS,evaluation.max_new_tokens null,new_task_rows zero",
        ),  # heads have rows
        ("adapter_fusion", "router_learning_rate 1"),  # of the attention
        ("hyperformer", "router_learning_rate 1,task_embedding_learning_rate null"),  # and so of the vectors
        ("lora", "phases [{}]"),  # by default a phase trains what there is
        ("lora", "phases.0.train [experts, saved],modules_to_save [lm_head]"),
    ],
)
def test_what_has_an_effect_may_be_set(method: str, given: str) -> None:
    load(METHODS / f"{method}.yaml", overrides(given))


def test_a_phase_in_which_nothing_trains(fails) -> None:
    given = overrides("router none,gate uniform,phases [{}]")
    message = fails(load, METHODS / "imported.yaml", given)
    assert "phases.0.train: nothing trains in this phase: moe.bank is 'imported' with" in message
    load(METHODS / "imported.yaml", [*given, "--max_steps", "0"])
