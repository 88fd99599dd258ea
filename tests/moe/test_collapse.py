"""One LoRA a task: the same logits, in peft's hands; a refusal with the reason where there is none."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.moe.collapse import CollapseError, collapse, save_lora
from taskmoe.moe.tasks import TaskError

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
