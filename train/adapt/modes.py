"""The ways to adapt: in which model, where a task starts, and what of it is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from taskmoe.moe.model import GROUPS
from taskmoe.moe.new_tasks import OF_TASKS
from taskmoe.moe.own_rows import OwnRows
from taskmoe.train.adapt.data import Shots
from taskmoe.train.adapt.settings import AdaptError
from taskmoe.train.adapt.starts import least_loss, require_rows, start_as
from taskmoe.train.adapt.subjects import Loras, MeanLoras, Mixture, Subject

Start = Callable[[Subject, Mapping[int, Shots]], dict[int, str]]


def by_rule(subject: Subject, shots: Mapping[int, Shots]) -> dict[int, str]:
    """As the run's ``new_task_rows`` says."""
    return by_loss(subject, shots) if subject.run.config.moe.new_task_rows == "nearest" else {}


def by_loss(subject: Subject, shots: Mapping[int, Shots]) -> dict[int, str]:
    """At the known task under which the shots have the least loss."""
    rows, config = {t: s.all for t, s in shots.items()}, subject.run.config
    splits = subject.split("train")
    found = least_loss(subject.model, splits, rows, subject.known, subject.collate, config)
    return start_as(subject.model, found)


def by_text(subject: Subject, shots: Mapping[int, Shots]) -> dict[int, str]:
    """At the known task whose prompts are like those of the shots."""
    splits, table = subject.split("train"), subject.tasks
    prompts = {t: [splits[t].raw[i]["prompt"] for i in s.all] for t, s in shots.items()}
    return start_as(subject.model, {t: table.id(subject.retriever(texts)) for t, texts in prompts.items()})


def as_built(subject: Subject, shots: Mapping[int, Shots]) -> dict[int, str]:
    """As its model is built: of a mixture by the run's ``new_task_rows`` too, or the mean where that asks a
    loss or draws."""
    return {}


@dataclass(frozen=True)
class Mode:
    """One way to adapt.

    subject: the model. start: where tasks begin. learns: groups of parameters, besides heads. whole: all of
    them, not the tasks' own rows: then each task has the model for itself. rows: it needs something that
    belongs to one task.
    """

    subject: type[Subject]
    start: Start
    learns: tuple[str, ...] = ()
    whole: bool = False
    rows: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """Kinds of parameters that are learned; a head is needed by whatever classifies."""
        return (*self.learns, *(() if "heads" in self.learns else ("heads",)))

    def check(self, name: str, subject: Subject) -> None:
        """Raises AdaptError where the run has nothing that this way could use."""
        routed = self.subject is Mixture and self.start in (by_rule, as_built)
        if routed and subject.run.config.moe.router == "fixed":
            raise AdaptError(
                f"--mode {name}: moe.router 'fixed' is a map that is given, and sends a new task to no "
                "expert; use nearest, retrieve, mean or new_lora"
            )
        if self.rows:
            require_rows(subject.model, name)

    def reads_shots(self, subject: Subject) -> bool:
        """Whether the result depends on what is drawn: it learns, starts at what suits the shots, or routes
        by vectors that are made of them."""
        rule = self.start is by_rule and subject.run.config.moe.new_task_rows == "nearest"
        owned = OwnRows(subject.model, subject.ids[:1], self.groups, subject.axes, self.whole)
        made = subject.makes_vectors or self.start in (by_loss, by_text)
        return bool(owned.parameters) or rule or made


MODES: dict[str, Mode] = {
    "router": Mode(Mixture, by_rule, OF_TASKS, rows=True),  # MHR-z
    "router+experts": Mode(Mixture, by_rule, tuple(g for g in GROUPS if g != "base"), whole=True),
    "mean": Mode(MeanLoras, as_built, ("experts",)),  # MHR-mu
    "new_lora": Mode(Loras, as_built, ("experts",)),
    "nearest": Mode(Mixture, by_loss, rows=True),
    "retrieve": Mode(Mixture, by_text, rows=True),  # ELM
    "zero": Mode(Mixture, as_built),
}
