"""What every method must hold: identity, mixed = single, checkpointing, saving, training. A row a method.

A new router, gate or bank adds its rows here.
"""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, attach

TASKS = ["a", "b", "c"]
GATES = {"softmax": {}, "sigmoid": {}, "top_k": {"top_k": 2}, "one_hot": {}}
METHODS = {
    f"{router}-{gate}-{compose}": TaskMoEConfig(
        r=2, num_experts=3, router=router, gate=gate, compose=compose, router_init_std=0.5,
        task_embedding_dim=6, router_hidden_dim=5, **settings,
    )
    for router in ("task_table", "task_mlp")
    for gate, settings in GATES.items()
    for compose in ("after", "before")
}  # fmt: skip
METHODS["uniform-after"] = TaskMoEConfig(r=2, num_experts=3, router="none", gate="uniform")
METHODS["uniform-before"] = TaskMoEConfig(r=2, num_experts=3, router="none", gate="uniform", compose="before")
METHODS["rank-1"] = TaskMoEConfig(r=1, num_experts=4, router_init_std=0.5)
METHODS["mhr"] = TaskMoEConfig(
    r=2, num_experts=3, compose="before", gate="sigmoid", num_heads=4, lora_alpha=1.0, router_init_std=0.5
)
METHODS["shared-model"] = TaskMoEConfig(r=2, num_experts=3, router_scope="model", router_init_std=0.5)
METHODS["shared-layer"] = TaskMoEConfig(
    r=2, num_experts=3, router="task_mlp", router_scope="layer", task_embedding_dim=6, router_hidden_dim=5
)
for gate, more in GATES.items():
    METHODS[f"adapter-{gate}"] = TaskMoEConfig(
        bank="adapter", r=2, num_experts=3, gate=gate, router_init_std=0.5, **more
    )
for share in ("stack", "block"):
    for norm in (True, False):
        METHODS[f"generated-{share}-{norm}"] = TaskMoEConfig(
            bank="generated", r=2, task_embedding_dim=5,
            bank_options={"share": share, "norm": norm, "hidden": 6, "dim": 5},
        )  # fmt: skip
for per_task in (False, True):  # the attention reads no gates
    METHODS[f"fusion-{per_task}"] = TaskMoEConfig(
        bank="fusion", r=2, num_experts=3, router="none", gate="uniform", bank_options={"per_task": per_task}
    )
OVER_LAYERS = {"router_scope": "layer", "task_embedding_dim": 6, "router_hidden_dim": 8}
POLY = {"compose": "before", "gate": "bernoulli", "router_init_std": 0.5, "lora_alpha": 1.0}
for name, settings in {
    "linear-gumbel": {"router": "task_linear", "gate": "gumbel", "task_embedding_dim": 6},
    "shared-mlp": {"router": "shared_mlp", **OVER_LAYERS},
    "recurrent-gumbel-one-hot": {"router": "recurrent", "gate": "gumbel_one_hot", **OVER_LAYERS},
    "transformer-gumbel": {"router": "transformer", "gate": "gumbel", **OVER_LAYERS},
    "fixed": {"router": "fixed", "gate": "raw", "router_options": {"experts": {"a": 0, "*": 2}}},
    "random-tasks": {"router": "random_tasks", "gate": "raw", "router_options": {"experts": 2}},
    "poly-noise": POLY,
    "mhr-noise": {**POLY, "num_heads": 4, "gate_options": {"dropout": 0.2, "shared": True}},
    "poly-rounded": {**POLY, "gate_options": {"straight_through": True}},
    "poly-l2": {**POLY, "gate": "sigmoid", "gate_options": {"normalise": "l2"}},
    "token-softmax": {"router": "token_linear"},
    "token-top-k": {"router": "token_linear", "gate": "top_k", "top_k": 2},
    "token-more-above": {"router": "token_linear", "num_experts": 4, "expert_pattern": {r"layers\.0\..*": 2}},
    "token-task-sum": {"router": "token_task_sum", "task_embedding_dim": 6},
    "token-task-concat": {"router": "token_task_concat", "task_embedding_dim": 6, "router_hidden_dim": 5},
    "gate-per-task": {"router": "gate_per_task"},
    "ranks": {"r": 1, "router": "ranks", "gate": "raw", "router_options": {"top_k": 2}},
    "shared-a-token": {"bank": "shared_a", "router": "token_linear"},
    "shared-a-task": {"bank": "shared_a", "router_init_std": 0.5},
    "mix-and-match-token": {"bank": "mix_and_match", "num_experts": 6, "router": "token_linear"},
    "mix-and-match-task": {"bank": "mix_and_match", "num_experts": 6, "router_init_std": 0.5},
    "mtl-lora": {"bank": "mtl_lora", "router_init_std": 0.5, "router_temperature": 0.1},
    "own-keys": {"bank": "own_keys", "r": 6, "bank_options": {"top_k": 3, "temperature": 0.3}},
}.items():
    METHODS[name] = TaskMoEConfig(**{"r": 2, "num_experts": 3, **settings})
# Experts averaged with one weight, by every task: their B_e get one gradient, by definition.
SHARED_GATES = ("uniform-before", "poly-rounded")


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def test_step_0_is_the_base(method, tiny, batch, head):
    inputs = batch("llama", [1, 0, 1, 2])
    tasks = inputs.pop("task_ids")
    expected = head(tiny("llama")(**inputs))
    model = attach(tiny("llama"), METHODS[method], TASKS, dry_run=False)
    assert torch.equal(head(model(**inputs, task_ids=tasks)), expected)


def test_a_mixed_batch_is_its_tasks_one_at_a_time(method, tiny, batch, shaken, head, gradients, close):
    model = shaken(attach(tiny("llama"), METHODS[method], TASKS, dry_run=False)).double()
    inputs = batch("llama", [2, 0, 1, 0])
    together = head(model(**inputs))
    weights = torch.randn_like(together)
    whole = gradients(model, (together * weights).sum())
    for i in range(4):
        alone = head(model(**{n: v[i : i + 1] for n, v in inputs.items()}))
        close(alone, together[i : i + 1], 1e-12)
        (alone * weights[i : i + 1]).sum().backward()
    close(gradients(model), whole, 1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(method, mode, tiny, batch, shaken, head, gradients, close, checkpoint):
    model = shaken(attach(tiny("llama"), METHODS[method], TASKS, dry_run=False)).train()
    inputs = {**batch("llama", [2, 0, 1, 0]), "use_cache": False}
    plain = head(model(**inputs))
    expected = gradients(model, plain.square().sum())
    out = head(checkpoint(model, mode)(**inputs))
    close(out, plain)
    close(gradients(model, out.square().sum()), expected)


def test_a_saved_adapter_comes_back_bit_for_bit(method, tiny, batch, shaken, head, adapters, tmp_path):
    model = shaken(attach(tiny("llama"), METHODS[method], TASKS))
    model.save_pretrained(tmp_path)
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path)
    assert again.moe_config == model.moe_config
    assert again.tasks == model.tasks
    found, expected = adapters(again), adapters(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    inputs = batch("llama", [2, 0, 1, 0])
    assert torch.equal(head(again(**inputs)), head(model(**inputs)))


def test_everything_trains_and_equal_experts_diverge(method, tiny, batch, head, adapters):
    model = attach(tiny("llama"), METHODS[method], TASKS, dry_run=False)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
    for step in range(4):
        inputs = batch("llama", [0, 1, 2, 0, 1, 2], seed=step)
        logits = head(model(**inputs))[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, p in adapters(model).items():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert step == 0 or p.grad.any(), f"{name} has a zero gradient in step {step + 1}"
        optimizer.step()
    for name, p in adapters(model).items():
        if name.endswith("B_ErN") and method not in SHARED_GATES:
            moved = p.detach()[p.detach().flatten(1).any(1)]
            hard = ("one_hot", "top_k", "gumbel_one_hot", "raw")
            never_chosen = METHODS[method].gate in hard  # such an expert has no reason to move
            assert len(moved) == len(p) or (never_chosen and len(moved)), f"{name}: an expert has not moved"
            apart = (moved.unsqueeze(0) - moved.unsqueeze(1)).abs().amax((-1, -2))
            equal = apart + torch.eye(len(moved)) == 0
            assert not equal.any(), f"{name}: two experts that started equal stayed equal"
