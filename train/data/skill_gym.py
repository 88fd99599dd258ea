"""The skill gym: tasks that are compositions of a few latent string operations.

Each task applies an ordered tuple of skills to a string of letters; the text shows the letters alone (or the
task's name before them), so that with hidden tasks only a router that knows the task can be right. The task x
skill matrix is known, which lets an experiment score what a router found (latent skills are the picture
of Ponti et al., "Combining Parameter-efficient Modules for Task-level Generalisation").

Skills are of two kinds, ``order`` (they move letters) and ``letters`` (they replace them), and are dealt into
families of one kind. ``correlation`` is the probability that a task takes a skill from its own family: at 1
tasks of a family share their skills, at 0 families mean nothing.

``rivals`` plants disagreement: so many tasks in a row have the same skills, and from one to the next the
first letters of an answer (a share ``conflict`` of them) move a fixed number of places through the alphabet.
To the same string rivals answer differently in exactly these letters; at ``conflict`` 0 they are one task
under several names. What that does to gradients depends on how well a model can tell the tasks apart:
``benchmarks/conflict.py`` measures it.

A string belongs to one split for all tasks (by a hash of the string), so validation and test strings are new
to every task. Everything is a function of the settings, in any process.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import SkillGymConfig

Letters = tuple[int, ...]  # positions in the alphabet
Skill = Callable[[Letters, int], Letters]  # (letters, size of the alphabet)

ALPHABET = string.ascii_lowercase + string.ascii_uppercase
_PROBES = 48  # strings on which two compositions are compared
_MIN_DIFFERENCE = 0.25  # share of strings on which two tasks must differ
_HELD_OUT = 0.1  # share of all strings in validation, and in test
_FAMILY_SIZE = 4  # skills of one family, at most


def reverse(x: Letters, n: int) -> Letters:
    return x[::-1]


def rotate(x: Letters, n: int) -> Letters:
    """The first letter goes to the end."""
    return x[1:] + x[:1]


def swap(x: Letters, n: int) -> Letters:
    """Neighbours change places; an odd last letter stays."""
    out = list(x)
    for i in range(0, len(x) - 1, 2):
        out[i], out[i + 1] = x[i + 1], x[i]
    return tuple(out)


def halves(x: Letters, n: int) -> Letters:
    """The second half comes first (the middle letter belongs to it)."""
    return x[len(x) // 2 :] + x[: len(x) // 2]


def drop(x: Letters, n: int) -> Letters:
    """Without the first letter."""
    return x[1:]


def double(x: Letters, n: int) -> Letters:
    """The last letter twice."""
    return x + x[-1:]


def ends(x: Letters, n: int) -> Letters:
    """First and last letter change places."""
    return x[-1:] + x[1:-1] + x[:1]


def shift(x: Letters, n: int) -> Letters:
    """Each letter becomes the next of the alphabet, the last the first."""
    return tuple((c + 1) % n for c in x)


def mirror(x: Letters, n: int) -> Letters:
    """The first letter of the alphabet becomes the last, and so on."""
    return tuple(n - 1 - c for c in x)


def pair(x: Letters, n: int) -> Letters:
    """a and b change places, c and d, ...; an odd last letter of the alphabet stays."""
    return tuple(c ^ 1 if (c ^ 1) < n else c for c in x)


def jump(x: Letters, n: int) -> Letters:
    """Half the alphabet forward."""
    return tuple((c + n // 2) % n for c in x)


def triple(x: Letters, n: int) -> Letters:
    """Three letters back."""
    return tuple((c - 3) % n for c in x)


@dataclass(frozen=True)
class GymTask:
    """A composition: ``skills`` are applied from left to right, then the first letters move by ``places``."""

    name: str
    skills: tuple[str, ...]
    family: str
    places: int = 0  # through the alphabet; not zero only for the second of rivals, the third, ...


class SkillGym:
    """The tasks of a configuration and their rows.

    Attributes:
        skills: names of the K latent operations.
        families: family -> its skills.
        tasks: the ``num_tasks`` tasks of the mixture.
        unseen: ``unseen_tasks`` further compositions, for adaptation.

    Raises:
        ConfigError: settings out of range, or fewer distinct compositions than tasks.
    """

    def __init__(self, config: SkillGymConfig) -> None:
        _check(config)
        self.config = config
        kinds = [(name, kind) for name, (kind, _) in SKILLS.items()][: config.num_skills]
        self.skills = [name for name, _ in kinds]
        self.families: dict[str, list[str]] = {}
        for kind in dict.fromkeys(kind for _, kind in kinds):
            members = [name for name, k in kinds if k == kind]
            parts = -(-len(members) // _FAMILY_SIZE)
            for i in range(parts):
                self.families[f"{kind}-{i + 1}" if parts > 1 else kind] = members[i::parts]
        chosen = self._choose()
        self.tasks, self.unseen = chosen[: config.num_tasks], chosen[config.num_tasks :]

    def apply(self, task: GymTask | Sequence[str], text: str) -> str:
        """The task's answer to a string of letters (without spaces)."""
        letters = tuple(ALPHABET.index(c) for c in text)
        skills, places = (task.skills, task.places) if isinstance(task, GymTask) else (task, 0)
        answer = _compose(skills, letters, self.config.alphabet_size)
        return "".join(ALPHABET[c] for c in self._moved(answer, places))

    def _moved(self, answer: Letters, places: int) -> Letters:
        first, n = round(self.config.conflict * len(answer)), self.config.alphabet_size
        return (*((c + places) % n for c in answer[:first]), *answer[first:])

    def skill_matrix(self) -> list[list[int]]:
        """[T, K] of 0 and 1: the skills of each task of the mixture."""
        return [[int(skill in task.skills) for skill in self.skills] for task in self.tasks]

    def rows(self, task: GymTask, split: str) -> list[dict[str, object]]:
        """Canonical rows (see ``formats.py``) of a task, seen or unseen.

        Raises:
            ConfigError: the alphabet and lengths give fewer different strings than the split needs.
        """
        count = getattr(self.config, f"{split}_rows")
        rng = random.Random(f"{self.config.seed}:{task.name}:{split}")
        strings: dict[str, None] = {}
        for _ in range(100 * count + 1000):
            if len(strings) == count:
                break
            text = self._draw(rng)
            if self._split(text) == split:
                strings[text] = None
        if len(strings) < count:
            raise ConfigError(
                f"data.skill_gym.{split}_rows: {count} rows, but only about {len(strings)} different strings "
                f"belong to {split}; lower it, or raise alphabet_size or max_string_length"
            )
        shown = f"{task.name} " if self.config.task_visible else ""
        rows: list[dict[str, object]] = []
        for i, text in enumerate(strings):
            target = " ".join(self.apply(task, text))
            rows.append({
                "prompt": f"{shown}{' '.join(text)} >", "target": target, "accepted": [target],
                "messages": None, "label": None, "where": f"skill_gym/{task.name}/{split}:{i + 1}",
            })  # fmt: skip
        return rows

    def _draw(self, rng: random.Random) -> str:
        length = rng.randint(self.config.min_string_length, self.config.max_string_length)
        return "".join(ALPHABET[rng.randrange(self.config.alphabet_size)] for _ in range(length))

    def _split(self, text: str) -> str:
        digest = hashlib.sha256(f"{self.config.seed}:{text}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return "validation" if share < _HELD_OUT else "test" if share < 2 * _HELD_OUT else "train"

    def _choose(self) -> list[GymTask]:
        config = self.config
        rng = random.Random(f"{config.seed}:tasks")
        lengths = itertools.cycle(range(config.min_string_length, config.max_string_length + 1))
        probes = [
            tuple(rng.randrange(config.alphabet_size) for _ in range(length))
            for length in itertools.islice(lengths, _PROBES)
        ]
        answer = partial(_answers, probes=probes, n=config.alphabet_size)
        # A composition that is one skill, or nothing at all, would be another task in disguise.
        taken = [answer(())] + ([answer((s,)) for s in self.skills] if config.skills_per_task > 1 else [])
        open_ = {
            skills: answer(skills) for skills in itertools.permutations(self.skills, config.skills_per_task)
        }
        uses = dict.fromkeys(self.skills, 0)
        families = list(self.families)
        wanted = config.num_tasks + config.unseen_tasks
        step = config.alphabet_size // config.rivals
        tasks: list[GymTask] = []
        for one in taken:
            open_ = {skills: a for skills, a in open_.items() if _difference(a, one) >= _MIN_DIFFERENCE}
        while len(tasks) < wanted:
            t = len(tasks)
            if not open_:
                raise ConfigError(
                    f"data.skill_gym: {wanted} tasks, but {config.num_skills} skills give only {t} clearly "
                    f"different compositions of {config.skills_per_task}; lower num_tasks or unseen_tasks, "
                    "or raise num_skills or skills_per_task"
                )
            family = families[t // config.rivals % len(families)]
            skills = self._pick(list(open_), self.families[family], uses, rng)
            name, mine = "_".join(skills), open_[skills]
            for places in range(0, min(config.rivals, wanted - t) * step, step):
                rival = [self._moved(answer, places) for answer in mine]
                open_ = {s: a for s, a in open_.items() if _difference(a, rival) >= _MIN_DIFFERENCE}
                tasks.append(GymTask(f"{name}_{places}" if places else name, skills, family, places))
            for skill in skills:
                uses[skill] += 1
        return tasks

    def _pick(
        self, candidates: list[tuple[str, ...]], own: list[str], uses: dict[str, int], rng: random.Random
    ) -> tuple[str, ...]:
        correlation = self.config.correlation
        weights = []
        for skills in candidates:
            weight = 1.0
            for skill in skills:
                inside = correlation / len(own) if skill in own else 0.0
                # Rarely used skills first, so that all of them occur.
                weight *= (inside + (1 - correlation) / len(self.skills)) / (1 + uses[skill]) ** 2
            weights.append(weight)
        if not any(weights):  # correlation 1, and the family's compositions are used up
            weights = [float(sum(skill in own for skill in skills)) + 1e-9 for skills in candidates]
        return rng.choices(candidates, weights)[0]


def _compose(skills: Sequence[str], letters: Letters, n: int) -> Letters:
    for skill in skills:
        letters = SKILLS[skill][1](letters, n)
    return letters


def _answers(skills: Sequence[str], probes: list[Letters], n: int) -> list[Letters]:
    return [_compose(skills, probe, n) for probe in probes]


def _difference(a: list[Letters], b: list[Letters]) -> float:
    return sum(x != y for x, y in zip(a, b, strict=True)) / len(a)


def _check(config: SkillGymConfig) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "num_tasks": (1, 10_000),
        "num_skills": (1, len(SKILLS)),
        "skills_per_task": (1, min(4, config.num_skills)),
        "alphabet_size": (2, len(ALPHABET)),
        "min_string_length": (2, config.max_string_length),
        "max_string_length": (2, 1000),
        "train_rows": (1, 10**7),
        "validation_rows": (0, 10**7),
        "test_rows": (0, 10**7),
        "unseen_tasks": (0, 10_000),
        "correlation": (0, 1),
        "rivals": (1, config.alphabet_size),
        "conflict": (0, 1),
    }
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if not low <= value <= high:
            raise ConfigError(
                f"data.skill_gym.{key}: {value} is out of range; give a value from {low} to {high}"
            )


# The first num_skills are used: both kinds in turn, the easy ones first. name -> (kind, function)
SKILLS: dict[str, tuple[str, Skill]] = {
    "reverse": ("order", reverse),
    "shift": ("letters", shift),
    "rotate": ("order", rotate),
    "mirror": ("letters", mirror),
    "swap": ("order", swap),
    "pair": ("letters", pair),
    "halves": ("order", halves),
    "jump": ("letters", jump),
    "ends": ("order", ends),
    "triple": ("letters", triple),
    "drop": ("order", drop),
    "double": ("order", double),
}
