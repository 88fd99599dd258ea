"""The training loop: step, evaluate, save. Read :meth:`Run.run` first, then :meth:`Run._step`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe import TaskMoEModel, TaskTable
from taskmoe.moe.snapshot import TokenGates, take
from taskmoe.moe.state import load_adapter, save_adapter
from taskmoe.train import checkpoint, run_folder
from taskmoe.train.batches import build_batches, rows_per_step
from taskmoe.train.config import Config
from taskmoe.train.distributed import Ranks, all_sum, init, shutdown
from taskmoe.train.engine import Engine, Still
from taskmoe.train.evaluate import evaluate, evaluate_controls, primary_metrics
from taskmoe.train.following import Following
from taskmoe.train.instances import begin as begin_instances
from taskmoe.train.meter import Meter
from taskmoe.train.micro_batch import learn
from taskmoe.train.nearest import start_from_nearest
from taskmoe.train.objectives import Counts, count
from taskmoe.train.schedule import Phase, learning_rates, phase_at, resolve_phases
from taskmoe.train.setup import build_data, build_moe
from taskmoe.train.signals import StopRequest
from taskmoe.train.step_balancing import build_balancing, learns_from_validation
from taskmoe.train.summary import controls_table
from taskmoe.train.task_vectors import with_task_vectors
from taskmoe.train.together import as_one
from taskmoe.train.weights import (
    all_weights,
    base_state,
    fresh_weights,
    load_all_weights,
    load_base,
    refresh_saved_modules,
    save_base,
    start_anew,
)


def train(config: Config) -> int:
    """Train as ``config`` says, on however many ranks there are. Returns the exit code.

    Raises:
        ConfigError, DataError, TaskError, StateError, CheckpointError: something given cannot be used.
        TrainingError: a loss or gradient that is not finite, or a tensor that does not train.
    """
    ranks = init(config)
    try:
        with StopRequest() as stop:
            return Run(config, ranks, stop).run()
    finally:
        shutdown(ranks)


class Run:
    """One run: its data, its model under an engine, and what it has seen."""

    def __init__(self, config: Config, ranks: Ranks, stop: StopRequest) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.folder = Path(config.output_dir)
        self.phases = resolve_phases(config)
        self.resumed = self._checkpoint_to_resume()
        self.state: dict[str, Any] = checkpoint.read_state(self.resumed) if self.resumed else {}
        self.step = int(self.state.get("step", 0))
        self.best: dict[str, Any] | None = self.state.get("best")
        self.saved_step = self.step if self.resumed else -1
        self.evaluated: dict[str, Any] | None = None  # results of the evaluation at the present step
        with as_one():
            if ranks.is_main:
                run_folder.check(config, self.resumed)
            known = TaskTable.load(self.resumed / "task_map.json") if self.resumed else None
        tokenizer = self.resumed.parent / "tokenizer" if self.resumed else None
        say = print if ranks.is_main else (lambda line: None)
        needed = ("train", config.eval_split, *(("validation",) if learns_from_validation(config) else ()))
        self.data = build_data(config, ranks, needed, known, tokenizer, say)
        self.config = with_task_vectors(config, self.data, ranks, self.resumed)
        bundle = self.data.bundle
        self.tasks, self.splits = bundle.tasks, bundle.splits["train"]
        self.added = self.tasks.names[len(known) :] if known is not None else []  # tasks the checkpoint lacks
        self.sizes = [len(s.tokens) for s in self.splits]
        self.rows_per_step = rows_per_step(config, ranks)
        self.meter = Meter(self.tasks, self.sizes)
        with as_one():
            self.balancing = build_balancing(config, self.data, ranks)
            primary_metrics(config, self.tasks)  # a typo is found now, not after the training
            self.batches = build_batches(
                config, ranks, self.phases, self.splits, self.tasks.names, self.data.collator
            )
            if self.state:
                run_folder.check_same_shape(self.state, ranks.world_size, self.rows_per_step)
                self.meter.load_state_dict(self.state["meter"], ranks.is_main)
                self.batches.load_state_dict(self.state["batches"])
            if self.resumed:
                self.balancing.load(self.resumed)
        self.carried: dict[str, Tensor] | None = None  # all weights, from one phase to the next
        self.recorder: TokenGates | None = None  # the same of what tokens chose
        self.engine: Engine
        self.model: TaskMoEModel
        self._moved = self._checked = False  # since the phase began: an update of the weights, the gradients
        self.first = phase_at(self.phases, self.step)
        self._enter(self.first)
        # Only now, when all that was given has proved usable, does anything change on the disk.
        with as_one():
            if ranks.is_main:
                run_folder.prepare(config, self.tasks, self.data.tokenizer, self.resumed)
        self.following = Following(
            config, self.folder, ranks, self.tasks, self.meter, self.state.get("tracker")
        )

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Phase after phase, to the end, an early stop, or a signal."""
        status = "failed"
        try:
            for line in self.balancing.remarks([p.mixing.strategy for p in self.phases]):
                self.following.line(line)
            for phase in self.phases[self.first.index :]:
                if phase is not self.first:
                    self._leave()
                    self._enter(phase)
                if self.step < phase.end:
                    self.following.announce(
                        phase, self.step, self.model, self.engine, self.batches, self.rows_per_step,
                        self.added if phase is self.first else (),
                    )  # fmt: skip
                elif self.step:
                    self.following.line(f"nothing left after step {self.step}; raise max_steps to go on")
                if self._train(phase):
                    break
            if not self.config.max_steps:
                self._evaluate()
                self._save()
            if self.stop.exit_code:
                status = "interrupted"
                return self.stop.exit_code
            self._finish()
            status = "finished"
            return 0
        finally:
            self.following.close(status)

    def _train(self, phase: Phase) -> bool:
        """Train to the end of the phase. Returns whether the run ends early."""
        every = self.config
        mode = nullcontext() if phase.adapters else self.model.disable_adapter()
        with mode:
            while self.step < phase.end:
                norm, rate = self._step(phase)
                self.following.tracker.advance(self.step)
                last = self.step == self.config.max_steps
                if self.following.logs(self.step):
                    self.following.log(
                        self.step, self.model, self.engine, self.balancing, self.batches.sampler.rates, norm,
                        rate,
                    )  # fmt: skip
                save = last or bool(every.save_steps and self.step % every.save_steps == 0)
                reason = self.stop.agreed()
                self.evaluated = None
                patience_over = False
                if reason is None and (last or (every.eval_steps and self.step % every.eval_steps == 0)):
                    improved, patience_over = self._evaluate()
                    save = save or improved
                if self.following.shows(self.step, self.evaluated is not None):
                    self.following.show(self.step, self.model, self.evaluated)
                if save or reason is not None or patience_over:
                    self._save()
                if reason is not None:
                    self.following.line(
                        f"stopped by {reason} after step {self.step}; saved {self._path(self.step)}. "
                        "Go on with --resume_from_checkpoint true"
                    )
                    return True
                if patience_over:
                    assert self.best is not None
                    what, when = every.metric_for_best_model, self.best["step"]
                    self.following.line(f"stopped early: no better {what} since step {when}")
                    return True
        return False

    def _step(self, phase: Phase) -> tuple[float | None, dict[str, float]]:
        """One optimiser step: count, accumulate, update."""
        config, task_type = self.config, self.config.task_type
        routing = self.model.routing
        routing.temperature, routing.seed, routing.step = phase.temperature(self.step), config.seed, self.step
        batches = self.batches.next_step(phase.end - self.step)
        parts = [count(b, task_type, len(self.tasks)) for b in batches]
        mine = sum(parts[1:], parts[0])
        both = all_sum(torch.stack([mine.tokens_T, mine.samples_T]))
        counts = Counts(both[0], both[1])
        self.model.train()
        weights_T = self.balancing.begin(self.step, self.model)
        if self.engine.surgery is not None:
            self.engine.surgery.begin(self.step, counts, parts)
        if self.engine.regularisers is not None:
            self.engine.regularisers.begin(counts)
        with self.engine.accumulate(), self.following.watching(self.model, self.step + 1):
            for i, batch in enumerate(batches):
                sums_T = learn(self.engine, batch, counts, weights_T, config, self.ranks.device, i)
                self.meter.add(sums_T)
                self.balancing.add(sums_T)
        self.meter.count(counts)
        self.balancing.update(counts)
        rate = learning_rates(config, self.phases, self.step)
        if self._moved and not self._checked:
            self._check_gradients()
        norm = self.engine.step(rate)
        self.model.after_step(all_sum)
        self.balancing.after_step(self.model, batches, counts)
        self._moved = self._moved or any(r > 0 for r in rate.values())
        self.step += 1
        return norm, rate

    # -- phases ----------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        """Build model and engine of a phase; weights come from the phase before or the checkpoint."""
        rng = checkpoint.rng_state() if self.carried is not None else None
        with as_one():
            self.model = build_moe(self.config, self.data.tokenizer, self.tasks, self.ranks)
            groups = phase.reinit if self.step == phase.start else ()
            fresh = fresh_weights(self.model, groups)
            if self.carried is not None:
                load_all_weights(self.model, self.carried)
                if self.model.recorder is not None and self.recorder is not None:
                    self.model.recorder.go_on(self.recorder)
            elif self.resumed is not None:
                load_base(self.model, self.resumed)
                load_adapter(self.model, self.resumed)
            else:
                begin_instances(self.model, self.data.bundle, self.config)
            if phase.index and self.step == phase.start and not self.phases[phase.index - 1].adapters:
                refresh_saved_modules(self.model)
            start_anew(self.model, fresh, groups)
            if phase.gate is not None:
                self.model.use_gate(phase.gate)
        if self.added and self.carried is None and self.config.moe.new_task_rows == "nearest":
            self._start_added_tasks()
        if phase.steps:
            self.engine = Engine(self.model, self.config, phase, self.ranks)
        else:
            self.engine = Still(self.model)
        if rng is not None:
            checkpoint.set_rng_state(rng)
        elif self.resumed is not None:
            if self.step > phase.start:
                if not self.added:
                    self.engine.load(self.resumed / "deepspeed")
                if self.engine.surgery is not None:
                    self.engine.surgery.load(self.resumed)
                if self.engine.regularisers is not None:
                    self.engine.regularisers.load(self.resumed)
            checkpoint.load_rng(self.resumed, self.ranks)
        else:
            torch.manual_seed(self.config.seed + self.ranks.rank)  # dropout differs between ranks
        self.carried = None
        self._moved = self._checked = False

    def _start_added_tasks(self) -> None:
        found = start_from_nearest(
            self.model, self.splits, self.added, self.data.tokenizer, self.config
        )
        if self.ranks.is_main:
            for new, (seen, loss) in found.items():
                print(f"new task {new} starts from {seen} (loss {loss:.4f} on its first rows)")

    def _leave(self) -> None:
        """Take all weights along and give the engine back."""
        with self.engine.gathered(dict(self.model.named_parameters())):
            self.carried = all_weights(self.model)
        self.recorder = self.model.recorder
        self.engine.close()

    # -- looking ---------------------------------------------------------------------------------------------

    def _check_gradients(self) -> None:
        """Does everything train? Asked once a phase, after the first update that moved the weights: while B
        is zero the gradients of A and of the gates are zero as they must be."""
        self._checked = True
        zero = self.engine.gradient_report()
        if zero:
            shown = ", ".join(zero[:8]) + (" ..." if len(zero) > 8 else "")
            self.following.line(
                f"{len(zero)} trainable tensor(s) have a zero gradient at step {self.step + 1} "
                f"(never routed, or not reached by the loss): {shown}"
            )

    def _evaluate(self) -> tuple[bool, bool]:
        """Score the evaluation split. Returns (better than ever, patience is over)."""
        splits = self.data.bundle.splits[self.config.eval_split]
        if not any(len(s.tokens) for s in splits):
            return False, False
        self.evaluated = results = evaluate(self.model, *self._evaluation())
        self.following.evaluated(self.step, results)
        by_loss = self.config.metric_for_best_model == "loss"
        value = -results["macro"]["loss"] if by_loss else results["score"]
        improved = self.best is None or value > self.best["value"]
        if self.best is None or improved:
            self.best = {"step": self.step, "value": value, "waited": 0}
        else:
            self.best = {**self.best, "waited": self.best["waited"] + 1}
        patience = self.config.early_stopping_patience
        return improved, patience is not None and self.best["waited"] >= patience

    def _evaluation(self) -> tuple[Any, ...]:
        data, config = self.data, self.config
        return data.bundle.splits[config.eval_split], data.tokenizer, config, data.collator, self.ranks

    def _finish(self) -> None:
        """The last words: a table per task, and where everything is."""
        if self.evaluated is not None:
            arms = {"experts": self.evaluated}
            if self.config.evaluation.controls:
                arms.update(evaluate_controls(self.model, *self._evaluation()))
            if self.ranks.is_main:
                found = {"step": self.step, "best": self.best, **arms}
                text = json.dumps(found, indent=1, ensure_ascii=False)
                (self.folder / "eval_results.json").write_text(text + "\n", encoding="utf-8")
            for line in controls_table(self.tasks, arms, self.meter.epochs()):
                self.following.line(line)
        self.following.line(f"run folder: {self.folder}")

    # -- saving and resuming ---------------------------------------------------------------------------------

    def _path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        state = {
            "step": self.step,
            "rows_per_step": self.rows_per_step,
            "batches": self.batches.state_dict(),
            "meter": self.meter.state_dict(),
            "best": self.best,
            "tracker": self.following.tracker.state_dict(),
        }
        keep = {self.best["step"]} if self.best else set()
        checkpoint.save(
            self.folder, self.step, self._write, state, self.config.save_total_limit, keep, self.ranks
        )
        self.saved_step = self.step
        self.following.saved(self.step, self._path(self.step))

    def _write(self, folder: Path) -> None:
        """This rank's part of a checkpoint."""
        routing = take(self.model)
        with self.engine.gathered():
            if self.ranks.is_main:
                save_adapter(self.model, folder, routing=routing)
        if self.config.model is not None or any("base" in p.train for p in self.phases):
            with self.engine.gathered(dict(self.model.parameter_groups()["base"])):
                if self.ranks.is_main:
                    save_base(base_state(self.model), folder)
        self.engine.save(folder / "deepspeed")
        if self.ranks.is_main:
            self.balancing.save(folder)
            if self.engine.surgery is not None:
                self.engine.surgery.save(folder)
            if self.engine.regularisers is not None:
                self.engine.regularisers.save(folder)

    def _checkpoint_to_resume(self) -> Path | None:
        wanted = self.config.resume_from_checkpoint
        return None if wanted is None else checkpoint.find_together(self.folder, wanted, self.ranks)
