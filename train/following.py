"""What a run measures and tells as it goes: between the loop and the tracker.

Nothing here changes what is trained: it reads, and draws no random number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskmoe.moe import TaskMoEModel, TaskTable
from taskmoe.moe.snapshot import Snapshot, take
from taskmoe.train.config import Config
from taskmoe.train.distributed import Ranks, all_sum
from taskmoe.train.engine import Engine, TrainingError
from taskmoe.train.meter import Meter
from taskmoe.train.mixing import excess, rates
from taskmoe.train.schedule import Phase
from taskmoe.train.step_surgery import surgery_line
from taskmoe.train.summary import phase_lines
from taskmoe.train.track.facts import FIRST, last_conflict, read_run_log
from taskmoe.train.track.media import Media
from taskmoe.train.track.routing import metrics as routing_metrics
from taskmoe.train.track.tracker import Tracker

if TYPE_CHECKING:
    from taskmoe.train.batches import StepBatches
    from taskmoe.train.step_balancing import StepBalancing


class Following:
    """Measurements of one run, and everybody who is told.

    Args:
        meter: counts of the run.
        state: ``tracker`` of the checkpoint that the run goes on from, or None.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        ranks: Ranks,
        tasks: TaskTable,
        meter: Meter,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.config, self.folder, self.ranks, self.tasks, self.meter = config, folder, ranks, tasks, meter
        self.tracker = Tracker(config, folder, ranks, tasks, state)
        self._first: Snapshot | None = None
        self._conflict: tuple[list[list[str]], list[list[float]]] | None = None
        if ranks.is_main and state is not None:  # the log is cut to the step of the checkpoint by now
            self._conflict = last_conflict(read_run_log(folder))
            if (folder / FIRST).exists():
                self._first = Snapshot.load(folder / FIRST)
        self._logged_at = time.monotonic()
        self._spent = 0.0  # seconds since the last line ...
        self._spent_in_all = 0.0  # ... and before it

    def line(self, text: str) -> None:
        """Print a text."""
        self.tracker.line(text)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - began

    # -- phases ----------------------------------------------------------------------------------------------

    def announce(
        self,
        phase: Phase,
        step: int,
        model: TaskMoEModel,
        engine: Engine,
        batches: StepBatches,
        rows_per_step: int,
        added: Sequence[str],
    ) -> None:
        """Set the mixture of a phase and say what will happen.

        added: names of the tasks that the checkpoint does not know, in the phase that goes on from it.
        """
        sampler, names, sizes = batches.sampler, self.tasks.names, self.meter.sizes
        budget = phase.steps * rows_per_step
        beyond = 0
        if step == phase.start or added:
            beyond = excess(phase.mixing, sizes, names, budget, sampler.drawn)
            sampler.set_rates(rates(phase.mixing, sizes, names, budget, sampler.drawn))
        self.line(
            f"phase {phase.name}: steps {step} to {phase.end}, {rows_per_step} rows a step, "
            f"{self.ranks.world_size} rank(s), ZeRO {engine.stage}"
        )
        if added:
            self.line(f"new tasks: {', '.join(added)}; the optimiser starts anew")
        for line in phase_lines(phase, model, sizes, sampler.rates, budget, beyond):
            self.line(line)
        if combining := surgery_line(self.config.surgery, engine.surgery):
            self.line(combining)
        if self.ranks.is_main:
            listed = "".join(f"{name}\n" for name in model.trainable_names())
            (self.folder / "trainable.txt").write_text(listed, encoding="utf-8")
        if model.recorder is None:
            self._begin(take(model))

    def _begin(self, snapshot: Snapshot) -> None:
        """Keep the routing of the start, if it is not known. All ranks take a snapshot together: under ZeRO-3
        a router's parameters are gathered for it."""
        if self.ranks.is_main and self._first is None:
            self._first = snapshot
            (self.folder / FIRST).parent.mkdir(exist_ok=True)
            snapshot.save(self.folder / FIRST)

    # -- steps -----------------------------------------------------------------------------------------------

    def logs(self, step: int) -> bool:
        """Whether a line is logged after ``step`` steps."""
        return step % self.config.logging_steps == 0 or step == self.config.max_steps

    def watching(self, model: TaskMoEModel, step: int) -> AbstractContextManager[None]:
        """Around the forward passes of the step that ends at ``step``: what tokens choose is looked at in the
        steps that are logged."""
        return model.recording() if self.logs(step) else nullcontext()

    def log(
        self,
        step: int,
        model: TaskMoEModel,
        engine: Engine,
        balancing: StepBalancing,
        shares: Sequence[float],
        norm: float | None,
        rate: Mapping[str, float],
    ) -> None:
        """Read all measurements since the last call and record them; a collective.

        shares: of the mixture, each task's. rate: the learning rate of each group.

        Raises:
            TrainingError: the loss of a task is not a number.
        """
        with self._timed():
            tokens, now = self.meter.tokens, time.monotonic()
            metrics = self.meter.read()
            metrics["train/tokens_per_second"] = tokens / max(1e-9, now - self._logged_at)
            metrics["train/tracking_seconds"] = self._spent  # of the last line, and what came after it
            self._logged_at = now
            self._spent_in_all, self._spent = self._spent_in_all + self._spent, 0.0
            metrics.update({f"learning_rate/{g}": r for g, r in rate.items() if r > 0})
            surgery = engine.surgery
            if surgery is not None:
                more, lines = surgery.report(step)
                metrics.update(more)
                for line in lines:
                    self.line(line)
                if "grad/cosine_matrix" in more:
                    self._conflict = (more["grad/rows"], more["grad/cosine_matrix"])
            weighed = surgery is None or surgery.weighs
            metrics.update(balancing.report(shares, self.meter, metrics, weighed=weighed))
            if engine.regularisers is not None:
                metrics.update(engine.regularisers.report())
            if norm is not None:
                metrics["train/grad_norm"] = norm
            if model.recorder is not None:
                model.recorder.fold(all_sum)
            snapshot = take(model)
            self._begin(snapshot)
            if self.ranks.is_main:
                metrics.update(routing_metrics(snapshot, self._first))
            self.tracker.log_train(step, metrics)
        bad = [k.rpartition("/")[2] for k, v in metrics.items() if k.startswith("train/loss/") and v != v]
        if bad:
            raise TrainingError(
                f"step {step}: the loss of {', '.join(bad)} is not a number; lower the learning rate"
            )

    # -- evaluations and the end -----------------------------------------------------------------------------

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """Record an evaluation: ``tasks`` by name, ``macro``, ``score``."""
        tasks = {t.slug: results["tasks"][t.name] for t in self.tasks if t.name in results["tasks"]}
        with self._timed():
            self.tracker.log_eval(step, {**tasks, "macro": results["macro"], "score": results["score"]})

    def saved(self, step: int, checkpoint: Path) -> None:
        """Record that there is a checkpoint."""
        with self._timed():
            self.tracker.log_checkpoint(step, checkpoint)

    def shows(self, step: int, evaluated: bool) -> bool:
        """Whether tables and images are due after ``step`` steps."""
        every = self.config.track.media_steps
        return step == self.config.max_steps or (evaluated if every is None else step % every == 0)

    def show(self, step: int, model: TaskMoEModel, results: Mapping[str, Any] | None) -> None:
        """Record the whole routing, group by group, and what tasks did to each other."""
        with self._timed():
            snapshot = take(model)
            self.tracker.log_media(step, Media(self.tasks, snapshot, self._first, self._conflict, results))

    def close(self, status: str) -> None:
        """End the run, and write report.html of one that finished."""
        self.tracker.close(status, {"tracking_seconds": self._spent_in_all + self._spent})
        if status == "finished" and self.ranks.is_main and self.config.track.report:
            from taskmoe.train.track.facts import gather
            from taskmoe.train.track.report import write_report

            path = self.folder / "report.html"
            try:
                write_report(gather(self.folder), path)
                print(f"report: {path}", flush=True)
            except Exception as error:  # a run that has trained is worth more than its pictures
                print(f"warning: report.html could not be written ({type(error).__name__}: {error})")
