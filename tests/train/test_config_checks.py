"""Values that settings may have, and what they need of each other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    DatasetConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
)
from taskmoe.train.config_checks import CHOICES, RANGES, validate
from taskmoe.train.config_decode import known_paths
from taskmoe.train.config_idle import ineffective
from taskmoe.train.config_io import load

METHODS = Path(__file__).parents[2] / "configs" / "methods"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "task_type: CAUSAL",
            "task_type: 'CAUSAL' is not one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, FEATURE_EXTRACTION; the",
        ),
        ("mixing: {strategy: unimx}", "mixing.strategy: 'unimx' is not one of"),
        ("optim: adamw", "optim: 'adamw' is not one of adamw_torch, sgd; the nearest is 'adamw_torch'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: 'cosin' is not one of linear, cosine, constant"),
        ("phases: [{train: [expert]}]", "phases.0.train: 'expert' is not one of"),
        ("phases: [{mixing: {strategy: x}}]", "phases.0.mixing.strategy: 'x' is not one of"),
        ("datasets: [{path: a, format: chat}]", "datasets.0.format: 'chat' is not one of auto"),
        ("moe: {gate: soft_max}", "moe.gate: 'soft_max' is not one of softmax, .*; the nearest is 'softmax'"),
        ("moe: {router: mlp}", "moe.router: 'mlp' is not one of task_table, task_mlp"),
        ("moe: {r: 0}", "moe.r: 0 is out of range; give a whole number >= 1"),
        ("moe: {lora_dropout: 1}", r"moe.lora_dropout: 1.0 is out of range; give a number >= 0 and < 1"),
        ("moe: {rank_pattern: {a: 0}}", "moe.rank_pattern.a: 0 is out of range"),
        ("learning_rate: -1", "learning_rate: -1.0 is out of range; give a number >= 0"),
        ("warmup_ratio: 1.5", "warmup_ratio: 1.5 is out of range; give a number between 0 and 1"),
        ("adam_epsilon: 0", "adam_epsilon: 0.0 is out of range; give a number > 0"),
        ("phases: [{router_temperature: [1, 0]}]", "phases.0.router_temperature: 0.0 is out of range"),
        ("task_weights: {a: -1}", "task_weights.a: -1.0 is out of range"),
        ("warmup_steps: 11", "warmup_steps: 11 is more than max_steps, 10"),
        ("model_name_or_path: m", "model: both are set of model_name_or_path and model"),
        ("moe: {gate: top_k}", "moe.top_k: None with gate 'top_k'"),
        ("moe: {gate: top_k, top_k: 9}", "moe.top_k: 9 must be between 2 and num_experts = 8"),
        ("moe: {num_heads: 2}", "moe.num_heads: 2 needs compose: before"),
        ("mixing: {strategy: capped}", "mixing.cap: is missing"),
        ("mixing: {strategy: explicit}", "mixing.weights: is missing"),
        ("task_type: SEQ_2_SEQ_LM\ndata2: 1", "data2: unknown key"),
        ("phases: [{steps: 3}, {steps: 3}]", "phases: their steps add up to 6, but max_steps is 10"),
        ("phases: []", "phases: the list is empty"),
        ("phases: [{adapters: false}]", "phases.0.train: experts, router, task_embedding cannot train while"),
        ("report_to: [wandb, none]", "report_to: 'none' stands beside others"),
        ("deepspeed: nowhere/zero1.json", "deepspeed: cannot read nowhere/zero1.json"),
        ("surgery: {method: pcgard}", "surgery.method: 'pcgard' is not one of .*; the nearest is 'pcgrad'"),
        ("surgery: {method: gradvaq}", "surgery.method: 'gradvaq' is not .*; the nearest is 'gradvac'"),
        ("surgery: {method: pcgrad, options: {c: 1}}", "surgery.options.c: 'pcgrad' has no such option"),
        ("surgery: {method: sum, scope: heads}", "surgery.scope: 'heads' is not one of all, experts"),
        ("surgery: {method: sum, way: fast}", "surgery.way: 'fast' is not one of auto, fused, separate"),
        ("surgery: {method: sum, max_tasks: 0}", "surgery.max_tasks: 0 is out of range"),
        ("surgery: {method: gradvac, refresh_every: 2}", "surgery.refresh_every: 2, but 'gradvac' has no"),
        ("phases: [{gate: top_k}]", "phases.0.gate: moe.top_k: None with gate 'top_k'; set both"),
        ("phases: [{gate: gumble}]", "phases.0.gate: 'gumble' is unknown; known are softmax"),
        ("moe: {router: fixed, gate: raw}\nphases: [{gate: softmax}]", "phases.0.gate: 'softmax' with"),
        ("surgery: {method: graddrop, scope: layer}", "surgery.scope: 'layer' has no effect on 'graddrop'"),
        (
            "surgery: {method: sum, way: fused}\nphases: [{train: [base, experts]}]",
            "surgery.way: 'fused' splits experts and routers, and base trains too; set way to auto",
        ),
    ],
)
def test_values_that_cannot_be_used(write_run, fails, text: str, message: str) -> None:
    path = write_run(text)
    found = fails(load, path)
    assert re.match(rf"({re.escape(str(path))}:\d+: )?{message.replace('[', chr(92) + '[')}", found), found


def test_model_and_data_are_required(write, fails) -> None:
    assert "model_name_or_path: neither is set" in fails(load, write("data: {skill_gym: {}}"))
    assert "model.type: is missing" in fails(load, write("model: {}\ndata: {skill_gym: {}}"))
    assert "datasets: there are no data" in fails(load, write("model: {type: llama}"))
    message = fails(load, write("model: {type: llama}\ndatasets: [{name: a}]"))
    assert "datasets.0.path: is missing" in message
    load(write("model: {type: llama}\ndata: {root: x}"))


def test_explicit_mixing_through_datasets(write, fails) -> None:
    text = "model: {type: llama}\nmixing: {strategy: explicit}\ndatasets: [{path: a.jsonl, weight: 2%s}]"
    assert load(write(text % ", name: a")).datasets[0].weight == 2.0
    assert "datasets.0.weight: needs datasets.0.name" in fails(load, write(text % ""))


def test_a_config_made_in_python_is_checked_against_its_defaults(fails) -> None:
    good = Config(model={"type": "llama"}, data=DataConfig(skill_gym=SkillGymConfig()))
    validate(good)
    bad = dataclasses.replace(good, mixing=MixingConfig(strategy="equal", cap=3))
    assert fails(validate, bad).startswith("mixing.cap: has no effect: mixing.strategy is 'equal'")
    assert "learning_rate: nan is out" in fails(
        validate, dataclasses.replace(good, learning_rate=float("nan"))
    )


def test_tables_of_checks_name_real_keys() -> None:
    known = known_paths()
    for path in (*CHOICES, *RANGES):
        assert path in known or path.removesuffix(".*") in known, path
    everything = Config(
        optim="sgd",
        warmup_steps=1,
        report_to=(),
        model_name_or_path="m",
        task_type="SEQ_CLS",
        datasets=(DatasetConfig(),),
        data=DataConfig(packing=True),
        moe=TaskMoEConfig(router="none", gate="uniform"),
        mixing=MixingConfig(strategy="equal"),
        phases=(PhaseConfig(train=(), adapters=False, mixing=MixingConfig(strategy="equal")),),
    )
    sections = {path.rsplit(".", 1)[0] for path in known if "." in path}
    for path in ineffective(everything):
        pattern = path.replace(".0", ".*")
        assert pattern in known or pattern in sections, path


def test_an_option_that_the_choice_does_not_have(write_run, fails) -> None:
    message = fails(load, write_run("moe: {router_options: {depth: 2}}"))
    assert "moe.router_options" in message and ("has no effect" in message or "unknown option" in message)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("poly", "moe.regularisers {token_balance: 0.01}",
         "moe.regularisers.token_balance: no layer routes tokens"),
        ("poly", "moe.regularisers {fusion_identity: 0.01}",
         "moe.regularisers.fusion_identity: no experts here"),
        ("poly", "moe.regularisers {distillation: {weight: 1, teacher: x}}",
         "distillation: there are no prompts"),
        ("adapters", "moe.regularisers {alignment: 1}",
         "moe.regularisers.alignment: no low-rank experts lie"),
        ("lora", "moe.regularisers {orthogonality: 1}", "moe.regularisers.orthogonality: no experts here"),
        ("hydralora", "moe.regularisers {expert_distance: 1}",
         "moe.regularisers.expert_distance: no experts here"),
        ("mor1e", "moe.regularisers {z_loss: 1}",
         "moe.regularisers.z_loss: no router by task has parameters"),
        ("average", "moe.regularisers {entropy: 1}",
         "moe.regularisers.entropy: no router by task has parameters"),
        ("mor1e", "moe.compose before",
         "moe.compose: 'before' averages parameters, which router 'token_cluster'"),
        ("smora", "moe.router_options.top_k 99",
         "moe.router_options.top_k: 99 must be between 1 and num_exp"),
        ("moram", "moe.bank_options.top_k 64", "moe.bank_options.top_k: 64 must be between 1 and r = 32"),
        ("moram", "moe.rank_pattern {q_proj: 4}", "moe.bank_options.top_k: 8 must be between 1 and r = 4"),
        ("trex", "moe.num_experts 15",
         "moe.num_experts: 15 pairs of 4 rows of A (moe.r) with rows of B; make it"),
        ("transformer_router", "moe.router_options.heads 5", "moe.router_options.heads: 5 does not divide"),
        ("transformer_router", "moe.router_scope model", "moe.router_scope: 'model' makes one routing group"),
        ("recurrent_router", "moe.router_scope model", "moe.router_scope: 'model' makes one routing group"),
        ("spt", "moe.router recurrent,moe.router_init_std null",
         "moe.router: 'recurrent' goes over several routing groups"),
        ("spt", "moe.router_scope layer", "moe.router_scope: 'layer' with prompts"),
        ("jiuzhang", "moe.bank_options.every 0", "moe.bank_options.every: 0 must be at least 1"),
        ("gupta_ffn", "moe.bank_options {of: attention}",
         "moe.bank_options.of: 'attention' is each attention of the"),
        ("mpt", "data.packing true",
         "data.packing: moe.bank 'multitask_prompt' takes no rows of several sequences"),
        ("mor1e", "data.packing true",
         "data.packing: moe.router 'token_cluster' takes no rows of several sequences"),
        ("task_prompt", "moe.representation_options null",
         "moe.representation_options.path: none given; name a"),
        ("random_tasks", "moe.router_options.experts 9",
         "moe.router_options.experts: 9 must be between 1 and num_"),
        ("elm", "moe.num_experts 3",
         "moe.router_options.experts: 'swap_mirror' needs expert 3, and they are numb"),
        ("mola", "moe.expert_pattern {q_proj: 1}",
         "moe.expert_pattern: 1 experts of 'q_proj' are fewer than top_k"),
        ("poly", "moe.expert_pattern {q_proj: 2}",
         "moe.expert_pattern: router 'task_table' gives all layers as"),
        ("hydralora", "moe.router arrow,phases.0.train [experts]",
         "moe.bank: 'shared_a' has no prototypes; use low_rank"),
        ("imported", "moe.bank_options.adapters [a, b]",
         "moe.num_experts: 8, but moe.bank_options.adapters names 2"),
        ("imported", "moe.bank_options.adapters []", "moe.bank_options.adapters: is empty; name the folders"),
        ("prompt_tuning", "surgery {method: sum},base_learning_rate null,phases.0.train [experts]",
         "no phase trains anything that tasks sh"),
        ("mixlora", "moe.regularisers {token_z_loss: 1},surgery {method: sum, way: separate}",
         "surgery.way 'separate'"),
    ],
)  # fmt: skip
def test_clashes_that_the_settings_alone_show(method: str, given: str, message: str, fails) -> None:
    tokens = [token for part in re.split(r",(?=[a-z])", given) for token in f"--{part}".split(" ", 1)]
    found = fails(load, METHODS / f"{method}.yaml", tokens)
    assert message in found
    assert found.count(message.split(": ")[0]) <= 2, "the key is named twice"
