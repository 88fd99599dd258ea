"""One training step with the gradients of tasks combined by PCGrad, in each way to get those gradients.

All ways share the model, the data, the loss and AdamW, and (plain training aside) leave the same gradient.

Legend: B sequences, L tokens, T tasks, P entries of the parameters that tasks share, E experts, r rank of
one, K and N the widths of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, attach
from taskmoe.moe.layer import MoELinear
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.task_gradients import TaskGradients

VOCABULARY = 1000

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Shape:
    """A Llama and its experts on every linear."""

    tasks: int = 8
    width: int = 256
    layers: int = 4
    r: int = 4
    num_experts: int = 8
    router: str = "task_mlp"


def build(shape: Shape) -> TaskMoEModel:
    """The same weights for every way; B is not zero, as after the first steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    moe = TaskMoEConfig(r=shape.r, num_experts=shape.num_experts, router=shape.router)
    model = attach(LlamaForCausalLM(config), moe, shape.tasks)
    for _, p in model.parameter_groups()["experts"]:
        nn.init.normal_(p, std=0.02)
    return model.train()


def draw(random: torch.Generator, batch: int, length: int, tasks: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and task ids [B], sorted, as many sequences of each task as go."""
    ids = torch.randint(VOCABULARY, (batch, length), generator=random)
    return ids, torch.arange(batch) * tasks // batch


def losses(model: TaskMoEModel, ids: Tensor, task_ids: Tensor, targets: int) -> Tensor:
    """Each sequence's part of the token mean over the step, [B]."""
    logits = model(input_ids=ids, task_ids=task_ids, use_cache=False).logits
    parts = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return parts.sum(1) / targets


def targets(ids: Tensor) -> int:
    return ids[:, 1:].numel()


def optimiser_of(model: TaskMoEModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def plain(model: TaskMoEModel) -> Step:
    """The sum of all tasks' losses, one backward pass, no surgery."""
    optimiser = optimiser_of(model)

    def step(ids: Tensor, task_ids: Tensor) -> None:
        losses(model, ids, task_ids, targets(ids)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def fused(model: TaskMoEModel) -> Step:
    """One backward pass, which keeps the tasks apart."""
    optimiser, grads, method = optimiser_of(model), TaskGradients(model, way="fused"), Surgery("pcgrad")

    def step(ids: Tensor, task_ids: Tensor) -> None:
        with grads:
            losses(model, ids, task_ids, targets(ids)).sum().backward()
        grads.combine(method)
        optimiser.step()
        optimiser.zero_grad()

    return step


def separate(model: TaskMoEModel) -> Step:
    """One backward pass a task on the retained graph of one forward pass."""
    optimiser, grads, method = optimiser_of(model), TaskGradients(model, way="separate"), Surgery("pcgrad")

    def step(ids: Tensor, task_ids: Tensor) -> None:
        parts_B = losses(model, ids, task_ids, targets(ids))
        with grads:
            grads.backward({t: parts_B[task_ids == t].sum() for t in task_ids.unique().tolist()})
        grads.combine(method)
        optimiser.step()
        optimiser.zero_grad()

    return step


def slices(model: TaskMoEModel) -> Step:
    """A forward and a backward pass for the rows of each task."""
    optimiser, grads, method = optimiser_of(model), TaskGradients(model, way="slices"), Surgery("pcgrad")

    def step(ids: Tensor, task_ids: Tensor) -> None:
        with grads:
            for task in task_ids.unique().tolist():
                here = task_ids == task
                losses(model, ids[here], task_ids[here], targets(ids)).sum().backward()
                grads.harvest(task)
        grads.combine(method)
        optimiser.step()
        optimiser.zero_grad()

    return step


def torchjd(model: TaskMoEModel) -> Step:
    """torchjd's own engine: Jacobians of the banks by ``autojac.backward``, then its PCGrad.

    It asks for gradients with ``autograd.grad``, which the cut at the gates refuses: the routers stay frozen
    here, so it does less than the others. One loss at a time: all at once need vmap over every op.
    """
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import backward, jac_to_grad

    for group in ("router", "task_embedding"):
        for _, p in model.parameter_groups()[group]:
            p.requires_grad_(False)
    optimiser, shared = optimiser_of(model), list(TaskGradients(model).scope.banks.values())

    def step(ids: Tensor, task_ids: Tensor) -> None:
        parts_B = losses(model, ids, task_ids, targets(ids))
        parts = [parts_B[task_ids == t].sum() for t in task_ids.unique().tolist()]
        backward(parts, inputs=shared, parallel_chunk_size=1)
        jac_to_grad(shared, PCGrad(), optimize_gramian_computation=True)
        optimiser.step()
        optimiser.zero_grad()

    return step


WAYS: dict[str, tuple[str, Callable[[TaskMoEModel], Step]]] = {
    "plain": ("plain training, no surgery", plain),
    "fused": ("fused: one backward pass", fused),
    "slices": ("one pass a task's rows", slices),
    "separate": ("one backward a task, graph retained", separate),
    "torchjd": ("torchjd's engine (routers frozen)", torchjd),
}


def shared_entries(model: TaskMoEModel) -> int:
    """P, what a row of the Jacobian holds."""
    return sum(p.numel() for p in TaskGradients(model).scope.shared.values())


def largest_layer(model: TaskMoEModel) -> int:
    """E r (K + N) of the largest linear."""
    linears = [m for m in model.modules() if isinstance(m, MoELinear)]
    return max(sum(p.numel() for p in linear.bank.parameters()) for linear in linears)


def allowed_bytes(model: TaskMoEModel, tasks: int) -> int:
    """The memory that surgery is granted: J, and the parts of the largest layer, in fp32."""
    return 4 * tasks * (shared_entries(model) + largest_layer(model))


def peak_bytes(step: Step, ids: Tensor, task_ids: Tensor) -> int:
    """How far torch's allocator rises above its start in one step, from its own record of each block."""
    with profile(profile_memory=True, use_kineto=True) as recorded:
        step(ids, task_ids)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
