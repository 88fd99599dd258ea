"""Which parameters several tasks pull at, so that their gradients can conflict."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from taskmoe.moe import TaskMoEModel
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.model import task_dims
from taskmoe.moe.targets import routing_group
from taskmoe.train.config import SURGERY_SCOPES, SURGERY_WAYS, ConfigError

WHOLE = "all"  # the one group where every shared parameter counts into one Gramian


@dataclass(frozen=True)
class Scope:
    """The trainable parameters, sorted by what surgery does with them.

    banks, routers, others: {name: parameter} of the shared ones in scope: those inside the layers that one
    backward pass can split by task (experts, routers of tokens), those of the routers of tasks, and what else
    trains. private: {name: (parameter, axis of the tasks)}: a head or a row of a table
    belongs to one task alone, keeps its plain gradient and stays outside the Gramian. groups: {group: names},
    one Gramian each. rest: True where shared parameters train that are out of scope.
    """

    banks: dict[str, nn.Parameter]
    routers: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]
    private: dict[str, tuple[nn.Parameter, int]]
    groups: dict[str, list[str]]
    rest: bool

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        return {**self.banks, **self.routers, **self.others}


def find_scope(model: TaskMoEModel, scope: str = "all") -> Scope:
    """Sort what trains in ``model``.

    Args:
        scope: ``all`` shared parameters, ``experts`` or ``routers`` alone; ``layer`` is all, with a Gramian
            and weights for each layer of the model (a router is a layer of its own).

    Raises:
        ConfigError: an unknown scope.
    """
    if scope not in SURGERY_SCOPES:
        raise ConfigError(f"surgery.scope: {scope!r} is none of {', '.join(SURGERY_SCOPES)}")
    axes = task_dims(model)
    rooms: dict[str, dict[str, nn.Parameter]] = {"banks": {}, "routers": {}, "others": {}}
    private: dict[str, tuple[nn.Parameter, int]] = {}
    groups: dict[str, list[str]] = {}
    rest = False
    inside = (m for m in model.modules() if isinstance(m, Bank) and m.splits)
    split = {id(p) for m in inside for p in m.parameters(recurse=False)}
    for kind, parameters in model.trainable_groups().items():
        routes = kind in ("router", "task_embedding")
        within = {"experts": kind == "experts", "routers": routes}.get(scope, True)
        for name, parameter in parameters:
            room = "banks" if id(parameter) in split else "others"
            if name.startswith("routing."):
                room = "routers"
            if name in axes:
                private[name] = (parameter, axes[name])
            elif within:
                rooms[room][name] = parameter
                group = routing_group(name, "layer") if scope == "layer" else WHOLE
                groups.setdefault(group, []).append(name)
            else:
                rest = True
    return Scope(rooms["banks"], rooms["routers"], rooms["others"], private, groups, rest)


def choose_way(way: str, scope: Scope) -> str:
    """``fused`` (one backward pass), ``separate`` (one a task) or ``slices``, as ``way`` asks.

    ``auto`` is fused where all that is in scope are banks and routers, else separate.

    Raises:
        ConfigError: an unknown way, or ``fused`` where other shared parameters are in scope.
    """
    if way not in SURGERY_WAYS:
        raise ConfigError(f"surgery.way: {way!r} is none of {', '.join(SURGERY_WAYS)}")
    if way == "fused" and scope.others:
        raise ConfigError(
            f"surgery.way: 'fused' splits the gradients of banks and routers, and {next(iter(scope.others))} "
            "trains too; use way: auto, or scope: experts"
        )
    return ("separate" if scope.others else "fused") if way == "auto" else way

