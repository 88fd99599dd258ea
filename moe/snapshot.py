"""What a mixture's routing is at one moment, in plain tensors, and the file ``routing.safetensors`` of it.

Legend: T tasks, H heads, E experts, M rows, k slots a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from taskmoe.kernels.plan import Plan
    from taskmoe.moe.context import Context
    from taskmoe.moe.model import TaskMoEModel

FILE, SUMS = "routing.safetensors", "token_gates.safetensors"
DECAY = 0.9  # of what tokens chose, from one recorded step to the next: about the last ten count
LEVELS = ("task", "token", "none")


class SnapshotError(ValueError):
    """A file that holds no routing."""


@dataclass(frozen=True)
class Snapshot:
    """Gates of all tasks.

    level: ``task``: the router's gates; ``token``: the mean gates of a task's tokens, where layers route
    tokens themselves; ``none``: no experts take gates. gates: {routing group, or routing layer: [T, H, E]
    float32}; H = 1 but for heads; rows are NaN for tasks whose tokens have not been seen.
    """

    level: str
    gates: Mapping[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the order of the groups is kept."""
        names = json.dumps(list(self.gates), ensure_ascii=False)
        # Routes that are given are one tensor, seen by all groups.
        state = {str(i): g.clone().contiguous() for i, g in enumerate(self.gates.values())}
        save_file(state, path, metadata={"level": self.level, "groups": names})

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """The inverse of :meth:`save`.

        Raises:
            SnapshotError: missing, unreadable, or not of this kind; names the file.
        """
        about, gates = _read(Path(path))
        if about.get("level") not in LEVELS or any(g.dim() != 3 for g in gates.values()):
            raise SnapshotError(f"{path}: not a routing file: level {about.get('level')!r}")
        return cls(about["level"], {name: g.float() for name, g in gates.items()})


class TokenGates:
    """Mean gates of each task's tokens, layer by layer: what :class:`Snapshot` shows of token-level routing.

    It adds up the forward passes of a model inside ``model.recording()``; padding does not count. After them
    :meth:`fold` takes the sums in. Activation checkpointing may show a pass twice, which no mean notices.
    """

    def __init__(self, model: TaskMoEModel) -> None:
        self.num_tasks = len(model.tasks)
        self.places = token_places(model)
        self._names = {id(module): name for name, module in self.places.items()}
        self._now: dict[str, Tensor] = {}  # {layer: [T, E + 1] float64}: sums of gates, and of rows
        self._all: dict[str, Tensor] = {}
        for name, module in self.places.items():
            size = (self.num_tasks, int(module.num_gates) + 1)  # type: ignore[arg-type]
            self._all[name] = torch.zeros(size, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self, module: nn.Module, values: Tensor, slots: Tensor | None, context: Context, plan: Plan
    ) -> None:
        """Count in the gates of a layer's rows: values [M, k], slots [M, k] int64 or None (k = E)."""
        name = self._names[id(module)]
        values = values.detach().float()
        if slots is None:
            gates_ME = values
        else:
            experts = self._all[name].shape[1] - 1
            gates_ME = values.new_zeros(len(values), experts).scatter_add(1, slots, values)
        weights_M = context.text_rows(plan, name, gates_ME)
        # A product, not index_add_: on a GPU that adds in any order.
        mine_TM = torch.zeros(len(context.tasks), len(values), device=values.device)
        mine_TM[plan.row_tasks(values.device), torch.arange(len(values), device=values.device)] = weights_M
        sums = mine_TM @ torch.cat([gates_ME, gates_ME.new_ones(len(values), 1)], dim=1)
        now = self._now.setdefault(
            name, torch.zeros(self._all[name].shape, dtype=torch.float64, device=sums.device)
        )
        now.index_add_(0, context.task_ids(now.device), sums.double())  # two halves of a task commute

    def fold(self, add_up: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Take in what was added since the last call; older passes count for less.

        add_up: the sum of a tensor over the ranks; then this is a collective.
        """
        if not self._all:
            return
        now = [self._now.get(name, torch.zeros_like(total)).cpu() for name, total in self._all.items()]
        flat = add_up(torch.cat([n.flatten() for n in now]))
        parts = flat.cpu().split([n.numel() for n in now])
        for total, part in zip(self._all.values(), parts, strict=True):
            total.mul_(DECAY).add_(part.view_as(total))
        self._now = {}

    def gates(self) -> dict[str, Tensor]:
        """{layer: [T, 1, E] float32}."""
        found = {}
        for name, total in self._all.items():
            sums_TE, rows_T1 = total[:, :-1], total[:, -1:]  # no rows: 0 / 0, NaN
            found[name] = (sums_TE / rows_T1).float().unsqueeze(1)
        return found

    def go_on(self, other: TokenGates) -> None:
        """Take over the sums of an equal model's recorder."""
        self._all = other._all

    @property
    def seen(self) -> bool:
        """Whether any pass has been folded in."""
        return any(bool(total[:, -1].any()) for total in self._all.values())

    def save(self, folder: str | Path) -> None:
        """Write the sums, so that a resumed run goes on with them to the bit."""
        names = json.dumps(list(self._all), ensure_ascii=False)
        state = {str(i): total for i, total in enumerate(self._all.values())}
        save_file(state, Path(folder) / SUMS, metadata={"groups": names})

    def load(self, folder: str | Path) -> None:
        """Go on from :meth:`save`; tasks added since have not been seen. Without the file: from nothing.

        Raises:
            SnapshotError: the file is not readable, or of other layers.
        """
        path = Path(folder) / SUMS
        if not path.exists():
            return
        _, sums = _read(path)
        if list(sums) != list(self._all):
            raise SnapshotError(f"{path}: sums of other layers than this model's")
        for name, rows in sums.items():
            self._all[name][: len(rows)] = rows


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, {group: tensor}) of a file whose metadata name its groups."""
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            return about, {n: file.get_tensor(str(i)) for i, n in enumerate(json.loads(about["groups"]))}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{path}: not a readable routing file ({error})") from error


def token_places(model: nn.Module) -> dict[str, nn.Module]:
    """{module of the base model: what gates its rows itself}; ``num_gates`` of that is E."""
    found: dict[str, nn.Module] = {}
    names: dict[str, str] = {}  # {path: the name that a module there, or the nearest above it, gives itself}
    for path, module in model.named_modules():
        own = module.__dict__.get("name")
        names[path] = own if isinstance(own, str) else names.get(path.rpartition(".")[0], path)
        if getattr(module, "num_gates", 0):
            found[names[path]] = module
    return found


def build_recorder(model: TaskMoEModel) -> TokenGates | None:
    """What follows the tokens of an attached model; None where nothing gates its rows itself."""
    return TokenGates(model) if token_places(model) else None


@torch.no_grad()
def take(model: TaskMoEModel) -> Snapshot:
    """The routing of ``model`` as it is now, on the CPU.

    Where layers route tokens: what :attr:`model.recorder` has seen of them.
    """
    gates = {name: g.detach().float().cpu() for name, g in model.gates().items()}
    recorder = model.recorder
    if recorder is not None and (recorder.seen or not gates):
        return Snapshot("token", recorder.gates())
    return Snapshot("task" if gates else "none", gates)
