"""Distillation from teachers' prompts: the formula by hand, and what it adds to a training step."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.regularisers.distillation import distillation

TASKS, ROWS, LENGTH = ["sort", "sum", "translate"], [2, 0, 1, 0], 3


def test_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert abs(distillation(student, teacher).item() - first / 2) < 1e-7
    assert abs(distillation(student, teacher, weights=torch.tensor([1, 0])).item() - first) < 1e-7
    assert distillation(teacher, teacher).item() == 0
    p = math.sqrt(3) / (1 + math.sqrt(3))
    warm = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert abs(distillation(student, teacher, 2.0).item() - warm / 2) < 1e-6


def test_the_gradient_is_the_gap_of_the_distributions():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 0, 0]])
    distillation(student, teacher, 2.0, weights).backward()
    gap = (student / 2).softmax(-1) - (teacher / 2).softmax(-1)
    expected = 2.0 * gap * weights.unsqueeze(-1) / 3
    assert (student.grad - expected).abs().max() < 1e-14


def test_classes_that_both_leave_out_count_nothing():
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -torch.inf]])
    value = distillation(student, teacher)
    value.backward()
    assert torch.equal(value, distillation(student[:, :2].detach(), teacher[:, :2]))
    assert student.grad.isfinite().all()


def base():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=29, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2))  # fmt: skip


def shaken(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.5)
    return model


@pytest.fixture
def teacher(tmp_path):
    """A saved adapter with a prompt a task, its tasks in another order and with one more."""
    config = TaskMoEConfig(bank="prompt", bank_options={"length": LENGTH})
    model = shaken(attach(base(), config, ["translate", "other", "sum", "sort"]), 5)
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher", model.double().eval()


def student(folder, bank="multitask_prompt", weight=0.7, dropout=0.0, **options):
    term = {"weight": weight, "teacher": str(folder), "temperature": 2.0, **options}
    config = TaskMoEConfig(bank=bank, bank_options={"length": LENGTH}, regularisers={"distillation": term})
    model = attach(base(), config, TASKS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return shaken(model, 6).double().train()


def inputs():
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 29, (4, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "task_ids": ROWS, "use_cache": False}


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("bank", ["prompt", "multitask_prompt", "prompt_bank"])
@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
def test_a_step_gains_the_gradient_of_the_term(bank, mode, teacher):
    folder, taught = teacher
    model, batch = student(folder, bank), inputs()
    model.eval()
    logits = model(**batch).logits  # no terms in evaluation
    with torch.no_grad():
        wanted = taught(**{**batch, "task_ids": [TASKS[t] for t in ROWS]}).logits
    p, q = (wanted / 2).softmax(-1), (logits / 2).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1) * 4
    expected = (kl * batch["attention_mask"]).sum() / batch["attention_mask"].sum()
    (0.7 * expected + logits.square().mean()).backward()
    by_hand = gradients(model)
    model.train()
    if mode != "none":
        name = "activation_checkpointing_enable"
        owner = model.base_model
        enable = getattr(owner, name) if hasattr(owner, name) else owner.gradient_checkpointing_enable
        enable({"use_reentrant": mode == "reentrant"})
    model(**batch).logits.square().mean().backward()
    found = gradients(model)
    largest = max(g.abs().max() for g in by_hand.values())
    for n, g in by_hand.items():
        assert (found[n] - g).abs().max() <= 1e-12 * largest, n
    value, number = model.penalties.read()["distillation"]
    assert number == 1 and abs(value.item() - expected.item()) < 1e-12


def test_the_teachers_draw_no_dropout_and_leave_the_model_training(teacher):
    model = student(teacher[0], dropout=0.3)
    model.base_model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    torch.manual_seed(2)
    taught, drawn = model(**inputs()).logits, torch.get_rng_state()
    assert [m.training for m in model.modules()] == before
    model.penalties = None
    torch.manual_seed(2)
    assert torch.equal(model(**inputs()).logits, taught)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_evaluation_and_generation_need_no_teacher(tmp_path):
    model = student(tmp_path / "gone").eval()
    model(**inputs())
    model.generate(inputs()["input_ids"], task_ids=ROWS, max_new_tokens=2)
    model.train()
    with pytest.raises(ConfigError, match=r"distillation.teacher: .*gone holds no adapter_model.safetensors"):
        model(**inputs())


def test_what_cannot_teach(teacher, tmp_path):
    folder, _ = teacher
    with pytest.raises(ConfigError, match=r"distillation.teacher: is missing"):
        student("")
    with pytest.raises(ConfigError, match=r"distillation.temperature: 0.0 must be above 0"):
        student(folder, temperature=0.0)
    with pytest.raises(ConfigError, match=r"distillation: there are no prompts here"):
        attach(base(), TaskMoEConfig(regularisers={"distillation": {"weight": 1.0, "teacher": "x"}}), TASKS)
    term = {"distillation": {"weight": 1.0, "teacher": str(folder)}}
    longer = TaskMoEConfig(bank="prompt", bank_options={"length": 5}, regularisers=term)
    with pytest.raises(ConfigError, match=r"its prompts are \(3, 16\), this model's \(5, 16\)"):
        attach(base(), longer, TASKS).train()(**inputs())
    unknown = TaskMoEConfig(bank="prompt", bank_options={"length": 3}, regularisers=term)
    with pytest.raises(ConfigError, match=r"has no prompt for sing"):
        attach(base(), unknown, ["sort", "sing"]).train()(**{**inputs(), "task_ids": [0, 1, 0, 1]})
    shared = attach(base(), TaskMoEConfig(bank="multitask_prompt", bank_options={"length": 3}), TASKS)
    shared.save_pretrained(tmp_path / "shared")
    with pytest.raises(ConfigError, match=r"is no adapter of bank: prompt"):
        student(tmp_path / "shared")(**inputs())
