"""The models that new tasks are learned in: the run's mixture with further rows, or a LoRA for each task.

Legend: E experts, T tasks, R rank, K d_in, N d_out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, TaskTable, collapse
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.banks.on_linears import TARGETS
from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.collapse import Pair
from taskmoe.moe.layer import MoELinear, SavedModule
from taskmoe.moe.model import task_dims
from taskmoe.moe.new_tasks import with_new_tasks
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.files import FILE, read_vectors, write_vectors
from taskmoe.moe.representations.kinds import with_vectors
from taskmoe.train.adapt.data import NewTasks, Shots
from taskmoe.train.adapt.settings import AdaptError, AdaptSettings
from taskmoe.train.adapt.starts import Retriever
from taskmoe.train.config import Config, PhaseConfig
from taskmoe.train.config_io import load
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.run_folder import CONFIG
from taskmoe.train.setup import Data, build_moe
from taskmoe.train.task_vectors import MAKERS
from taskmoe.train.trained_run import ALONE, OpenRun, has_own_base
from taskmoe.train.weights import BASE_WEIGHTS


class Subject:
    """A model with the new tasks in its table.

    config: of a run whose checkpoint it would be. ids: of the new tasks here. axes: {parameter: axis whose
    index is a task's id}. known: how many tasks come before them. makes_vectors: whether rows of a task are
    read for its vector.
    """

    config: Config
    model: TaskMoEModel
    known: int
    makes_vectors = False

    def __init__(
        self, run: OpenRun, new: NewTasks, settings: AdaptSettings, scratch: Path, device: torch.device
    ) -> None:
        self.run, self.new, self.settings, self.scratch = run, new, settings, scratch
        self.build()
        self.model.to(device).eval()
        self.tasks = self.model.tasks
        self.ids = list(range(self.known, len(self.tasks)))
        self._start = {n: t.detach().clone() for n, t in self.model.adapter_tensors().items()}
        counts = [len(t.labels or ()) for t in self.tasks]
        self.collate = Collator(run.tokenizer, self.config.task_type, len(self.tasks), counts)

    def build(self) -> None:
        """Set config, model and known."""
        raise NotImplementedError

    @cached_property
    def axes(self) -> dict[str, int]:
        return dict(task_dims(self.model))

    @cached_property
    def retriever(self) -> Retriever:
        """Of the run's own training rows."""
        return Retriever(self.run.config, self.run.tasks, self.settings.encoder)

    @torch.no_grad()
    def begin(self, seed: int, shots: Mapping[int, Shots]) -> None:
        """All that was attached is as it was built; what is drawn is drawn from the seed, and what is made of
        rows is made of the shots."""
        for name, tensor in self.model.adapter_tensors().items():
            tensor.copy_(self._start[name])

    def split(self, name: str) -> dict[int, TaskSplit]:
        """{id of a new task here: its rows}."""
        shift = self.new.ids[0] - self.known
        return {t: replace(self.new.bundle.splits[name][t + shift], task=t) for t in self.ids}

    def begun(self) -> TaskMoEConfig:
        """The run's ``moe`` as it began: before it named the file of vectors that it made."""
        return load(self.run.home / CONFIG, ["--deepspeed=null"]).moe

    def base_weights(self) -> Path | None:
        """A file that belongs into its checkpoint, beside the adapter."""
        return None


class Mixture(Subject):
    """The run's own model, whose table the new tasks stand in behind the others."""

    def build(self) -> None:
        run, known = self.run, self.run.tasks
        names = self.new.table.names[len(known) :]
        labels = [len(t.labels or ()) for t in self.new.table]
        if run.config.task_type == "SEQ_CLS" and max(labels) > max(labels[: len(known)]):
            raise AdaptError(
                f"a new task has {max(labels)} labels, and the heads of the run no more than "
                f"{max(labels[: len(known)])}; use mean or new_lora"
            )
        moe = with_new_tasks(self._with_room(names), known, names)
        rule = "mean" if moe.new_task_rows in ("random", "nearest") else moe.new_task_rows
        trained = run.load(self.new.table, replace(run.config, moe=replace(moe, new_task_rows=rule)))
        self.model, self.known = trained.model, len(known)
        self.config = replace(self.new.config, moe=moe)

    def _with_room(self, names: list[str]) -> TaskMoEConfig:
        """Where a run makes the vectors of its tasks, a file in which :meth:`begin` has yet to fill in those
        of new ones."""
        moe = self.run.config.moe
        kind = choices_in_use(moe).get("representation")
        if kind not in MAKERS or self._options(kind).path is not None:
            return moe  # a file that was given must have them
        self.makes_vectors = True
        known = read_vectors(self.run.checkpoint / FILE)
        mean_D = torch.stack(list(known.values())).mean(0)
        path = self.scratch / FILE
        write_vectors({**known, **dict.fromkeys(names, mean_D)}, path)
        return with_vectors(moe, str(path))

    def _options(self, kind: Any) -> Any:
        return options_of("representation", self.begun(), kind)

    @torch.no_grad()
    def begin(self, seed: int, shots: Mapping[int, Shots]) -> None:
        super().begin(seed, shots)
        if not self.makes_vectors:
            return
        run, splits = self.run, list(self.new.bundle.splits["train"])
        for t, split in self.split("train").items():
            rows = shots[t].all if t in shots else []
            splits[t] = TaskSplit(t, split.tokens.select(rows), [split.raw[i] for i in rows])
        bundle = replace(self.new.bundle, splits={"train": splits})
        data = Data(run.tokenizer, bundle, Collator(run.tokenizer, run.config.task_type, len(self.tasks)))
        kind = choices_in_use(run.config.moe)["representation"]
        with torch.enable_grad():
            names = [self.tasks.names[t] for t in shots]
            made = MAKERS[kind](run.config, data, ALONE, self._options(kind), names)
        vectors_TD = self.model.get_buffer("routing.representation.vectors_TD")
        for name, vector_D in made.items():
            vectors_TD[self.tasks.id(name)] = vector_D

    def base_weights(self) -> Path | None:
        path = self.run.checkpoint / BASE_WEIGHTS
        return path if path.is_file() else None


class Loras(Subject):
    """The base as the run left it, with a LoRA of its own for each new task: the control of all the rest."""

    known = 0

    def build(self) -> None:
        moe, E = self.run.config.moe, self.run.config.moe.num_experts
        beside = "target_modules" in BANKS[moe.bank].uses
        targets = {key: getattr(moe, key) for key in TARGETS if key not in ("rank_pattern", "expert_pattern")}
        rank = self.settings.r or (moe.r * E if beside else 4)
        settings = {"r": rank, "lora_alpha": None, **(targets if beside else {})}
        self._build(TaskMoEConfig(**settings))

    def _build(self, lora: TaskMoEConfig) -> None:
        table = TaskTable(self.new.table[i] for i in self.new.ids)
        moe = replace(
            lora,
            num_experts=len(table),
            router="fixed",
            gate="raw",
            router_options={"experts": {name: i for i, name in enumerate(table.names)}},
        )
        self.config = replace(self._on_base(table), moe=moe)
        self.model = build_moe(self.config, self.run.tokenizer, table, ALONE)

    def _on_base(self, table: TaskTable) -> Config:
        """The settings of a run of the new tasks alone that begins from the base of this one."""
        new, run = self.new.config, self.run
        own = has_own_base(run.config, run.checkpoint)
        patterns = new.evaluation.metrics or {}
        metrics = {p: m for p, m in patterns.items() if any(fnmatchcase(n, p) for n in table.names)}
        return Config(
            model_name_or_path=str(run.checkpoint.resolve()) if own else new.model_name_or_path,
            task_type=new.task_type,
            pooling=new.pooling,
            contrastive=new.contrastive,
            attn_implementation=new.attn_implementation,
            trust_remote_code=new.trust_remote_code,
            datasets=tuple(d for d in new.datasets if d.name in table or d.name is None),
            data=new.data,
            seed=new.seed,
            per_device_eval_batch_size=new.per_device_eval_batch_size,
            learning_rate=self.settings.learning_rate or new.learning_rate,
            evaluation=replace(new.evaluation, metrics=metrics or None, groups=None),
            phases=(PhaseConfig(train=("experts", "heads") if new.task_type == "SEQ_CLS" else ("experts",)),),
            report_to=(),
        )

    @cached_property
    def axes(self) -> dict[str, int]:
        """A task's expert has its number."""
        return {**task_dims(self.model), **{name: 0 for name, _ in self._factors()}}

    def begin(self, seed: int, shots: Mapping[int, Shots]) -> None:
        super().begin(seed, shots)
        self._draw(seed)

    def _factors(self) -> list[tuple[str, Tensor]]:
        banks = [(n, m) for n, m in self.model.named_modules() if isinstance(m, Bank)]
        return [(f"{n}.{key}", m.get_parameter(key)) for n, m in banks for key in m.by_expert]

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """A of each LoRA anew, as LoRA draws it, of task and seed alone; B is zero."""
        drawn = [p for name, p in self._factors() if name.endswith("A_ErK")]
        for t, task in enumerate(self.tasks.names):
            generator = torch.Generator().manual_seed(random.Random(f"{seed}:{task}:A").getrandbits(63))
            for p in drawn:
                bound = p.shape[-1] ** -0.5
                p[t] = torch.empty(p.shape[1:]).uniform_(-bound, bound, generator=generator)


class MeanLoras(Loras):
    """The same, but each LoRA begins as the run's experts under equal gates (MHR-mu of Caccia et al. 2023,
    which averages the experts' parameters: so it is where they are averaged before the product)."""

    def build(self) -> None:
        trained = self.run.load()
        owned = {n for n, _ in trained.model.parameter_groups()["experts"]} & task_dims(trained.model).keys()
        if owned:
            raise AdaptError(
                f"--mode mean: moe.bank {self.run.config.moe.bank!r} has parts that belong to one task each "
                f"({min(owned)}), which have no common mean; use router, router+experts or new_lora"
            )
        pairs = uniform_pairs(trained.model)
        ranks = {name: len(pair.A_RK) for name, pair in pairs.items()}
        most = max(ranks.values())
        self._build(
            TaskMoEConfig(
                r=most,
                target_modules=tuple(pairs),
                rank_pattern={n: r for n, r in ranks.items() if r != most} or None,
                modules_to_save=self.run.config.moe.modules_to_save,
            )
        )
        copies = {n: m for n, m in self.model.base_model.named_modules() if isinstance(m, SavedModule)}
        for name, module in copies.items():
            module.load_state_dict(trained.model.base_model.get_submodule(name).state_dict())
        with torch.no_grad():
            for name, pair in pairs.items():
                bank = self.model.base_model.get_submodule(name).bank
                bank.A_ErK.copy_(pair.A_RK)  # type: ignore[union-attr,operator]
                bank.B_ErN.copy_(pair.B_RN)  # type: ignore[union-attr,operator]

    def _draw(self, seed: int) -> None:
        """Nothing is drawn."""


def uniform_pairs(model: TaskMoEModel) -> dict[str, Pair]:
    """What the experts of each linear add together when each has the gate 1 / E.

    Raises:
        CollapseError: experts that are no product of two factors.
        AdaptError: tokens choose parts of experts, which are not counted as these are.
    """
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, MoELinear)}
    tokens: dict[str, Tensor] = {}
    for name, linear in linears.items():
        if linear.token_routing is None:
            continue
        if not linear.bank.by_expert:
            raise AdaptError(
                f"--mode mean: moe.bank {model.moe_config.bank!r} mixes parts of experts for each token, "
                "which have no common mean; use router+experts or new_lora"
            )
        E = len(linear.bank.get_parameter(linear.bank.by_expert[-1]))
        tokens[name] = torch.full((len(model.tasks), 1, E), 1 / E)
    with model.uniform_gates():
        return collapse(model, 0, tokens or None)
