"""Which modules of a transformer become experts: its layers, their attention, their FFNs, or modules by name.

Found by shape, not by class: a layer is an element of a list of like modules, attention is what is called so,
an FFN is what else of a layer holds two linears and more.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import torch
from torch import nn

from taskmoe.moe.config import ConfigError
from taskmoe.moe.targets import features, layer_number

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
PAIR = ("intermediate", "output")  # BERT and its relatives keep an FFN in two modules of the layer


class Pair(nn.Module):
    """An FFN that its layer holds in two modules, as one: ``output(intermediate(x), residual)``."""

    def __init__(self, intermediate: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x, residual: [..., K] -> [..., K]."""
        return self.output(self.intermediate(x), residual)


def find_modules(model: nn.Module, of: str, first: int, every: int) -> dict[str, nn.Module]:
    """{name: module} of what ``of`` means in ``model``, in its order.

    Args:
        of: ``layer``, ``attention``, ``ffn``, or a module's name, the end of it, or a regular expression.
        first, every: only in layers ``first``, ``first + every``, ... of each stack (by their number).

    Returns:
        Of a two-part FFN the second part's name stands for both, with a new :class:`Pair` of them.

    Raises:
        ConfigError: nothing is found (with the closest names), or one of them lies inside another.
    """
    if of in KINDS:
        numbered = [(int(n.rpartition(".")[2]), n, m) for n, m in layers(model)]
        found = [(number, *pair) for number, n, m in numbered for pair in KINDS[of](n, m)]
        if not found:
            raise ConfigError(
                f"moe.bank_options.of: no {of} found in {type(model).__name__}"
                + (
                    "; name the modules (a pattern on their names) or use of: layer"
                    if numbered
                    else ": it has no list of like layers; name the modules (a pattern on their names)"
                )
            )
    else:
        found = [(layer_number(n) or 0, n, m) for n, m in model.named_modules() if n and _matches(n, of)]
        if not found:
            names = [n for n, _ in model.named_modules() if n]
            leaves = sorted({n.rpartition(".")[2] for n in names})
            near = difflib.get_close_matches(of, [*KINDS, *leaves, *names], n=4, cutoff=0.4) or [*KINDS]
            raise ConfigError(
                f"moe.bank_options.of: {of!r} matches no module; the closest names are {', '.join(near)}"
            )
    chosen = {n: m for i, n, m in found if i >= first and (i - first) % every == 0}
    if not chosen:
        numbers = sorted({i for i, _, _ in found})
        raise ConfigError(
            f"moe.bank_options.first: {first} with every: {every} leaves none of layers {numbers[0]} to "
            f"{numbers[-1]}; choose smaller numbers"
        )
    for name in chosen:
        outer = next((n for n in chosen if name.startswith(n + ".")), None)
        if outer is not None:
            raise ConfigError(
                f"moe.bank_options.of: {of!r} matches {outer} and {name} inside it; name one of them"
            )
    return chosen


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers: elements of the outermost lists of modules of one class that hold linears."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(n + ".") for n, _ in found):
            continue
        members = list(module.named_children())
        if members and len({type(m) for _, m in members}) == 1 and all(_linears(m) for _, m in members):
            found += [(f"{name}.{n}", m) for n, m in members]
    return found


def attends(name: str, module: nn.Module) -> bool:
    """Whether rows of one sequence see each other in it, by the names of its parts."""
    named = ATTENTION.search(name.rpartition(".")[2]) is not None
    return named or any(True for _ in _attention("", module))


def _whole(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, layer


def _attention(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are called attention and hold linears."""
    for n, child in module.named_children():
        if ATTENTION.search(n) and _linears(child):
            yield f"{name}.{n}", child
        else:
            yield from _attention(f"{name}.{n}", child)


def _ffn(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is not attention and holds two linears and more, without what stands around them."""
    children = dict(module.named_children())
    if all(n in children and _linears(children[n]) for n in PAIR):
        yield f"{name}.{PAIR[1]}", Pair(*(children[n] for n in PAIR))
        return
    for n, child in children.items():
        if ATTENTION.search(n) and _linears(child):
            continue
        if any(True for _ in _attention("", child)):
            yield from _ffn(f"{name}.{n}", child)
        elif _linears(child) > 1:
            yield _innermost(f"{name}.{n}", child)


def _innermost(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The smallest module that holds all linears of ``module``."""
    for n, child in module.named_children():
        if _linears(child) == _linears(module) and not isinstance(child, nn.ModuleList):
            return _innermost(f"{name}.{n}", child)
    return name, module


def _linears(module: nn.Module) -> int:
    return sum(features(m) is not None for m in module.modules())


def _matches(name: str, pattern: str) -> bool:
    """The name, the end of it after a dot, or a regular expression on the whole of it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"moe.bank_options.of: {pattern!r} is neither one of {', '.join(KINDS)} nor a regular "
            f"expression ({error})"
        ) from error


KINDS = {"layer": _whole, "attention": _attention, "ffn": _ffn}
