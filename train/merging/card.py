"""README.md of a merged LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from taskmoe.moe.heads import TaskLinear
from taskmoe.train.model_card import CARD
from taskmoe.train.trained_run import TrainedRun

if TYPE_CHECKING:
    from taskmoe.train.merging.merge import Result


def write_card(result: Result, kind: str, home: TrainedRun | None, folder: Path) -> None:
    """Write README.md into ``folder``."""
    options = ", ".join(f"{key} {value}" for key, value in result.options.items())
    lines = [
        f"---\ntags: [taskmoe, lora]\nlibrary_name: {'peft' if kind == 'peft' else 'taskmoe'}\n---",
        f"# {len(result.loras)} LoRAs, merged",
        f"By `{result.method}`{f' ({options})' if options else ''}, times {result.coefficient:g}. The "
        f"largest rank is {result.rank}.",
        "\n".join(f"- {name}" for name in result.loras),
    ]
    if result.choices:
        rows = "\n".join(f"| {c.coefficient:g} | {c.score:.4f} | {c.loss:.4f} |" for c in result.choices)
        lines.append(
            f"The coefficient was chosen on the `{result.split}` rows of {', '.join(result.held_in)}.\n\n"
            f"| coefficient | score | loss |\n|---|---|---|\n{rows}"
        )
    if result.errors:
        rows = "\n".join(f"| `{name}` | {error:.4f} |" for name, error in result.errors.items())
        lines.append(
            "Cut to that rank; the error is |dW - what is here| / |dW|.\n\n"
            f"| linear | error |\n|---|---|\n{rows}"
        )
    if kind == "peft" and home is not None and has_heads(home):
        lines.append("The tasks' heads are not in it: LoRAs of the encoder were merged.")
    (folder / CARD).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def has_heads(trained: TrainedRun) -> bool:
    """Whether each task of the run has a head of its own, which no merged LoRA holds."""
    return any(isinstance(m, TaskLinear) for m in trained.model.modules())
