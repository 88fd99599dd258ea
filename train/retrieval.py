"""Which of the tasks that a library of experts knows is like an unseen one: retrieval over instances (ELM).

Legend: n instances in the index, q queries, D embedding, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taskmoe.moe import ConfigError
from taskmoe.train.choices import generator

Embed = Callable[[Sequence[str]], Tensor]  # texts -> [n, D]


class InstanceIndex:
    """Embeddings of training instances of each task (Jang et al. 2023, arXiv 2302.03202).

    tasks: T names. embeddings_nD: [n, D] float32; task_n: [n] int64, an index into ``tasks``. Similarity is
    the inner product: give embeddings of length one for the cosine.
    """

    def __init__(self, tasks: Sequence[str], embeddings_nD: Tensor, task_n: Tensor) -> None:
        self.tasks, self.embeddings_nD, self.task_n = list(tasks), embeddings_nD.float(), task_n

    @classmethod
    def build(
        cls, texts: Mapping[str, Sequence[str]], embed: Embed, per_task: int = 100, seed: int = 0
    ) -> InstanceIndex:
        """Embed ``per_task`` training instances of each task (all, where there are fewer), drawn by the seed.

        Args:
            texts: {task: its training texts}; what is evaluated must not be among them.
            embed: the same function that will embed the queries, with the same truncation.

        Raises:
            ConfigError: no task, or a task without texts.
        """
        if not texts:
            raise ConfigError("retrieval: there are no tasks; give {task: its training texts}")
        chosen, counts = [], []
        for i, (task, own) in enumerate(texts.items()):
            if not len(own):
                raise ConfigError(f"retrieval: task {task!r} has no training texts; leave it out")
            order = torch.randperm(len(own), generator=generator(seed, i))[:per_task].sort().values.tolist()
            chosen += [own[j] for j in order]
            counts.append(len(order))
        task_n = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return cls(list(texts), embed(chosen).cpu(), task_n)

    def add(self, other: InstanceIndex) -> InstanceIndex:
        """An index of both: the library grew.

        Raises:
            ConfigError: a task that is in both, or embeddings of another size.
        """
        both = set(self.tasks) & set(other.tasks)
        if both:
            raise ConfigError(f"retrieval: {sorted(both)[0]!r} is in the index already")
        sizes = self.embeddings_nD.shape[1], other.embeddings_nD.shape[1]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"retrieval: embeddings of size {sizes[1]} cannot join some of {sizes[0]}")
        return InstanceIndex(
            [*self.tasks, *other.tasks],
            torch.cat([self.embeddings_nD, other.embeddings_nD]),
            torch.cat([self.task_n, other.task_n + len(self.tasks)]),
        )

    def votes(self, queries_qD: Tensor) -> Tensor:
        """How many queries have their nearest instance in each task: int64 [T]."""
        nearest_q = (queries_qD.float().cpu() @ self.embeddings_nD.T).argmax(1)
        return torch.bincount(self.task_n[nearest_q], minlength=len(self.tasks))

    def retrieve(self, queries_qD: Tensor, k: int = 1) -> list[str]:
        """The ``k`` tasks with the most votes, best first; ties by the mean similarity to their instances.

        k = 1 is the paper's choice for a target task of which 32 instances are known.

        Raises:
            ConfigError: there is no query, or k is not between 1 and the number of tasks.
        """
        if not len(queries_qD):
            raise ConfigError("retrieval: there are no instances of the target; give some")
        if not 1 <= k <= len(self.tasks):
            raise ConfigError(f"retrieval: k is {k}; the index has {len(self.tasks)} tasks")
        similar_n = (queries_qD.float().cpu() @ self.embeddings_nD.T).mean(0)
        sums_T = similar_n.new_zeros(len(self.tasks)).index_add(0, self.task_n, similar_n)
        means = (sums_T / torch.bincount(self.task_n, minlength=len(self.tasks))).tolist()
        votes = self.votes(queries_qD).tolist()
        order = sorted(range(len(self.tasks)), key=lambda t: (-votes[t], -means[t]))
        return [self.tasks[t] for t in order[:k]]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"embeddings_nD": self.embeddings_nD.contiguous(), "task_n": self.task_n}
        save_file(tensors, path, metadata={"tasks": json.dumps(self.tasks, ensure_ascii=False)})

    @classmethod
    def load(cls, path: str | Path) -> InstanceIndex:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                tasks = json.loads(file.metadata()["tasks"])
                return cls(tasks, file.get_tensor("embeddings_nD"), file.get_tensor("task_n"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: not an index of instances ({error})") from error
