"""TaskMoEModel: a Hugging Face model whose linears carry experts, called with ``task_ids``.

Legend: B sequences, L positions, S routing groups, T tasks, Tb tasks in this batch, H heads, E experts, k slots.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context, Gate, GateBridge, _current, bind_checkpointing, use
from taskmoe.moe.gates import GATES, uniform
from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.routers import ROUTERS
from taskmoe.moe.tasks import TaskError, TaskTable

GROUPS = ("base", "experts", "router", "task_embedding", "heads", "saved")


class Routing(nn.Module):
    """Router and gate of all routing groups: task ids [Tb] -> gates [S, Tb, H, k] and slots (or None)."""

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], num_tasks: int) -> None:
        super().__init__()
        self.router = ROUTERS[config.router](config, len(groups), num_tasks)
        self.groups, self.gate, self.top_k = list(groups), config.gate, config.top_k
        self.temperature = config.router_temperature

    def forward(self, tasks: Tensor) -> tuple[Tensor, Tensor | None]:
        return GATES[self.gate](self.router(tasks), self.temperature, self.top_k)


def _embedding_hook(module: nn.Module, args: Any, output: Any) -> Any:
    context = _current.get()
    return context.enter(output) if context is not None and isinstance(output, Tensor) else None


class TaskMoEModel(nn.Module):
    """What :func:`taskmoe.moe.attach` returns. ``forward`` and ``generate`` take the model's own arguments plus
    ``task_ids``: int64 [B], or [B, L] for packed rows (on the CPU; a tensor on a GPU costs a synchronisation), or a
    list of task names.
    """

    def __init__(self, base_model: nn.Module, moe_config: TaskMoEConfig, tasks: TaskTable, groups: Sequence[str]) -> None:
        super().__init__()
        self.base_model = base_model
        self.routing = Routing(moe_config, groups, len(tasks))
        self.moe_config, self.tasks = moe_config, tasks
        self.not_run: list[str] = []  # targets that the dry run left out: a forward pass never runs them
        self._mode = "routed"  # routed | uniform | off
        self._checkpointed = [m for m in base_model.modules() if hasattr(m, "gradient_checkpointing")]
        self._embeddings = _input_embeddings(base_model)
        for module in self._embeddings:
            module.register_forward_hook(_embedding_hook)
        self._entries = _entries(base_model)
        self._parameters_in_order = [
            p.name for p in inspect.signature(base_model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    # -- running ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The model's own output, with the experts of ``task_ids``.

        Raises:
            TaskError: task_ids are missing, too few or too many, or name a task that is not in the table.
        """
        kwargs = self._named(args, kwargs)
        context = self.context(task_ids)
        if task_ids is not None:
            self._check_batch(context, kwargs)
        bind_checkpointing(self._checkpointed)
        for name in self._entries:
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].is_floating_point():
                kwargs[name] = context.enter(kwargs[name])
        with use(context):
            output = self.base_model(**kwargs)
        if context.bridge is not None and context.bridge.calls == 0:
            raise RuntimeError(
                f"{type(self.base_model).__name__} called no input embedding that get_input_embeddings() knows, so "
                f"the routers would get no gradient; pass one of {', '.join(self._entries)}"
            )
        return output

    def generate(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """``generate`` of the base model; beams and returned sequences belong to their sequence's task.

        Raises:
            TaskError: as for :meth:`forward`.
        """
        context = self.context(task_ids)
        if task_ids is not None:
            self._check_batch(context, {**kwargs, "inputs": args[0] if args else kwargs.get("inputs")})
        with torch.no_grad(), use(context):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[union-attr,operator]

    def context(self, task_ids: Any) -> Context:
        """The :class:`~taskmoe.moe.context.Context` of a forward pass on these tasks."""
        ids = self._host_ids(task_ids)
        enabled = self._mode != "off"
        if not enabled:
            return Context(ids, enabled=False)
        context = Context(ids)
        tasks = torch.tensor(context.tasks, device=self.device)
        values_STHk, slots = self.routing(tasks)
        if self._mode == "uniform":
            shape = (*values_STHk.shape[:-1], self.moe_config.num_experts)
            values_STHk, slots = uniform(values_STHk.detach().new_zeros(shape), 1.0, None)
        if torch.is_grad_enabled() and values_STHk.requires_grad:
            context.bridge = GateBridge(values_STHk)
            rows: Sequence[Tensor] = context.bridge.leaves
        else:
            rows = values_STHk.detach().unbind(0)
        context.checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self._checkpointed)
        context.gates = [Gate(v, None if slots is None else slots[i]) for i, v in enumerate(rows)]
        return context

    def _host_ids(self, task_ids: Any) -> list[Any]:
        if task_ids is None:
            if self._mode == "off" and not any(isinstance(m, TaskLinear) for m in self.modules()):
                return [0]
            raise TaskError("task_ids are missing: pass one task id (or name) per sequence")
        ids = task_ids.tolist() if hasattr(task_ids, "tolist") else task_ids
        if not isinstance(ids, (list, tuple)):
            raise TaskError(f"task_ids are {ids!r}: pass a list or tensor with one task id (or name) per sequence")
        if ids and isinstance(ids[0], (list, tuple)):
            ids = [[self._id(t) for t in row] for row in ids]
            flat = [t for row in ids for t in row]
            if len({len(row) for row in ids}) > 1:
                raise TaskError("packed task_ids have rows of unequal length: pass one task per position, [B, L]")
        else:
            ids = flat = [self._id(t) for t in ids]
        if not flat:
            raise TaskError("task_ids are empty: pass one task id (or name) per sequence")
        low, high = min(flat), max(flat)
        if low < 0 or high >= len(self.tasks):
            bad = low if low < 0 else high
            raise TaskError(f"task id {bad} is not in the table of {len(self.tasks)} tasks (0..{len(self.tasks) - 1})")
        return ids

    def _id(self, task: Any) -> int:
        if isinstance(task, str):
            return self.tasks.id(task)
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise TaskError(f"task_ids hold {task!r}: give whole numbers or task names")
        return operator.index(task)

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(self._parameters_in_order, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            raise TypeError(
                f"{len(args)} positional arguments do not fit {type(self.base_model).__name__}.forward; name them"
            )
        return {**named, **kwargs}

    def _check_batch(self, context: Context, inputs: Mapping[str, Any]) -> None:
        """Rows are split evenly over the sequences, so a wrong number of task ids might go unnoticed."""
        main = getattr(self.base_model, "main_input_name", "input_ids")
        for name in dict.fromkeys((main, "inputs", "input_ids", "inputs_embeds", "decoder_input_ids")):
            value = inputs.get(name)
            if not isinstance(value, Tensor):
                continue
            if value.shape[0] != context.num_sequences:
                raise TaskError(
                    f"task_ids name {context.num_sequences} sequences, {name} holds {value.shape[0]}: "
                    "pass one task per sequence"
                )
            if context.packed and name == main and tuple(value.shape[:2]) != (context.num_sequences, context.length):
                raise TaskError(
                    f"packed task_ids have {context.length} positions a row, {name} has {value.shape[1]}: "
                    "pass one task per position"
                )

    @contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def disable_adapter(self) -> Any:
        """Context manager: the base model alone (PEFT's name)."""
        return self._in_mode("off")

    def uniform_gates(self) -> Any:
        """Context manager: every expert gets the gate 1 / E, whatever the task (the average-routing control)."""
        return self._in_mode("uniform")

    # -- looking ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """{routing group: [T, H, E]} for every task, zeros for experts that a top-k gate leaves out."""
        values_STHk, slots = self.routing(torch.arange(len(self.tasks), device=self.device))
        if slots is not None:
            shape = (*values_STHk.shape[:-1], self.moe_config.num_experts)
            values_STHk = values_STHk.new_zeros(shape).scatter(-1, slots, values_STHk)
        return dict(zip(self.routing.groups, values_STHk, strict=True))

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Every parameter by kind: base, experts, router, task_embedding, heads, saved; [(name, parameter)]."""
        kind: dict[int, str] = {}
        for module in self.modules():
            if isinstance(module, (LowRankBank, TaskLinear)):
                label = "experts" if isinstance(module, LowRankBank) else "heads"
                kind.update((id(p), label) for p in module.parameters())
            elif isinstance(module, SavedModule):
                kind.update((id(p), "saved") for p in module.saved.parameters())
        for name, p in self.routing.named_parameters():
            kind[id(p)] = "task_embedding" if name.endswith("embedding_TD") else "router"
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {g: [] for g in GROUPS}
        for name, p in self.named_parameters():
            groups[kind.get(id(p), "base")].append((name, p))
        return groups

    def set_trainable(self, groups: Sequence[str]) -> list[str]:
        """Train just these kinds of parameters; returns their names.

        The original of a saved module stands aside while its copy trains.

        Raises:
            ValueError: not one of ``GROUPS``.
        """
        unknown = set(groups) - set(GROUPS)
        if unknown:
            raise ValueError(f"train: unknown group {sorted(unknown)}; known are {', '.join(GROUPS)}")
        aside: set[int] = set()
        if "saved" in groups:
            originals = [m.original for m in self.modules() if isinstance(m, SavedModule)]
            aside = {id(p) for module in originals for p in module.parameters()}
        for kind, parameters in self.parameter_groups().items():
            for _, p in parameters:
                p.requires_grad_(kind in groups and p.is_floating_point() and id(p) not in aside)
        return self.trainable_names()

    def trainable_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """:meth:`parameter_groups` without what is frozen."""
        groups = self.parameter_groups()
        return {g: [(n, p) for n, p in ps if p.requires_grad] for g, ps in groups.items()}

    def trainable_names(self) -> list[str]:
        """The exact list of what trains."""
        return [n for n, p in self.named_parameters() if p.requires_grad]

    def print_trainable_parameters(self) -> None:
        """One line in PEFT's form."""
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        trainable, total = sum(n for n, t in counts if t), sum(n for n, _ in counts)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # -- keeping ------------------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Banks, routers, heads and saved modules, on the CPU, contiguous."""
        groups = self.parameter_groups()
        return {n: p.detach().cpu().contiguous() for g in GROUPS[1:] for n, p in groups[g]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_model.safetensors, adapter_config.json and task_map.json (see :mod:`taskmoe.moe.state`)."""
        from taskmoe.moe.state import save_adapter

        save_adapter(self, folder)

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module, folder: str | Path, tasks: TaskTable | None = None, **kwargs: Any
    ) -> TaskMoEModel:
        """Attach and load what :meth:`save_pretrained` wrote (see :func:`taskmoe.moe.state.load_model`)."""
        from taskmoe.moe.state import load_model

        return load_model(base_model, folder, tasks, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.routing.parameters(), next(self.base_model.parameters())).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)


def _entries(model: nn.Module) -> list[str]:
    """Names of the arguments by which floating inputs enter the model or one of its parts (an image tower)."""
    names = ["inputs_embeds", "decoder_inputs_embeds"]
    names += [str(m.main_input_name) for m in model.modules() if hasattr(m, "main_input_name")]
    return list(dict.fromkeys(names))


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The token embeddings of the model and of its parts (encoder, decoder, towers), each once."""
    found: dict[int, nn.Module] = {}
    for owner in model.modules():
        try:
            embedding = owner.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embedding, nn.Embedding) or (embedding is not None and hasattr(embedding, "num_embeddings")):
            found[id(embedding)] = embedding
    return list(found.values())


def task_dims(model: TaskMoEModel) -> Mapping[str, int]:
    """{parameter name: axis of the tasks} for parameters that have one."""
    dims: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, axis in getattr(type(module), "task_dims", {}).items():
            dims[f"{prefix}.{name}"] = axis
    return dims
