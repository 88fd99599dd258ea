"""TaskMoEModel: a Hugging Face model whose linears carry experts, called with ``task_ids``.

Legend: B sequences, L positions, S routing groups, T tasks, Tb tasks in this batch, H heads, E experts, k
slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context, Gate, GateBridge, _current, bind_checkpointing, use
from taskmoe.moe.entries import floating_inputs, input_embeddings
from taskmoe.moe.gates import GATES, with_gate
from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.options import options_of
from taskmoe.moe.parts import Parts, splitter
from taskmoe.moe.routing import Routing
from taskmoe.moe.task_ids import check_batch, read_task_ids
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.token_routing import TokenRouting

if TYPE_CHECKING:
    from taskmoe.moe.regularisation import Penalties
    from taskmoe.moe.snapshot import TokenGates

GROUPS = ("base", "experts", "router", "task_embedding", "heads", "saved")


def _embedding_hook(module: nn.Module, args: Any, output: Any) -> Any:
    context = _current.get()
    return context.enter(output) if context is not None and isinstance(output, Tensor) else None


class TaskMoEModel(nn.Module):
    """What :func:`taskmoe.moe.attach` returns. ``forward`` and ``generate`` take the model's own arguments
    plus ``task_ids``: int64 [B], or [B, L] for packed rows (on the CPU; a tensor on a GPU costs a
    synchronisation), or a list of task names.
    """

    def __init__(
        self, base_model: nn.Module, moe_config: TaskMoEConfig, tasks: TaskTable, groups: Sequence[str]
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.routing = Routing(moe_config, groups, tasks)
        self.moe_config, self.tasks = moe_config, tasks
        self.penalties: Penalties | None = None  # see moe/regularisation.py
        self.recorder: TokenGates | None = None  # of what tokens choose, where layers route them
        self._recording = False
        self.not_run: list[str] = []  # targets that the dry run left out: a forward pass never runs them
        self._mode = "routed"  # routed | uniform | off
        self._gate: str | None = None  # of use_gate; None: that of moe_config
        self.parts: Parts | None = None  # keeps the tasks' gradients apart in the forward passes from now on
        self._checkpointed = [m for m in base_model.modules() if hasattr(m, "gradient_checkpointing")]
        self._embeddings = input_embeddings(base_model)
        for module in self._embeddings:
            module.register_forward_hook(_embedding_hook)
        self._entries = floating_inputs(base_model)
        both = getattr(getattr(base_model, "config", None), "is_encoder_decoder", False)
        self._mask_part = "encoder" if both else None  # attention_mask is of its rows
        self._main_input = str(getattr(base_model, "main_input_name", "input_ids"))
        self._parameters_in_order = [
            p.name
            for p in inspect.signature(base_model.forward).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    def forward(
        self, *args: Any, task_ids: Any = None, instance_embeddings: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's own output, with the experts of ``task_ids``.

        instance_embeddings: [B, D] float, for routers that read what each sequence is about.

        Raises:
            TaskError: task_ids are missing, too few or too many, or name a task that is not in the table.
        """
        kwargs = self._named(args, kwargs)
        context = self.context(task_ids)
        context.instances = instance_embeddings
        context.mask, context.mask_part = kwargs.get("attention_mask"), self._mask_part
        if task_ids is not None:
            check_batch(context, kwargs, self._main_input)
        bind_checkpointing(self._checkpointed)
        for name in self._entries:
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].is_floating_point():
                kwargs[name] = context.enter(kwargs[name])
        with use(context):
            output = self.base_model(**kwargs)
        if context.bridge is not None and context.bridge.calls == 0:
            raise RuntimeError(
                f"{type(self.base_model).__name__} called no input embedding that get_input_embeddings() "
                f"knows, so the routers would get no gradient; pass one of {', '.join(self._entries)}"
            )
        return output

    def generate(
        self, *args: Any, task_ids: Any = None, instance_embeddings: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """``generate`` of the base model; beams and returned sequences belong to their sequence's task.

        Raises:
            TaskError: as for :meth:`forward`.
        """
        context = self.context(task_ids)
        context.instances = instance_embeddings
        if task_ids is not None:
            given = {**kwargs, "inputs": args[0] if args else kwargs.get("inputs")}
            check_batch(context, given, self._main_input)
        with torch.no_grad(), use(context):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def context(self, task_ids: Any) -> Context:
        """The :class:`~taskmoe.moe.context.Context` of a forward pass on these tasks."""
        ids = self._host_ids(task_ids)
        enabled = self._mode != "off"
        if not enabled:
            return Context(ids, enabled=False)
        parts = self.parts if torch.is_grad_enabled() else None
        context = Context(ids, halves=None if parts is None else parts.halves)
        context.temperature, context.uniform = self.routing.temperature, self._mode == "uniform"
        context.split = None if parts is None else splitter(parts, context.tasks, context.halves)
        context.penalties = self.penalties if self.training else None
        context.recorder = self.recorder if self._recording else None
        context.checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self._checkpointed)
        if self.routing.router is not None:
            self._route(context, parts)
        elif self.routing.representation is not None:
            self._represent(context)
        return context

    def _represent(self, context: Context) -> None:
        """Give ``context`` the vectors of its tasks, and the bridge back to them."""
        vectors_TD = self.routing.representation(context.task_ids(self.device))  # type: ignore[misc]
        context.vectors = vectors_TD.unsqueeze(1)
        if torch.is_grad_enabled() and vectors_TD.requires_grad:
            context.bridge = GateBridge(vectors_TD[None, :, None])
            context.vectors = context.bridge.leaves[0]

    def _route(self, context: Context, parts: Parts | None) -> None:
        """Give ``context`` the gates of its tasks, and the bridge back to the routers."""
        tasks = torch.tensor(context.tasks).to(self.device, non_blocking=True)
        noise = self.routing.noise(context.tasks)
        values_STHk, slots = self.routing(tasks, None if noise is None else noise.to(self.device))
        if self._mode == "uniform":
            shape = (*values_STHk.shape[:-1], self.moe_config.num_experts)
            values_STHk, slots = GATES["uniform"](values_STHk.detach().new_zeros(shape))
        if torch.is_grad_enabled() and values_STHk.requires_grad:
            keep = None if parts is None else partial(parts.keep_gates, context.tasks)
            context.bridge = GateBridge(values_STHk, keep)
            rows: Sequence[Tensor] = context.bridge.leaves
        else:
            rows = values_STHk.unbind(0)
        context.gates = [
            Gate(v, None if slots is None else slots[i], context.split) for i, v in enumerate(rows)
        ]

    def _host_ids(self, task_ids: Any) -> list[Any]:
        if (
            task_ids is None
            and self._mode == "off"
            and not any(isinstance(m, TaskLinear) for m in self.modules())
        ):
            return [0]  # nothing depends on the task
        return read_task_ids(task_ids, self.tasks)

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(self._parameters_in_order, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            raise TypeError(
                f"{len(args)} positional arguments do not fit {type(self.base_model).__name__}.forward; "
                "pass them by name"
            )
        return {**named, **kwargs}

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
        """Context manager: every expert gets the gate 1 / E, whatever the task (the control for routing)."""
        return self._in_mode("uniform")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: ``recorder``, if there is one, is shown the gates of tokens."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """{routing group: [T, H, E]} for every task, zeros for experts that a top-k gate leaves out.

        Empty where the layers route tokens themselves. Under :meth:`uniform_gates` 1 / E each.
        """
        if self.routing.router is None:
            return {}
        values_STHk, slots = self.routing(torch.arange(len(self.tasks), device=self.device))
        shape = (*values_STHk.shape[:-1], self.moe_config.num_experts)
        if self._mode == "uniform":
            values_STHk, slots = GATES["uniform"](values_STHk.new_zeros(shape))
        if slots is not None:
            values_STHk = values_STHk.new_zeros(shape).scatter(-1, slots, values_STHk)
        return dict(zip(self.routing.groups, values_STHk, strict=True))

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """{kind: [(name, parameter)]} of every parameter; the kinds are ``GROUPS``."""
        kind: dict[int, str] = {}
        for module in self.modules():
            if isinstance(module, Bank):
                kind.update((id(p), module.kind) for p in module.parameters())
            elif isinstance(module, TaskLinear):
                kind.update((id(p), "heads") for p in module.parameters())
            elif isinstance(module, SavedModule):
                kind.update((id(p), "saved") for p in module.saved.parameters())
        for name, p in self.routing.named_parameters():
            kind[id(p)] = "task_embedding" if name.startswith("representation.") else "router"
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {g: [] for g in GROUPS}
        for name, p in self.named_parameters():
            groups[kind.get(id(p), "base")].append((name, p))
        return groups

    def set_trainable(self, groups: Sequence[str]) -> list[str]:
        """Train just these kinds of parameters; returns their names.

        The original of a saved module, or of module experts, stands aside while its copies train.

        Raises:
            ValueError: not one of ``GROUPS``.
        """
        unknown = set(groups) - set(GROUPS)
        if unknown:
            raise ValueError(f"train: unknown group {sorted(unknown)}; known are {', '.join(GROUPS)}")
        copied = [m for m in self.modules() if getattr(type(m), "copies", None) in groups]
        aside = {id(p) for module in copied for p in module.original.parameters()}  # type: ignore[union-attr]
        for bank in (m for m in self.modules() if isinstance(m, Bank) and m.frozen):
            aside |= {id(p) for p in bank.parameters()}
        for kind, parameters in self.parameter_groups().items():
            for _, p in parameters:
                p.requires_grad_(kind in groups and p.is_floating_point() and id(p) not in aside)
        return self.trainable_names()

    def freeze_experts(self) -> None:
        """From now on no expert trains, whatever :meth:`set_trainable` is asked for."""
        for bank in (m for m in self.modules() if isinstance(m, Bank) and m.kind == "experts"):
            bank.frozen = True
            bank.requires_grad_(False)

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
        share = f"{100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share}")

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Banks, routers, heads and saved modules, on the CPU, contiguous."""
        return {n: p.detach().cpu().contiguous() for n, p in self.adapter_tensors().items()}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """{name: parameter or persistent buffer} of all that was attached."""
        groups = self.parameter_groups()
        found: dict[str, Tensor] = {n: p for g in GROUPS[1:] for n, p in groups[g]}
        for prefix, module in self.named_modules():
            if isinstance(module, Bank) or prefix.startswith("routing."):
                found.update(
                    (f"{prefix}.{n}", b)
                    for n, b in module.named_buffers(recurse=False)
                    if n not in module._non_persistent_buffers_set
                )
        return found

    def use_gate(self, name: str) -> None:
        """Gate as ``name`` says from now on, with its default options, instead of ``moe_config.gate``.

        What :meth:`save_pretrained` writes has this gate, and the temperature that holds then.
        """
        config = with_gate(self.moe_config, name)
        self._gate = name
        for module in self.modules():
            if isinstance(module, (Routing, TokenRouting)):
                module.gate, module.top_k = GATES[name], config.top_k
                module.gate_options = options_of("gate", config, GATES[name])

    def config_in_force(self) -> TaskMoEConfig:
        """``moe_config`` with the gate and the temperature of a forward pass as it is now."""
        config = self.moe_config if self._gate is None else with_gate(self.moe_config, self._gate)
        return replace(config, router_temperature=self.routing.temperature)

    def after_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Call once after each optimiser step, on all ranks; add_up: the sum of a tensor over the ranks."""
        for module in self.modules():
            if isinstance(module, Bank):
                module.after_step(add_up)

    def merge_and_unload(self, task: int | str) -> nn.Module:
        """A copy of the base model with what the experts of ``task`` add in its weights (PEFT's name).

        Raises:
            CollapseError, TaskError: as :func:`taskmoe.moe.merge_weights.merge`.
        """
        from taskmoe.moe.merge_weights import merge

        return merge(self, task)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_model.safetensors, adapter_config.json, task_map.json (:mod:`taskmoe.moe.state`)."""
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


def task_dims(model: TaskMoEModel) -> Mapping[str, int]:
    """{parameter name: axis of the tasks} for parameters that have one."""
    dims: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, axis in getattr(type(module), "task_dims", {}).items():
            dims[f"{prefix}.{name}"] = axis
    return dims
