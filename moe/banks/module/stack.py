"""E copies of a module as one stack of parameters, and how one of them is run.

Legend: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.parts import Split

HALVES = (torch.bfloat16, torch.float16)
Params = dict[str, Tensor]
Job = tuple[int, int]  # task of the batch, expert
Run = Callable[[int, Job, tuple, dict[str, Any]], Any]


class CacheError(ValueError):
    """A key-value cache that experts cannot keep their own entries in."""


class ModuleStack(Bank):
    """The parameters of E copies of a module: one tensor [E, ...] for each of the module's, float32 at least.

    Stacked, so that every rank has a gradient for every tensor in every step (zeros for experts that no row
    chose), and so that a router's choice changes no communication.

    Args:
        module: what is copied; it stays as it is.
        num_experts: E.
        noise: standard deviation of what is added to each copy.
        cache_stride: layers of the model that keep keys and values; the j-th expert that a layer runs keeps
            its own at ``layer_idx + j * cache_stride`` of the cache.
    """

    splits: ClassVar[bool] = True

    def __init__(self, module: nn.Module, num_experts: int, noise: float, cache_stride: int) -> None:
        super().__init__()
        self.num_experts, self.noise, self.cache_stride = num_experts, noise, cache_stride
        self.keys: dict[str, str] = {}  # of the module -> here, where a name has no dots
        for name, p in module.named_parameters():
            self.keys[name] = name.replace(".", "__") + "_E"
            dtype = torch.float32 if p.dtype in HALVES else p.dtype
            empty = torch.empty(num_experts, *p.shape, dtype=dtype, device=p.device)
            self.register_parameter(self.keys[name], nn.Parameter(empty))
        self.start(module)
        # In a list: a child would be moved, saved, hooked and checkpointed with the model.
        self._shells = [shell(module)]

    def forward(
        self,
        body: Callable[[Run, tuple, dict], Any],
        module: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        cached: bool = False,
        split: Split | None = None,
    ) -> Any:
        """What ``body`` makes of the arguments with the experts, which it runs as it likes.

        Under ZeRO-3 the parameters are whole in here alone, and on all ranks as many tensors come and go:
        so what is cut up by the choices of a rank's tasks is cut up, and put together again, inside.

        Args:
            body: called with ``run(place, (task, expert), args, kwargs)`` and the arguments as they are here.
                Tasks count with ``split`` alone; places count from 0.
            module: the original, for its buffers and the dtype to compute in.
            cached: each place keeps its own keys and values.
            split: keeps the tasks' gradients apart; each run is then about rows of its task.
        """
        originals = dict(module.named_parameters())
        parameters = [getattr(self, key) for key in self.keys.values()]
        wholes = [p.unsqueeze(0) for p in parameters] if split is None else split(*parameters)
        stacks = {n: [p.unbind(0) for p in w.unbind(0)] for n, w in zip(self.keys, wholes, strict=True)}
        buffers = dict(module.named_buffers())

        def run(place: int, job: Job, args: tuple, kwargs: dict[str, Any]) -> Any:
            task, expert = job
            mine: Params = {}
            for n, stack in stacks.items():
                mine[n] = stack[task if len(stack) > 1 else 0][expert].to(originals[n].dtype)
            runner = self._shell(place if cached else 0)
            runner.train(self.training)
            return functional_call(runner, {**mine, **buffers}, args, kwargs)

        return body(run, args, kwargs)

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Make every expert a copy of ``module`` (and noise)."""
        for name, p in module.named_parameters():
            copies = getattr(self, self.keys[name])
            copies.copy_(p.expand_as(copies))
            if self.noise > 0:
                copies.add_(torch.randn_like(copies), alpha=self.noise)

    def expert(self, e: int) -> Params:
        """The parameters of expert ``e``, detached, by the module's own names."""
        return {n: getattr(self, key)[e].detach() for n, key in self.keys.items()}

    def _shell(self, place: int) -> nn.Module:
        """A shell whose layers keep keys and values at the entries of ``place``."""
        while len(self._shells) <= place:
            made = shell(self._shells[0])
            for m in made.modules():
                number = getattr(m, "layer_idx", None)
                if isinstance(number, int):
                    vars(m)["layer_idx"] = number + len(self._shells) * self.cache_stride
            self._shells.append(made)
        return self._shells[place]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {', '.join(self.keys)}"


def shell(module: nn.Module) -> nn.Module:
    """A copy of ``module`` without weights, hooks and checkpointing, to run with an expert's parameters."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for m in module.modules():  # settings are shared: attention implementations may be changed later
        if hasattr(m, "config"):
            memo[id(m.config)] = m.config
    copied = copy.deepcopy(module, memo)
    for m in copied.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(m, hooks).clear()
        if "gradient_checkpointing" in vars(m):
            vars(m)["gradient_checkpointing"] = False  # whoever runs experts checkpoints them
    return copied


def find_cache(args: Sequence[Any], kwargs: dict[str, Any]) -> Cache | None:
    """The key-value cache among the arguments of a call, if there is one."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Cache)), None)


def extend_cache(cache: Cache, stride: int, experts: int, name: str) -> None:
    """Give ``cache`` entries for ``experts`` experts a layer; those of expert j begin at ``j * stride``.

    Beams reorder all entries of a cache, so the experts' own follow their sequences.

    Raises:
        CacheError: not a cache that grows as it goes (``DynamicCache``).
    """
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:
        if type(part) is not DynamicCache or part.offloading:
            raise CacheError(
                f"{name}: experts that attend keep their own keys and values, which {type(part).__name__} "
                "has no room for; leave cache_implementation out, or pass use_cache=False"
            )
        if part.layer_class_to_replicate is not None:
            continue  # grows by itself
        while (index := len(part.layers)) < stride * experts:
            like = part.layers[index % stride if index >= stride else -1]
            if type(like) is DynamicLayer:
                part.layers.append(DynamicLayer())
            elif type(like) is DynamicSlidingWindowLayer:
                part.layers.append(DynamicSlidingWindowLayer(like.sliding_window))
            else:
                raise CacheError(
                    f"{name}: experts that attend keep their own keys and values, which a cache with "
                    f"{type(like).__name__} has no room for; pass use_cache=False"
                )
