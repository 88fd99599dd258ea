"""The same numbers in both: our Arrow gives what peft's gives for the same library of LoRAs.

peft finds prototypes by 15 steps of the power method. The library here has one direction much stronger than
the other in each LoRA, so that these steps are enough; ours come from a singular value decomposition.
"""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, attach
from taskmoe.moe.import_peft import import_peft
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.token_routers.arrow import ArrowRouter, prototypes, set_prototypes

peft = pytest.importorskip("peft")
EXPERTS, R, ALPHA, TOP_K, TEMPERATURE = 4, 3, 6.0, 2, 0.3
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def ours(tiny, shaken):
    config = TaskMoEConfig(
        r=R,
        num_experts=EXPERTS,
        lora_alpha=ALPHA,
        router="arrow",
        gate="top_k",
        top_k=TOP_K,
        router_temperature=TEMPERATURE,
        target_modules=TARGETS,
    )
    model = shaken(attach(tiny("llama"), config, ["a"], dry_run=False)).eval()
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, MoELinear)):
            layer.bank.A_ErK[:, 0] *= 8
    set_prototypes(model)
    return model


@pytest.fixture
def theirs(ours, tiny, tmp_path):
    layers = {n: m for n, m in ours.base_model.named_modules() if isinstance(m, MoELinear)}
    folders = []
    for e in range(EXPERTS):
        config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS)
        model = peft.get_peft_model(tiny("llama"), config)
        with torch.no_grad():
            for name, layer in layers.items():
                lora = model.base_model.model.get_submodule(name)
                lora.lora_A["default"].weight.copy_(layer.bank.A_ErK[e])
                lora.lora_B["default"].weight.copy_(layer.bank.B_ErN[e].T)
        folders.append(str(tmp_path / f"expert-{e}"))
        model.save_pretrained(folders[-1])
    arrow = peft.ArrowConfig(top_k=TOP_K, router_temperature=TEMPERATURE, rng_seed=0)
    return peft.create_arrow_model(tiny("llama"), folders, arrow).eval()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
def test_outputs_equal_pefts(ours, theirs, batch, close):
    inputs = batch("llama", [0, 0, 0])
    found = ours(**inputs).logits
    inputs.pop("task_ids")
    with torch.no_grad():
        expected = theirs(**inputs).logits
    with ours.disable_adapter(), torch.no_grad():
        assert float((ours(**inputs).logits - expected).abs().max()) > 1e-2, "the experts do nothing here"
    close(found, expected, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_prototypes_equal_pefts_up_to_their_sign(ours, theirs, batch, close):
    inputs = batch("llama", [0])
    inputs.pop("task_ids")
    theirs(**inputs)  # peft makes them in the first forward pass
    found = {n: b for n, b in theirs.named_buffers() if n.endswith("prototypes")}
    mine = [m.prototypes_EK for m in ours.modules() if hasattr(m, "prototypes_EK")]
    assert len(found) == len(mine) > 0
    for their_EK, my_EK in zip(found.values(), mine, strict=True):
        close((their_EK * my_EK).sum(1).abs(), torch.ones(EXPERTS), 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_experts_that_come_with_values_bring_their_prototypes(ours, theirs, tiny, batch, tmp_path):
    """Nobody calls set_prototypes: neither for imported LoRAs nor for a bank that was trained and saved."""
    folders = sorted(tmp_path.glob("expert-*"))
    config = TaskMoEConfig(router="arrow", gate="top_k", top_k=TOP_K, router_temperature=TEMPERATURE)
    library = import_peft(tiny("llama"), folders, config, ["a"]).eval()
    inputs = batch("llama", [0, 0, 0])
    expected = ours(**inputs).logits
    with torch.no_grad():
        assert torch.allclose(library(**inputs).logits, expected, atol=1e-5)
    for router in (m for m in ours.modules() if isinstance(m, ArrowRouter)):
        router.prototypes_EK.zero_()
    ours.save_pretrained(tmp_path / "bank")
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "bank", dry_run=False).eval()
    assert torch.equal(again(**inputs).logits, expected)


def test_prototypes_that_are_there_stay_and_new_experts_have_none(tiny, shaken, tmp_path):
    config = TaskMoEConfig(router="arrow", gate="top_k", top_k=2, num_experts=2, target_modules=["q_proj"])
    model = attach(tiny("llama"), config, ["a"])
    routers = [m for m in model.modules() if isinstance(m, ArrowRouter)]
    assert routers and not any(r.prototypes_EK.any() for r in routers)
    for i, router in enumerate(routers):
        router.prototypes_EK.fill_(i + 1.0)
    shaken(model).save_pretrained(tmp_path)
    loaded = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path)
    again = [m for m in loaded.modules() if isinstance(m, ArrowRouter)]
    assert all(torch.equal(a.prototypes_EK, r.prototypes_EK) for a, r in zip(again, routers, strict=True))


def test_a_prototype_is_what_its_expert_answers_to_most():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 3, 9, generator=generator, dtype=torch.float64)
    B = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    found = prototypes(A, B)
    for e in range(5):
        delta = B[e].T @ A[e]
        assert torch.allclose(found[e].norm(), torch.ones((), dtype=torch.float64))
        strongest = torch.linalg.matrix_norm(delta, ord=2)
        assert torch.allclose((delta @ found[e]).norm(), strongest)
    assert prototypes(A.to(torch.bfloat16), B.to(torch.bfloat16)).dtype == torch.float32
