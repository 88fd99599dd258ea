"""The same numbers in both: our Poly and MHR give what peft's PolyConfig model gives, outputs and gradients.

peft scales by 1 / r (lora_alpha = 1 here). In training mode it adds noise to its gates, drawn for each row,
where ours is one draw a task: it is given ours.
"""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach

peft = pytest.importorskip("peft")

TASKS, EXPERTS, RANK = 3, 5, 2
# peft's Poly knows nn.Linear alone, not GPT-2's Conv1D.
TARGETS = {
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    "t5": ("q", "k", "v", "o", "wi_0", "wo"),
    "bert": ("query", "value", "intermediate.dense"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize("gate", ["sigmoid", "bernoulli"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", TARGETS)
def test_outputs_and_gradients_equal_pefts(
    kind, heads, gate, tiny, batch, shaken, head, gradients, close, monkeypatch
):
    config = TaskMoEConfig(
        r=RANK, num_experts=EXPERTS, num_heads=heads, lora_alpha=1.0, compose="before", gate=gate,
        target_modules=TARGETS[kind],
    )  # fmt: skip
    poly_config = peft.PolyConfig(
        poly_type="poly",
        r=RANK,
        n_tasks=TASKS,
        n_skills=EXPERTS,
        n_splits=heads,
        target_modules=list(TARGETS[kind]),
    )
    noisy = gate == "bernoulli"
    ours = shaken(attach(tiny(kind), config, TASKS)).train(noisy)
    theirs = peft.get_peft_model(tiny(kind), poly_config).train(noisy)
    layers = {n: m for n, m in ours.base_model.named_modules() if hasattr(m, "bank")}
    prefix = "base_model.model."
    poly = {n.removeprefix(prefix): m for n, m in theirs.named_modules() if hasattr(m, "poly_router")}
    assert layers.keys() == poly.keys()
    with torch.no_grad():
        for name, layer in layers.items():
            # peft: A [heads, experts, K / heads, r], B [heads, experts, r, N / heads], logits [tasks, H x E]
            A_EHrK = layer.bank.A_ErK.view(EXPERTS, RANK, heads, -1).permute(0, 2, 1, 3)
            poly[name].poly_lora_A["default"].copy_(A_EHrK.permute(1, 0, 3, 2))
            B_EHrN = layer.bank.B_ErN.view(EXPERTS, RANK, heads, -1).permute(0, 2, 1, 3)
            poly[name].poly_lora_B["default"].copy_(B_EHrN.permute(1, 0, 2, 3))
            logits_THE = ours.routing.router.logits_STHE[layer.group]
            poly[name].poly_router["default"].module_logits.copy_(logits_THE.flatten(1))

    inputs = batch(kind, [2, 0, 1, 0])
    draws: list[torch.Tensor] = []
    if noisy:
        ours.routing.step = 5
        noise_STHE = ours.routing.noise(range(TASKS))
        for name, layer in layers.items():
            of_rows = noise_STHE[layer.group][[2, 0, 1, 0]]
            router = poly[name].poly_router["default"]
            router.register_forward_pre_hook(lambda *_, of_rows=of_rows: draws.append(of_rows))
    # Not theirs(...): peft's outermost forward drops task_ids where it has no class for the kind of model.
    out = head(ours(**inputs))
    with monkeypatch.context() as patch:
        if noisy:
            patch.setattr(torch, "rand", lambda shape, **_: draws.pop())
        expected = head(theirs.base_model(**inputs))
    assert not draws, "each layer took its draw"
    close(out, expected)

    weights = torch.randn_like(expected)
    found = gradients(ours, (out * weights).sum())
    (expected * weights).sum().backward()
    table, as_theirs, of_peft = found["routing.router.logits_STHE"], {}, {}
    for name, layer in layers.items():
        A_EHrK = found[f"base_model.{name}.bank.A_ErK"].view(EXPERTS, RANK, heads, -1).permute(0, 2, 1, 3)
        B_EHrN = found[f"base_model.{name}.bank.B_ErN"].view(EXPERTS, RANK, heads, -1).permute(0, 2, 1, 3)
        as_theirs |= {f"{name} A": A_EHrK.permute(1, 0, 3, 2), f"{name} B": B_EHrN.permute(1, 0, 2, 3)}
        as_theirs[f"{name} logits"] = table[layer.group].flatten(1)
        of_peft[f"{name} A"] = poly[name].poly_lora_A["default"].grad
        of_peft[f"{name} B"] = poly[name].poly_lora_B["default"].grad
        of_peft[f"{name} logits"] = poly[name].poly_router["default"].module_logits.grad
    for kind_of_tensor in ("A", "B", "logits"):  # each against its own largest entry
        names = [n for n in of_peft if n.endswith(kind_of_tensor)]
        close({n: as_theirs[n] for n in names}, {n: of_peft[n] for n in names})
