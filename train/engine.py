"""The DeepSpeed engine of one phase: optimiser groups, our own accumulation, the state of the optimiser.

DeepSpeed sees one backward pass a step: micro-batches accumulate inside ``accumulate()``, and one reduction
follows when it closes. The loss handed in is a share of the step's loss (see ``objectives``): shares add up
over micro-batches and ranks, and because DeepSpeed averages over ranks, each is multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.model import TaskMoEModel
from taskmoe.train import deepspeed_config
from taskmoe.train.checkpoint import CheckpointError
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.distributed import Ranks
from taskmoe.train.schedule import Phase
from taskmoe.train.step_regularisers import build_regularisers
from taskmoe.train.step_surgery import build_surgery

TAG = "optimiser"  # DeepSpeed's name for the one state in a checkpoint's deepspeed/ folder


class TrainingError(RuntimeError):
    """Training cannot go on: the message says what was found and where."""


def build_optimizer(
    config: Config, groups: Mapping[str, list[tuple[str, torch.nn.Parameter]]]
) -> torch.optim.Optimizer:
    """One optimiser group a kind of parameter; no weight decay on routers and task embeddings.

    Raises:
        ConfigError: nothing trains.
    """
    built: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        if parameters:
            decay = 0.0 if name in ("router", "task_embedding") else config.weight_decay
            built.append(
                {"params": [p for _, p in parameters], "name": name, "weight_decay": decay, "lr": 0.0}
            )
    if not built:
        raise ConfigError("phases.train: nothing trains in this phase; name a group that the model has")
    if config.optim == "sgd":
        return torch.optim.SGD(built, lr=0.0)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(built, lr=0.0, betas=betas, eps=config.adam_epsilon)


class Engine:
    """A model under DeepSpeed for one phase."""

    def __init__(self, model: TaskMoEModel, config: Config, phase: Phase, ranks: Ranks) -> None:
        import deepspeed

        model.set_trainable(phase.train)
        groups = model.trainable_groups()
        self.optimizer = build_optimizer(config, groups)
        settings = deepspeed_config.build(config, ranks.world_size, config.deepspeed)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self.stage = int(self.engine.zero_optimization_stage())
        self.model, self.world_size = model, ranks.world_size
        self.parameters = {n: p for ps in groups.values() for n, p in ps}
        self.surgery = build_surgery(config.surgery, model, ranks, config.seed, self.gathered, self.stage)
        self.regularisers = build_regularisers(
            model, self.parameters, self.gathered, config.gradient_accumulation_steps
        )

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """The backward passes of one optimiser step; gradients are combined and reduced when it closes."""
        with self.engine.no_sync() if self.stage == 0 else self.engine.coalesce_grad_reduction():
            if self.surgery is None:
                yield
            else:
                with self.surgery.gradients:
                    yield
                self.surgery.finish()
            if self.regularisers is not None:
                self.regularisers.finish()
        if self.stage == 0:
            self.engine.allreduce_gradients()

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Back-propagate a share of the step's loss."""
        self.engine.backward(loss * self.world_size, retain_graph=retain_graph, scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[str, float]) -> float | None:
        """Clip and update. Returns the gradient norm before clipping where DeepSpeed knows it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["name"]]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def gradient_report(self) -> list[str]:
        """Names of trainable tensors whose gradient is zero, before :meth:`step`; called on all ranks.

        Raises:
            TrainingError: a gradient is missing or not finite.
        """
        from deepspeed.utils import safe_get_full_grad

        zero = []
        for name, parameter in self.parameters.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is None:
                raise TrainingError(f"{name} trains but got no gradient; it is not part of the forward pass")
            if not torch.isfinite(gradient).all():
                raise TrainingError(
                    f"{name}: its gradient is not finite; lower the learning rate or check the data"
                )
            if not gradient.any():
                zero.append(name)
        return zero

    @contextmanager
    def gathered(self, names: Mapping[str, torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Whole parameters inside, on every rank (ZeRO-3 partitions them). None: what is not the base."""
        if self.stage < 3:
            with nullcontext():
                yield
            return
        import deepspeed

        if names is None:
            names = {n: p for g, ps in self.model.parameter_groups().items() if g != "base" for n, p in ps}
        with deepspeed.zero.GatheredParameters(list(names.values()), modifier_rank=None):
            yield

    def save(self, folder: Path) -> None:
        """Write the optimiser's state, on all ranks."""
        self.engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote. These files are pickles: only from the run's own folder.

        Raises:
            CheckpointError: DeepSpeed refuses, for example because the ZeRO stage is another.
        """
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{folder}: the optimiser cannot be resumed ({reason}); "
                "use as many ranks and the ZeRO stage that wrote it"
            ) from error
        if path is None:
            raise CheckpointError(
                f"{folder}: holds no optimiser state of {self.world_size} ranks and ZeRO {self.stage}"
            )

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()


class Still(Engine):
    """What a run without steps has in place of an engine: nothing trains, so there is nothing to save."""

    def __init__(self, model: TaskMoEModel) -> None:
        self.stage, self.parameters = 0, {}
        self.model, self.surgery, self.regularisers = model, None, None
        model.set_trainable(())

    def save(self, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass
