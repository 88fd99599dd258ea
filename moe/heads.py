"""Classification heads, one per task, kept as stacked tensors.

Legend: B sequences, L positions, M rows, K features, N outputs (the largest label count), T tasks.

Every rank touches every stacked tensor in every step (zeros for absent tasks), whatever tasks its batch
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from taskmoe.moe.config import ConfigError
from taskmoe.moe.context import current
from taskmoe.moe.tasks import TaskTable


class TaskLinear(nn.Module):
    """A linear layer of its own for each task: weight_TNK [T, N, K], bias_TN [T, N] float32.

    All tasks start from the same values. With ``label_counts`` ([T] ints) outputs beyond a task's own labels
    are -inf.
    """

    task_dims: ClassVar[dict[str, int]] = {"weight_TNK": 0, "bias_TN": 0}

    def __init__(
        self, linear: nn.Linear, num_tasks: int, name: str, label_counts: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.weight_TNK = nn.Parameter(linear.weight.detach().float().repeat(num_tasks, 1, 1))
        self.bias_TN = None
        if linear.bias is not None:
            self.bias_TN = nn.Parameter(linear.bias.detach().float().repeat(num_tasks, 1))
        if label_counts is not None:
            beyond = torch.arange(linear.out_features) >= torch.tensor(list(label_counts)).unsqueeze(1)
            self.register_buffer("beyond_TN", beyond, persistent=False)
        else:
            self.beyond_TN = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N]."""
        context = current(self.name)
        plan = context.plan(x.shape[:-1], self.name)
        tasks = torch.tensor(context.tasks, device=x.device)
        weight, bias = self.weight_TNK.index_select(0, tasks), None
        if self.bias_TN is not None:
            bias = self.bias_TN.index_select(0, tasks)
        x_MK = x.reshape(plan.rows, -1).to(weight.dtype)
        parts = []
        for i, t in enumerate(plan.tasks):
            rows = x_MK[plan.offsets[i] : plan.offsets[i + 1]]
            out = nn.functional.linear(rows, weight[t], None if bias is None else bias[t])
            if self.beyond_TN is not None:
                out = out.masked_fill(self.beyond_TN[context.tasks[t]], float("-inf"))
            parts.append(out)
        return torch.cat(parts).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def of_task(self, task: int) -> nn.Linear:
        """The head of one task alone, with outputs for its own labels: a copy."""
        weight_NK = self.weight_TNK[task]
        own = slice(None) if self.beyond_TN is None else ~self.beyond_TN[task]
        weight_NK = weight_NK[own]
        linear = nn.Linear(weight_NK.shape[1], len(weight_NK), bias=self.bias_TN is not None)
        linear.to(weight_NK).weight.copy_(weight_NK)
        if self.bias_TN is not None:
            linear.bias.copy_(self.bias_TN[task][own])
        return linear


class MeanPoolClassifier(nn.Module):
    """An encoder, the mean of its last hidden state over the attended positions, one linear head per task."""

    def __init__(self, encoder: nn.Module, head: TaskLinear) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        """input_ids, attention_mask: [B, L] int64 -> logits [B, N]."""
        kwargs.pop("return_dict", None)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))

    @property
    def base_model(self) -> nn.Module:
        return self.encoder

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)


def attach_heads(model: nn.Module, tasks: TaskTable, pooling: str = "model") -> nn.Module:
    """Give a model one classification head per task.

    pooling "model": the linears of the model's own classification head (all outside ``model.base_model``)
    become :class:`TaskLinear`; the model must be an AutoModelForSequenceClassification with ``num_labels`` =
    the largest label count. pooling "mean": ``model`` is a bare encoder; a linear on its mean-pooled output
    is added.

    Raises:
        ConfigError: an unknown pooling, a task without labels, or a model whose head is missing or of another
        size.
    """
    if pooling not in ("model", "mean"):
        raise ConfigError(f"pooling: {pooling!r} is unknown; known are model, mean")
    unlabelled = [t.name for t in tasks if not t.labels]
    if unlabelled:
        raise ConfigError(f"task_type: SEQ_CLS needs labels; tasks without: {', '.join(unlabelled)}")
    counts = [len(t.labels or ()) for t in tasks]
    if pooling == "mean":
        linear = nn.Linear(model.config.hidden_size, max(counts))  # type: ignore[union-attr,arg-type]
        linear.weight.data.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
        linear.bias.data.zero_()
        return MeanPoolClassifier(model, TaskLinear(linear, len(tasks), "classifier", counts))
    inner = {id(m) for m in model.base_model.modules()} if model.base_model is not model else set()  # type: ignore[union-attr]
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inner]
    if not inner or not heads:
        raise ConfigError(f"{type(model).__name__} has no classification head; use pooling: mean")
    if model.config.num_labels != max(counts):  # type: ignore[union-attr]
        raise ConfigError(
            f"the model has num_labels {model.config.num_labels}, the largest task has {max(counts)} labels; "  # type: ignore[union-attr]
            f"build the model with num_labels={max(counts)}"
        )
    final = [n for n, m in heads if m.out_features == max(counts)]
    if not final:
        raise ConfigError(
            f"{type(model).__name__} has no linear with {max(counts)} outputs; use pooling: mean"
        )
    for name, linear in heads:
        parent, _, leaf = name.rpartition(".")
        head = TaskLinear(linear, len(tasks), name, counts if name == final[-1] else None)
        setattr(model.get_submodule(parent), leaf, head)
    return model
