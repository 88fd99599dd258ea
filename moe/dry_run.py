"""A dry run that finds out whether the rows of each target can be assigned to sequences, by changing one
sequence.

B = 3 short sequences are run twice; in the second run the middle one is different. The input of a target has
M rows; sequence b must own rows b * M / B to (b + 1) * M / B: so just rows of the middle third may have
changed, and some must have. A linear on position tables (no row changes), sequence-last layouts (rows of all
thirds change) and token dispatch (rows move) are found this way, whatever their shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError
from taskmoe.moe.context import Context, RowSpaceError, use

SEQUENCES, LENGTH, TARGET_LENGTH = 3, 5, 7


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of three sequences for a Hugging Face model, by its main input and config."""
    config = model.config
    name = getattr(model, "main_input_name", "input_ids")
    device = next(model.parameters()).device
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (SEQUENCES, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)}
    if name != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} takes {name}: pass attach(..., example_inputs=) with 3 examples"
        )
    vocab = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size  # type: ignore[union-attr,operator]

    def ids(length: int) -> Tensor:
        low = 4 if vocab > 8 else 0  # past the usual special tokens: a pad token could be masked
        found = torch.arange(length) + torch.arange(SEQUENCES).unsqueeze(1)
        found = low + found % (vocab - low)
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, int) and 0 <= eos < vocab:
            found[:, -1] = eos  # some classifiers (BART, T5) pool there
        return found.to(device)

    inputs = {
        "input_ids": ids(LENGTH),
        "attention_mask": torch.ones(SEQUENCES, LENGTH, dtype=torch.long, device=device),
    }
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids(TARGET_LENGTH)
    return inputs


def _with_other_middle(inputs: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(inputs)
    for key, value in inputs.items():
        if (
            isinstance(value, Tensor)
            and "mask" not in key
            and value.dim() > 0
            and value.shape[0] == SEQUENCES
        ):
            other = value.clone()
            other[1] = value[0] if value.dim() == 1 else value[0].roll(1, 0)
            changed[key] = other
    return changed


def executed_targets(
    model: nn.Module, targets: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None = None
) -> tuple[set[str], list[list[str]]]:
    """The targets that a forward pass runs, after checking the rows of each, and those that read the same
    rows.

    Args:
        targets: {name: module} before they are replaced.
        inputs: keyword arguments of a forward pass of exactly three examples; None: made from the config.

    Returns:
        Names of the targets that were run; lists of two and more of them in one module that were each called
        once, with the very same tensor, in the order of the calls. (What lies in several modules may be
        recomputed apart: every decoder layer's keys read the encoder's one output.)

    Raises:
        RowSpaceError: rows of a target do not belong to one sequence each; names the target.
        ConfigError: the model cannot be run on the made-up inputs.
    """
    inputs = example_inputs(model) if inputs is None else dict(inputs)
    seen: dict[str, list[list[Tensor]]] = {name: [[], []] for name in targets}
    given: dict[str, list[Tensor]] = {}  # in the order of the calls; kept, so that no id is given twice
    run = 0

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen[name][run].append(x.detach().float())
            if run == 0:
                given.setdefault(name, []).append(x)

        return hook

    handles = [m.register_forward_pre_hook(record(n), with_kwargs=True) for n, m in targets.items()]
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), use(Context([0] * SEQUENCES, enabled=False)):
            for run, batch in enumerate((inputs, _with_other_middle(inputs))):  # noqa: B007 (read by the hooks)
                model(**batch, **extra)
    except RowSpaceError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the dry run of {type(model).__name__} failed ({type(error).__name__}: {error}); pass "
            "attach(..., example_inputs={...}) with 3 examples, or dry_run=False"
        ) from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for name, (first, second) in seen.items():
        for x, other in zip(first, second, strict=True):
            _check_rows(name, x, other)
    readers: dict[tuple[str, int], list[str]] = {}
    for name, inputs_of_name in given.items():
        if len(inputs_of_name) == 1:
            readers.setdefault((name.rpartition(".")[0], id(inputs_of_name[0])), []).append(name)
    siblings = [names for names in readers.values() if len(names) > 1]
    return {name for name, (first, _) in seen.items() if first}, siblings


def _check_rows(name: str, x: Tensor, other: Tensor) -> None:
    lead = tuple(x.shape[:-1])
    rows = x.numel() // x.shape[-1]
    advice = "its rows cannot be assigned to tasks; exclude it with exclude_modules"
    if x.shape != other.shape or rows % SEQUENCES:
        raise RowSpaceError(f"{name}: its input has leading shape {lead} for {SEQUENCES} sequences: {advice}")
    tolerance = 1e-4 * x.abs().amax().clamp(min=1e-6)
    changed = ((x - other).abs().amax(-1) > tolerance).reshape(SEQUENCES, -1).any(1).tolist()
    if changed != [False, True, False]:
        which = [i for i, c in enumerate(changed) if c]
        raise RowSpaceError(
            f"{name}: its input has leading shape {lead}; changing sequence 1 changed the rows of sequences "
            f"{which}: {advice}"
        )
