"""Which linears are chosen: the same as PEFT chooses, and errors that name what is nearest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.targets import (
    check_patterns,
    experts_of,
    features,
    find_targets,
    layer_number,
    rank_of,
    routing_group,
)

# kind -> settings with PEFT's names; each is given to both libraries.
PATTERNS = {
    "llama": [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.mlp\..*_proj"},
        {"target_modules": r"model\.layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.0\..*proj": 3, "model.layers.1.mlp.up_proj": 5},
        },
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 3, r".*\.1\.mlp\.up_proj": 5}},
    ],
    "gpt2": [
        {"target_modules": "all-linear"},
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_proj"], "layers_to_transform": 0},
        {"target_modules": r".*\.mlp\.c_(fc|proj)", "rank_pattern": {"mlp.c_proj": 3}},
    ],
    "t5": [
        {"target_modules": "all-linear"},
        {"target_modules": ["q", "v"]},
        {"target_modules": ["o"]},
        {"target_modules": ["q", "wo"], "layers_to_transform": [1]},
        {"target_modules": r"decoder\..*EncDecAttention\.(k|v)"},
        {"target_modules": "all-linear", "exclude_modules": r"encoder\..*"},
    ],
    "bert": [
        {"target_modules": "all-linear"},
        {"target_modules": ["query", "output.dense"]},
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": ["dense"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "modules_to_save": ["pooler"]},
    ],
}
CASES = [(kind, settings) for kind, rows in PATTERNS.items() for settings in rows]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")  # peft's own
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)])
def test_the_same_modules_and_ranks_as_peft(kind, settings, tiny):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=2, **settings))
    prefix = "base_model.model."
    lora = {n.removeprefix(prefix): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ranks = {n: m.r["default"] for n, m in lora.items()}
    saved = {
        n.removeprefix(prefix)
        for n, m in theirs.named_modules()
        if isinstance(m, peft.utils.other.ModulesToSaveWrapper)
    }
    model = attach(tiny(kind), TaskMoEConfig.from_dict({"r": 2, **settings}), 2, dry_run=False)
    own = {n: m for n, m in model.base_model.named_modules() if hasattr(m, "bank")}
    assert {n: m.bank.A_ErK.shape[1] for n, m in own.items()} == ranks
    own_saved = {n for n, m in model.base_model.named_modules() if type(m).__name__ == "SavedModule"}
    assert own_saved == saved


@pytest.mark.parametrize("head", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_all_linear_leaves_the_classification_head_out(head, tiny):
    kind = "bert" if head is BertForSequenceClassification else "llama"
    model = head(tiny(kind).config)
    names = find_targets(model, TaskMoEConfig())
    assert names
    assert not {"classifier", "score"} & {n.rpartition(".")[2] for n in names}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(names) == len(linears) - 1


def test_features_of_what_can_be_a_base():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 3, 5
            self.register_buffer("weight", torch.zeros(5, 3, dtype=torch.int8))

    assert features(nn.Linear(3, 5)) == (3, 5)
    assert features(Conv1D(5, 3)) == (3, 5)
    assert features(Quantised()) == (3, 5)
    assert features(nn.Embedding(3, 5)) is None
    assert features(nn.LayerNorm(3)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"moe\.target_modules: 'q_prj' matches no linear.*closest names are q_proj",
        ),
        ({"target_modules": ["q_proj", "v_prj"]}, r"'v_prj' matches no linear.*v_proj"),
        (
            {"target_modules": "q_proj"},
            r"'q_proj' matches no linear.*q_proj",
        ),  # a string is a whole-name regex
        ({"target_modules": []}, r"moe\.target_modules: \(\) matches no linear"),
        ({"target_modules": ["embed_tokens"]}, r"'embed_tokens' matches no linear"),
        ({"target_modules": "*proj"}, r"moe\.target_modules: '\*proj' is not a regular expression"),
        ({"exclude_modules": ["q_prj"]}, r"moe\.exclude_modules: 'q_prj' matches no linear.*q_proj"),
        ({"exclude_modules": ["q_proj", "mlp"]}, r"moe\.exclude_modules: 'mlp' matches no linear"),
        ({"exclude_modules": "("}, r"moe\.exclude_modules: '\(' is not a regular expression"),
        ({"exclude_modules": ".*"}, r"moe\.exclude_modules leaves no target"),
        ({"modules_to_save": ["model"]}, r"moe\.modules_to_save leaves no target"),
        (
            {"modules_to_save": ["lm_haed"]},
            r"moe\.modules_to_save: 'lm_haed' matches no module; names are.*lm_head",
        ),
        ({"modules_to_save": "lm_head"}, r"moe\.modules_to_save: 'lm_head' is one string; give a list"),
        (
            {"modules_to_save": ["mlp", "up_proj"]},
            r"modules_to_save: .*mlp\.up_proj lies inside model\.layers\.0\.mlp",
        ),
        ({"layers_to_transform": 2}, r"moe\.layers_to_transform: no target in layers \[2\]"),
        ({"layers_to_transform": [0, 7]}, r"moe\.layers_to_transform: no target in layers \[7\]"),
        (
            {"rank_pattern": {"q_prj": 3}},
            r"moe\.rank_pattern: 'q_prj' matches no target; targets are model\.layers",
        ),
        ({"rank_pattern": {"(": 3}}, r"moe\.rank_pattern: '\(' is not a regular expression"),
        (
            {"rank_pattern": {"q_proj": 0}},
            r"moe\.rank_pattern\['q_proj'\]: 0 must be a whole number, at least 1",
        ),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(settings, message, tiny):
    model = tiny("llama")
    with pytest.raises(ConfigError, match=message):
        attach(model, TaskMoEConfig.from_dict({"r": 2, **settings}), 2)
    assert all(p.requires_grad for p in model.parameters()), "an error leaves the model as it was"
    assert all(type(m).__module__.split(".")[0] != "taskmoe" for m in model.modules())


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("encoder.block.12.layer.0.q", 12),
        ("pooler.dense", None),
        ("0.dense", 0),
        ("h1.dense2", None),
    ],
)
def test_layer_numbers(name, number):
    assert layer_number(name) == number


@pytest.mark.parametrize(
    ("name", "scope", "group"),
    [
        ("model.layers.3.mlp.up_proj", "linear", "model.layers.3.mlp.up_proj"),
        ("model.layers.3.mlp.up_proj", "layer", "model.layers.3"),
        ("model.layers.3.mlp.up_proj", "stack", "model.layers"),
        ("model.layers.3.mlp.up_proj", "model", "model"),
        ("pooler.dense", "layer", "pooler"),
        ("lm_head", "stack", "lm_head"),
        ("0.dense", "stack", "stack"),
    ],
)
def test_routing_groups(name, scope, group):
    assert routing_group(name, scope) == group


def test_ranks_follow_the_first_pattern_that_matches():
    config = TaskMoEConfig(r=2, rank_pattern={"up_proj": 3, r".*\.1\.mlp\.up_proj": 5})
    assert rank_of("model.layers.1.mlp.up_proj", config) == 3
    assert rank_of("model.layers.1.mlp.down_proj", config) == 2


def test_so_do_numbers_of_experts():
    config = TaskMoEConfig(num_experts=6, expert_pattern={r"layers\.0\..*": 2, r"layers\.[0-3]\..*": 4})
    found = [experts_of(f"model.layers.{i}.mlp.up_proj", config) for i in (0, 3, 4)]
    assert found == [2, 4, 6]
    names = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ConfigError, match=r"moe\.expert_pattern: 'down_proj' matches no target"):
        check_patterns(names, TaskMoEConfig(expert_pattern={"down_proj": 2}))
    with pytest.raises(ConfigError, match=r"moe\.expert_pattern: '\(' is not a regular expression"):
        check_patterns(names, TaskMoEConfig(expert_pattern={"(": 2}))
