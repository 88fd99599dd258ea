"""One LoRA a task: the same logits, in peft's hands; a refusal with the reason where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from taskmoe.moe import TaskMoEConfig, attach, attach_heads
from taskmoe.moe.collapse import CollapseError, collapse, save_lora
from taskmoe.moe.heads import MeanPoolClassifier
from taskmoe.moe.import_peft import import_peft
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.tasks import TaskError, TaskTable
from taskmoe.moe.wrappers import load_head

VARIANTS = {
    "after": {},
    "top-k": {"gate": "top_k", "top_k": 2},
    "one-hot": {"gate": "one_hot"},
    "before": {"compose": "before", "gate": "sigmoid", "lora_alpha": 5.0},
    "heads": {"compose": "before", "gate": "sigmoid", "num_heads": 4},
    "mlp": {"router": "task_mlp", "task_embedding_dim": 5, "router_hidden_dim": 4},
    "ranks": {"rank_pattern": {".*0.*": 3}, "lora_alpha": 4.0},
    "shared A": {"bank": "shared_a"},
    "pairs": {"bank": "mix_and_match", "num_experts": 6},
    "a matrix a task": {"bank": "mtl_lora"},
}


# A head of one linear, and one with a norm that no task has for itself.
CLASSIFIERS = (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    ModernBertForSequenceClassification,
)
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
MODERN = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 24, **dict.fromkeys(SPECIAL, 0)}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")  # peft's own
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_peft_gives_the_logits_of_the_mixture(kind, variant, routed, tiny, batch, head, tmp_path):
    peft = pytest.importorskip("peft")
    model = routed(kind, **variant)
    for number, name in enumerate(model.tasks.names):
        save_lora(model, name, tmp_path / name)
        plain = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / name).eval()
        inputs = batch(kind, [number, number], seed=number)
        tasks = inputs.pop("task_ids")
        with torch.no_grad():
            expected, found = head(model(**inputs, task_ids=tasks)), head(plain(**inputs))
            base = head(tiny(kind).eval()(**inputs))
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert float((base - expected).abs().max()) > 1e-2 * float(expected.abs().max())


def test_the_rank_is_that_of_the_experts_in_use(routed):
    model = routed("llama", gate="top_k", top_k=2)
    assert {len(pair.A_RK) for pair in collapse(model, 0).values()} == {4}
    assert {len(pair.A_RK) for pair in collapse(routed("llama", compose="before"), 0).values()} == {2}
    assert {len(pair.A_RK) for pair in collapse(routed("llama", gate="one_hot"), 0).values()} == {2}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"router": "token_linear"}, r"moe\.router: 'token_linear' gives each token gates of its own"),
        ({"bank": "own_keys", "r": 8}, r"moe\.bank: 'own_keys' is no product of two factors"),
        ({"bank": "adapter"}, r"moe\.bank: 'adapter' is no product of two factors"),
        ({"bank": "module"}, r"moe\.bank: 'module' is no product of two factors"),
        ({"bank": "prompt"}, r"moe\.bank: 'prompt' is no product of two factors"),
    ],
)
def test_what_is_no_lora_is_refused_with_the_reason(settings, reason, tiny):
    model = attach(tiny("llama"), TaskMoEConfig.from_dict({"num_experts": 3, **settings}), 2)
    with pytest.raises(CollapseError, match=reason):
        collapse(model, 0)


@pytest.fixture(scope="module")
def labelled():
    tasks = TaskTable()
    tasks.add("two", ["no", "yes"])
    tasks.add("three", ["a", "b", "c"])
    return tasks


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out", "ignore:Was not able")
@pytest.mark.parametrize("cls", CLASSIFIERS)
@torch.no_grad()
def test_a_head_of_a_task_is_in_the_adapter(cls, labelled, tiny, shaken, batch, close, tmp_path):
    peft = pytest.importorskip("peft")
    kind = "llama" if cls is LlamaForSequenceClassification else "bert"
    sizes = tiny(kind).config if cls.config_class is not ModernBertConfig else ModernBertConfig(**MODERN)
    bare = cls(sizes)
    bare.base_model.save_pretrained(tmp_path / "base")
    big = cls.from_pretrained(tmp_path / "base", num_labels=3)
    model = attach(attach_heads(big, labelled), TaskMoEConfig(r=2, num_experts=2), labelled)
    shaken(model).eval()
    for number, task in enumerate(labelled):
        save_lora(model, number, tmp_path / task.name)
        base = cls.from_pretrained(tmp_path / "base", num_labels=len(task.labels))
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / task.name).eval()
        inputs = batch(kind, [number] * 3)
        expected = model(**inputs).logits[:, : len(task.labels)]
        inputs.pop("task_ids")
        close(theirs(**inputs).logits, expected, 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_modules_trained_whole_are_in_the_adapter(kind, routed, tiny, batch, head, close, tmp_path):
    peft = pytest.importorskip("peft")
    saved = {"llama": ("lm_head", "norm"), "bert": ("word_embeddings",)}[kind]
    model = routed(kind, modules_to_save=saved)
    save_lora(model, "sum", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    inputs = batch(kind, [1, 1])
    expected = head(model(**inputs))
    inputs.pop("task_ids")
    close(head(theirs(**inputs)), expected, 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_a_head_on_mean_pooled_states_lies_beside_the_adapter(labelled, tiny, shaken, batch, close, tmp_path):
    peft = pytest.importorskip("peft")
    base = attach_heads(tiny("bert"), labelled, "mean")
    model = shaken(attach(base, TaskMoEConfig(r=2, num_experts=2), labelled)).eval()
    save_lora(model, "three", tmp_path)
    linear, labels = load_head(tmp_path)
    assert labels == ["a", "b", "c"]
    theirs = MeanPoolClassifier(peft.PeftModel.from_pretrained(tiny("bert"), tmp_path).eval(), linear)
    inputs = batch("bert", [1, 1])
    expected = model(**inputs).logits
    inputs.pop("task_ids")
    close(theirs(**inputs).logits, expected, 1e-5)


@pytest.mark.parametrize("form", ["after", "top-k", "before", "heads", "ranks", "shared A"])
@torch.no_grad()
def test_exported_and_imported_again_it_is_the_same(kind, form, routed, tiny, batch, head, close, tmp_path):
    model = routed(kind, **VARIANTS[form])
    names = model.tasks.names
    for name in names:
        save_lora(model, name, tmp_path / name)
    again = import_peft(tiny(kind), [tmp_path / name for name in names]).eval()
    assert again.tasks.names == names
    for number in range(len(names)):
        once, twice = collapse(model, number), collapse(again, number)
        assert once.keys() == twice.keys()
        for name, pair in once.items():
            rank = len(pair.A_RK)  # experts of an import are padded to the largest rank
            assert torch.equal(twice[name].A_RK[:rank], pair.A_RK) and not twice[name].A_RK[rank:].any()
            assert torch.equal(twice[name].B_RN[:rank], pair.B_RN) and not twice[name].B_RN[rank:].any()
    inputs = batch(kind, [0, 1, 2])
    close(head(again(**inputs)), head(model(**inputs)), 1e-5)


@torch.no_grad()
def test_given_gates_stand_in_for_those_of_tokens(tiny, shaken, close):
    config = {"r": 2, "num_experts": 3, "router": "token_linear"}
    model = shaken(attach(tiny("llama"), TaskMoEConfig.from_dict(config), ["a", "b"])).eval()
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, MoELinear)}
    generator = torch.Generator().manual_seed(0)
    gates = {n: torch.rand(2, 1, 3, generator=generator) for n in linears}
    for name, pair in collapse(model, "b", gates).items():
        bank = linears[name].bank
        parts = (gates[name][1, 0, e] * bank.B_ErN[e].T @ bank.A_ErK[e] for e in range(3))
        close(pair.B_RN.T @ pair.A_RK, sum(parts))
    name = next(iter(gates))
    gates[name][1] = float("nan")
    assert collapse(model, "a", gates)
    with pytest.raises(CollapseError, match=f"task 'b': no tokens of it have been seen at {name}"):
        collapse(model, "b", gates)


@pytest.mark.parametrize("task", [1, "sum"])
def test_a_task_without_experts_is_refused_by_name(task, routed, tmp_path):
    model = routed("llama", gate="sigmoid", gate_options={"normalise": "l2"})
    with torch.no_grad():
        model.routing.router.logits_STHE[:, 1] = 0.0
    assert all(not gates_THE[1].any() for gates_THE in model.gates().values())
    with pytest.raises(CollapseError, match="task 'sum': its gates are zero on every expert"):
        save_lora(model, task, tmp_path)
    assert not list(tmp_path.iterdir())
    save_lora(model, "sort", tmp_path)


def test_an_unknown_task(routed, tmp_path):
    with pytest.raises(TaskError, match="unknown task 'sorting'; the nearest of 3 are sort"):
        save_lora(routed("llama"), "sorting", tmp_path)
