"""Regularisers beside surgery: each task's row holds its own tokens' share, or the term is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.train.config import Config, DataConfig, SkillGymConfig, SurgeryConfig
from taskmoe.train.config_checks import validate
from taskmoe.train.surgery.choose import choose
from taskmoe.train.task_gradients import TaskGradients

WEIGHTS = [0.5, 2.0, 1.5]


def model(**settings):
    torch.manual_seed(0)
    # Not Llama, whose norms round to fp32 whatever the dtype.
    gpt2 = GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0,
                      embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    chosen = {"r": 2, "num_experts": 3, "router": "token_linear", "gate": "softmax", **settings}
    made = attach(GPT2LMHeadModel(gpt2), TaskMoEConfig.from_dict(chosen), 3)
    with torch.no_grad():
        for group, parameters in made.parameter_groups().items():
            for _, p in parameters if group != "base" else ():
                p.copy_(torch.randn(p.shape) * 0.3)
    return made.double().train()


def with_data(run):
    return replace(run, data=DataConfig(skill_gym=SkillGymConfig()))


def test_a_tasks_row_holds_the_share_of_its_own_tokens():
    """Fixed weights: the sum of w_t times the gradient of a task's loss plus its tokens' part of the term."""
    ids = torch.randint(1, 29, (5, 6), generator=torch.Generator().manual_seed(1))
    tasks = torch.tensor([0, 2, 1, 0, 2])
    made = model(regularisers={"token_z_loss": 0.4})
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    grads = TaskGradients(made, tasks)
    assert grads.way == "fused"
    with grads:
        made(input_ids=ids, task_ids=tasks).logits.square().mean().backward()
    grads.combine(choose("fixed", {"weights": WEIGHTS}, 0), step=0)

    plain, seen = model(), []
    for m in plain.modules():
        if hasattr(m, "token_routing"):
            m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    logits = plain(input_ids=ids, task_ids=tasks).logits
    losses = logits.square().mean((1, 2)) / 5
    terms = 0.0
    for layer, x in seen:
        z = x @ layer.token_routing.router.weight_E1K[:, 0].T
        terms = terms + 0.4 * z.logsumexp(-1).square().sum(1) / ids.numel() / len(seen)
    weights = torch.tensor(WEIGHTS).double()[tasks]
    wanted = [plain.get_parameter(n) for n in trained]
    expected = torch.autograd.grad(((losses + terms) * weights).sum(), wanted)
    largest = max(float(g.abs().max()) for g in expected)
    for (name, p), theirs in zip(trained.items(), expected, strict=True):
        assert float((p.grad - theirs).abs().max()) <= 1e-12 * largest, name
    (total, number) = made.penalties.read()["token_z_loss"]
    assert float(total) / number > 0


@pytest.mark.parametrize("name", ["token_cv", "alignment"])
def test_terms_that_couple_tasks_are_refused(name):
    with pytest.raises(ConfigError, match=f"moe.regularisers.{name}: couples the rows of several tasks"):
        TaskGradients(model(regularisers={name: 1.0}))


@pytest.mark.parametrize("name", ["token_cv", "alignment"])
def test_and_so_are_the_settings_of_a_run(name):
    moe = TaskMoEConfig(router="token_linear", regularisers={name: 1.0})
    run = Config(model={"type": "llama"}, moe=moe, surgery=SurgeryConfig(method="pcgrad"), max_steps=2)
    with pytest.raises(ConfigError, match=f"moe.regularisers.{name}: couples"):
        validate(with_data(run))


def test_a_pass_for_each_task_would_count_a_term_of_tokens_as_often():
    with pytest.raises(ConfigError, match=r"moe.regularisers.token_z_loss: would join .* 'separate'"):
        TaskGradients(model(regularisers={"token_z_loss": 1.0}), way="separate")


@pytest.mark.parametrize(
    ("regularisers", "message"),
    [
        ({"z_los": 1}, "moe.regularisers.z_los: unknown"),
        ({"window_balance": {"weight": 1, "window": 3}}, "moe.regularisers.window_balance.window: unknown"),
    ],
)
def test_unknown_names_and_options_are_errors_of_a_run(regularisers, message):
    run = Config(model={"type": "llama"}, moe=TaskMoEConfig(regularisers=regularisers), max_steps=2)
    with pytest.raises(ConfigError, match=message):
        validate(with_data(run))
