"""What every file of configs/methods/ must hold, and that docs/METHODS.md says of it what is so."""

from __future__ import annotations

import re

import pytest
import torch

from taskmoe.moe import CollapseError, TaskMoEModel, collapse
from taskmoe.moe.model import task_dims
from taskmoe.train.config import ConfigError
from taskmoe.train.task_gradients import TaskGradients


def test_every_file_has_a_row_without_blanks(claims, methods):
    assert set(claims) == set(methods)
    names = [row["method"] for row in claims.values()]
    assert len(names) == len(set(names)), "two files are called alike"
    for name, row in claims.items():
        for column, cell in row.items():
            assert cell.strip("` -"), f"{name}: {column} of its row in docs/METHODS.md is blank"
            other = re.match(r"as `(\w+)`", cell)
            if other:
                said = claims[other[1]][column]
                assert not said.startswith("as `"), f"{name}: {column} is that of {other[1]}, which is {said}"


def test_the_start_is_the_one_stated(method, claims):
    model = method.build().eval()
    batch = method.batches(1)[0]
    with torch.no_grad():
        routed = method.logits(model, batch)
        with model.disable_adapter():
            base = method.logits(model, batch)
    stated = claims[method.name]["start"]
    if stated.startswith("the base"):
        bound = 1e-5 if "1e-6" in stated else 0.0
        assert float((routed - base).abs().max()) <= bound * float(base.abs().max())
    else:
        assert not torch.allclose(routed, base), f"{method.name} starts at the base: say so"


def trained(model: TaskMoEModel) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_everything_trains_and_equal_experts_diverge(method, claims):
    model = method.build().train()
    parameters = trained(model)
    if not method.config.max_steps:
        assert not parameters and claims[method.name]["never moves"].startswith("all: nothing trains")
        return
    assert parameters, "nothing trains"
    axes, moved = task_dims(model), dict.fromkeys(parameters, False)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    for step, batch in enumerate(method.batches(4)):
        model.routing.step = step
        optimizer.zero_grad()
        method.loss(model, batch).backward()
        for name, p in parameters.items():
            assert p.grad is not None, f"{name}: no gradient in step {step}"
            assert p.grad.isfinite().all(), name
        optimizer.step()
    for name, p in parameters.items():
        moved[name] = not torch.equal(p.detach(), start[name])
    still = [n for n, m in moved.items() if not m]
    stated = claims[method.name]["never moves"]
    for name in still:
        leaf = name.rpartition(".")[2]
        assert leaf in stated, f"{name} has not moved and docs/METHODS.md does not say why"
    for name, p in parameters.items():
        if name in axes or not re.search(r"_E[a-zA-Z0-9]*$", name) or len(p) < 2 or p.dim() < 2:
            continue
        was, now = start[name].flatten(1), p.detach().flatten(1)
        equal = (was[:, None] == was[None]).all(-1) & ~torch.eye(len(was), dtype=torch.bool)
        alive = (now != was).any(1)
        stayed = (now[:, None] == now[None]).all(-1) & equal & alive[:, None] & alive[None]
        assert not stayed.any() or "stay equal" in stated, f"{name}: experts that started equal stay equal"


def test_a_mixed_batch_is_its_rows_one_at_a_time(method, shaken):
    model = shaken(method.build()).eval()
    batch = method.batches(1)[0]
    tensors = {n: v for n, v in batch.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        together = method.logits(model, tensors)
        for i in range(0, len(together), 5):
            alone = method.logits(model, {n: v[i : i + 1] for n, v in tensors.items()})
            error = float((alone[0] - together[i]).abs().max())
            assert error <= 2e-5 * float(together.abs().max()), (i, error)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(method, mode, shaken):
    if not method.config.max_steps:
        pytest.skip("nothing trains, so no activation is kept")
    model = shaken(method.build()).train()
    batch = method.batches(1)[0]
    torch.manual_seed(3)
    method.loss(model, batch).backward()
    expected = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    base = model.base_model
    name = "activation_checkpointing_enable"
    enable = getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable
    enable({"use_reentrant": mode == "reentrant"})
    torch.manual_seed(3)
    method.loss(model, batch).backward()
    largest = max(float(g.abs().max()) for g in expected.values())
    for n, p in trained(model).items():
        assert float((p.grad - expected[n]).abs().max()) <= 1e-5 * largest, n


def test_a_saved_adapter_comes_back_bit_for_bit(method, tmp_path, shaken):
    model = shaken(method.build()).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    again = method.build().eval()
    from taskmoe.moe.state import load_adapter, read_config

    assert read_config(tmp_path) == model.moe_config
    load_adapter(again, tmp_path)
    batch = method.batches(1)[0]
    with torch.no_grad():
        assert torch.equal(method.logits(again, batch), method.logits(model, batch))


def test_beams_belong_to_their_sequence(method, shaken):
    if method.config.task_type == "SEQ_CLS" or not hasattr(method.build().base_model, "generate"):
        pytest.skip("generates nothing")
    model = shaken(method.build()).eval()
    batch = method.batches(1)[0]
    tensors = {n: v for n, v in batch.items() if isinstance(v, torch.Tensor) and n != "labels"}
    prompts = {**tensors, "input_ids": tensors["input_ids"][:, :4],
               "attention_mask": torch.ones_like(tensors["input_ids"][:, :4])}  # fmt: skip
    prompts.pop("position_ids", None)
    rows = [0, 7, 15]
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**{n: v[rows] for n, v in prompts.items()}, **settings)
    for place, i in enumerate(rows):
        alone = model.generate(**{n: v[i : i + 1] for n, v in prompts.items()}, **settings)
        length = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[0, :length], together[place, :length])


def test_surgery_takes_the_way_stated(method, claims, shaken):
    stated = claims[method.name]["surgery"].split()[0].strip(",;:")
    model = shaken(method.build()).train()
    batch = method.batches(1)[0]
    if stated == "refused":
        with pytest.raises(ConfigError):
            TaskGradients(model)
        return
    if stated == "none":
        with pytest.raises(ConfigError, match="no trainable parameter that tasks share"):
            TaskGradients(model)
        return
    gradients = TaskGradients(model)
    assert gradients.way == stated
    torch.manual_seed(3)
    method.loss(model, batch).backward()
    plain = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    tasks = sorted(set(batch["task_ids"].flatten().tolist()))
    torch.manual_seed(3)
    with gradients:
        if stated == "fused":
            method.loss(model, batch).backward()
        else:
            losses = per_task(method, model, batch)
            gradients.backward({t: losses[t] for t in tasks})
    parts = gradients.matrix
    parts.reduce()
    if stated == "fused":
        gradients._route()
    assert parts.num_rows == len(tasks)
    largest = max(float(g.abs().max()) for g in plain.values())
    for name in gradients.scope.shared:
        total = parts.weighted(name, torch.ones(parts.num_rows, dtype=torch.float64))
        assert float((total.flatten() - plain[name].flatten()).abs().max()) <= 1e-5 * largest, name


def test_a_task_is_one_lora_or_it_is_said_why_not(method, claims, shaken):
    stated = claims[method.name]["one LoRA a task"]
    model = shaken(method.build()).eval()
    if stated != "yes":
        assert stated.startswith("no: ")
        with pytest.raises(CollapseError, match=r"no LoRA equals it|no one LoRA is what"):
            collapse(model, 0)
        return
    batch = {n: v for n, v in method.batches(1)[0].items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        routed = method.logits(model, batch)
        for task in sorted(set(batch["task_ids"].tolist()))[:3]:
            rows = batch["task_ids"] == task
            pairs = collapse(model, task)
            linears = {n: model.base_model.get_submodule(n).base.weight for n in pairs}
            for name, pair in pairs.items():
                linears[name].add_(pair.B_RN.T @ pair.A_RK)
            with model.disable_adapter():
                merged = method.logits(model, {n: v[rows] for n, v in batch.items()})
            for name, pair in pairs.items():
                linears[name].sub_(pair.B_RN.T @ pair.A_RK)
            assert float((merged - routed[rows]).abs().max()) <= 2e-5 * float(routed.abs().max())


def per_task(method, model, batch):
    from taskmoe.train.objectives import count, task_losses

    n_tasks = len(method.data.bundle.tasks)
    task_type = method.config.task_type
    weights = torch.ones(n_tasks, dtype=torch.float64)
    logits = method.logits(model, batch)
    return task_losses(logits, batch, count(batch, task_type, n_tasks), weights, task_type=task_type)[0]
