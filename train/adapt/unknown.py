"""Tasks that a run was not trained on, in evaluation and generation: an error, or they go where others went.

Nothing is learned and no right answer is read, so that the rows may be those that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, TaskTable
from taskmoe.moe.new_tasks import has_rows, with_new_tasks
from taskmoe.train.adapt.settings import AdaptError
from taskmoe.train.adapt.starts import Retriever, start_as
from taskmoe.train.config import Config
from taskmoe.train.instances import HASHED
from taskmoe.train.trained_run import OpenRun, TrainedRun

# error: they are refused. average: the run's rule for the rows of new tasks, or their mean where it has none
# that asks no loss. nearest: as the known task whose training texts are most like theirs.
POLICIES = ("error", "average", "nearest")


def settings_with(config: Config, known: TaskTable, names: Sequence[str], policy: str) -> TaskMoEConfig:
    """``config.moe`` for a table with ``names`` behind the known tasks.

    Raises:
        AdaptError: classifiers, whose heads know their own labels; a map that has no average.
    """
    moe = config.moe
    if config.task_type == "SEQ_CLS":
        raise AdaptError(
            f"--unknown_task {policy}: task {names[0]!r} is not of the run, which has no head for its "
            "labels; learn one with taskmoe adapt"
        )
    if moe.router == "fixed" and policy == "average":
        raise AdaptError(
            "--unknown_task average: moe.router 'fixed' is a map that is given, of which there is no "
            "average; use nearest"
        )
    rule = "mean" if moe.new_task_rows in ("random", "nearest") else moe.new_task_rows
    return replace(with_new_tasks(moe, known, names), new_task_rows=rule)


def route_unknown(
    model: TaskMoEModel,
    known: TaskTable,
    texts: Mapping[str, Sequence[str]],
    policy: str,
    config: Config,
    encoder: str = HASHED,
) -> dict[str, str]:
    """Send tasks that were appended to the table of ``model`` where ``policy`` says.

    Args:
        texts: {task: prompts of it}. config: of the run, with its own data, which ``nearest`` reads.

    Returns:
        {task: the known one that it goes as}; empty where they do not go as one.

    Raises:
        ConfigError, DataError: the run's data cannot be read again.
    """
    if policy != "nearest" or not texts or not has_rows(model):
        return {}
    retriever, table = Retriever(config, known, encoder), model.tasks
    found = {table.id(name): table.id(retriever(own)) for name, own in texts.items()}
    return {table.names[new]: seen for new, seen in start_as(model, found).items()}


def told(name: str, routed: Mapping[str, str]) -> str:
    """What is said of a task that is not known, after :func:`route_unknown`."""
    how = f"as {routed[name]}" if name in routed else "by the run's rule for new tasks"
    return f"task {name!r} is not of the run: routed {how}"


def load_with_unknown(
    run: OpenRun, texts: Mapping[str, Sequence[str]], policy: str, encoder: str = HASHED
) -> TrainedRun:
    """A run whose table also has tasks that it does not know, routed as ``policy`` says.

    Args:
        texts: {task: prompts of it}; those of known tasks change nothing.

    Raises:
        TaskError: under ``error``, the first task that is not known, with the nearest names.
        AdaptError, ConfigError, DataError, StateError: as :func:`settings_with`, :func:`route_unknown` and
            :meth:`taskmoe.train.trained_run.OpenRun.load`.
    """
    names = [name for name in texts if name not in run.tasks]
    if not names:
        return run.load()
    if policy == "error":
        run.tasks.id(names[0])
    table = TaskTable(run.tasks)
    for name in names:
        table.add(name)
    moe = settings_with(run.config, run.tasks, names, policy)
    trained = run.load(table, replace(run.config, moe=moe))
    route_unknown(trained.model, run.tasks, {n: texts[n] for n in names}, policy, run.config, encoder)
    return trained
