"""README.md of an exported folder: what is in it, how it is loaded, what it learned, and how well."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taskmoe.moe.text_encoder import TextEncoder
from taskmoe.moe.wrappers import HEAD
from taskmoe.train import checkpoint
from taskmoe.train.track.facts import read_results, read_settings
from taskmoe.train.trained_run import TrainedRun

if TYPE_CHECKING:
    from taskmoe.train.export import Exported
    from taskmoe.train.export_formats import Format

CARD = "README.md"
# Of the settings of the run, those that say what was trained, on what, and how.
SETTINGS = (
    *(
        "model_name_or_path",
        "model",
        "task_type",
        "pooling",
        "moe",
        "datasets",
        "data",
        "mixing",
        "max_steps",
    ),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "phases", "surgery"),
    *("balancing", "seed"),
)
LOAD = {
    "peft": """\
from peft import PeftModel
from transformers import {model}

base = {model}.from_pretrained("{base}"{given})
model = PeftModel.from_pretrained(base, "FOLDER")  # FOLDER: where this file lies
""",
    "merged": """\
from transformers import {model}

model = {model}.from_pretrained("FOLDER"{given})  # FOLDER: where this file lies
""",
    "taskmoe": """\
from taskmoe.moe import TaskMoEModel, TaskTable, attach_heads
from taskmoe.moe.text_encoder import TextEncoder
from transformers import {model}

base = {model}.from_pretrained("{base}"{given}){around}
model = TaskMoEModel.from_pretrained(base, "FOLDER")  # FOLDER: where this file lies
model(**inputs, task_ids=["{task}"])
""",
}


def write_card(form: Format, folder: Path, kind: str, exported: Exported | None = None) -> None:
    """Write README.md into ``folder``; exported: the one task in it, None: all tasks of the run.

    Raises:
        FactsError, ConfigError: settings or scores of the run that cannot be read.
    """
    trained = form.trained
    names = trained.model.tasks.names
    title = (
        f"`{exported.task}`, one of {len(names)} tasks" if exported else f"A mixture for {len(names)} tasks"
    )
    parts = [
        _front(trained, kind),
        f"# {title}",
        _what(trained, exported),
        _loading(form, folder, kind, exported),
    ]
    if scores := _scores(trained, exported):
        parts.append(f"## Scores\n\nOf the run's `{trained.config.eval_split}` rows.\n\n{scores}")
    tasks = "\n".join(f"- {_task(trained, n)}" for n in range(len(names)))
    parts.append(f"## Trained together on\n\n{tasks}")
    settings = _given({k: v for k, v in read_settings(trained.home).items() if k in SETTINGS})
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    parts.append(f"## Settings\n\nOf the run (taskmoe), in part:\n\n```yaml\n{text}```")
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _given(value: Any) -> Any:
    """Settings without those that say nothing."""
    if isinstance(value, Mapping):
        found = {k: _given(v) for k, v in value.items()}
        return {k: v for k, v in found.items() if v not in (None, [], {})}
    return [_given(v) for v in value] if isinstance(value, list) else value


def _front(trained: TrainedRun, kind: str) -> str:
    """What the hub reads of a card."""
    about: dict[str, Any] = {"tags": ["taskmoe", *(["lora"] if kind == "peft" else [])]}
    about["library_name"] = "peft" if kind == "peft" else "transformers" if kind == "merged" else "taskmoe"
    if not trained.has_own_base and not Path(str(trained.config.model_name_or_path)).exists():
        about["base_model"] = trained.config.model_name_or_path
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def _what(trained: TrainedRun, exported: Exported | None) -> str:
    moe, step = trained.model.moe_config, checkpoint.read_state(trained.checkpoint)["step"]
    origin = (
        f"From step {step} of `{trained.config.run_name or trained.home.name}`: bank `{moe.bank}`, router "
        f"`{moe.router}`, gate `{moe.gate}`, {moe.num_experts} experts."
    )
    if exported is None:
        return f"{origin} The whole mixture; outputs depend on `task_ids`."
    lines = [origin]
    if exported.losses is not None:
        before, after = exported.losses
        lines.append(
            "The run gives each token gates of its own; here all tokens have the task's mean gates. The loss "
            f"on the task's `{trained.config.eval_split}` rows was {before:.4f} and is {after:.4f}."
        )
    if exported.errors:
        worst = max(exported.errors, key=lambda name: exported.errors[name])
        rows = "\n".join(f"| `{name}` | {error:.4f} |" for name, error in exported.errors.items())
        lines.append(
            f"Cut to rank {exported.rank}; the largest error, of `{worst}`, is {exported.errors[worst]:.4f} "
            f"of the norm of what the experts add.\n\n| linear | error |\n|---|---|\n{rows}"
        )
    if exported.losses is None and not exported.errors:
        lines.append("Exactly what the run computes for this task, but for rounding.")
    if exported.difference is not None:
        lines.append(
            f"Read again, its logits differ from the run's by {exported.difference:.1e} of the largest."
        )
    return "\n\n".join(lines)


def _loading(form: Format, folder: Path, kind: str, exported: Exported | None) -> str:
    trained = form.trained
    number = 0 if exported is None else trained.model.tasks.id(exported.task)
    base = (
        form.inner.config._name_or_path
        if form.base is None
        else f"FOLDER/{os.path.relpath(form.base, folder)}"
    )
    code = LOAD[kind].format(
        model=type(form.inner).__name__,
        base=base,
        given="".join(f", {name}={value}" for name, value in form.arguments(number).items()),
        around=_around(trained),
        task=trained.model.tasks.names[0],
    )
    lines = [f"## Loading\n\n```python\n{code}```"]
    if form.base is not None:
        lines.append("The base was trained too, or built from settings: it comes along.")
    if (folder / HEAD).exists():
        lines.append(
            f"The encoder has no head: `{HEAD}` holds one, for the mean of the last hidden state over the "
            "attended positions (`taskmoe.moe.wrappers.load_head`)."
        )
    if isinstance(own := trained.model.base_model, TextEncoder):
        pooled = "the mean over the attended positions" if own.pooling == "mean" else "the first position"
        normed = ", brought to length one" if own.normalise else ""
        lines.append(f"The vector of a text is {pooled} of the last hidden state{normed}.")
    return "\n\n".join(lines)


def _around(trained: TrainedRun) -> str:
    """The line that puts around a base what the run has around it."""
    own = trained.model.base_model
    if isinstance(own, TextEncoder):
        return f"\nbase = TextEncoder(base, {own.pooling!r}, {own.normalise}, {own.scale})"
    if trained.config.task_type == "SEQ_CLS":
        return (
            f'\nbase = attach_heads(base, TaskTable.load("FOLDER/task_map.json"), "{trained.config.pooling}")'
        )
    return ""


def _scores(trained: TrainedRun, exported: Exported | None) -> str:
    """A table of the run's last evaluation, if it is of this checkpoint."""
    results = read_results(trained.home)
    if results is None or results.get("step") != checkpoint.read_state(trained.checkpoint)["step"]:
        return ""
    found: Mapping[str, Any] = results.get("experts", {}).get("tasks", {})
    lines = ["| task | metric | value | loss | rows |", "|---|---|---|---|---|"]
    for task, scores in found.items():
        if exported is None or task == exported.task:
            metric = scores["metric"]
            lines.append(
                f"| {task} | {metric} | {scores[metric]:.4f} | {scores['loss']:.4f} | {scores['rows']} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _task(trained: TrainedRun, number: int) -> str:
    task = trained.model.tasks[number]
    return task.name if not task.labels else f"{task.name}: {', '.join(task.labels)}"
