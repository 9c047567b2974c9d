"""What happens around a training run's steps: spikes rewound, losses evaluated, states saved, metrics written."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama2 import files, plan
from llama2.data.loader import Loader, TrainBatch
from llama2.errors import RunError
from llama2.records import Run
from llama2.train.loop import Callback, Loop, StepReport
from llama2.train.settings import SampleSettings, SpikeSettings
from llama2.train.states import States

#: Continues texts with a model: (its folder or an adapter's, beginnings, tokens) → beginnings with what follows. The
#: engine's work, which the caller passes in.
Sample = Callable[[Path, Sequence[str], int], list[str]]


class Reporter(Protocol):
    """Shows a run to a person."""

    def begin(self, header: Sequence[str]) -> None:
        """What the run is."""
        ...

    def step(self, report: StepReport) -> None:
        """A step was done."""
        ...

    def note(self, note: str) -> None:
        """Something happened between steps."""
        ...


def is_spike(loss: float, before: Sequence[float], rule: SpikeSettings) -> bool:
    """Whether a loss is out of the ordinary after those `before` it; never before there are `rule.window` of them."""
    if len(before) < rule.window:
        return False
    return loss > statistics.fmean(before) + max(rule.min_increase, rule.deviations * statistics.pstdev(before))


class FiniteGuard(Callback):
    """Ends a run whose losses are not finite."""

    def __init__(self, rule: SpikeSettings, saver: StateSaver) -> None:
        self._rule, self._saver = rule, saver

    def after_step(self, loop: Loop, report: StepReport) -> None:
        s, rule = loop.state, self._rule
        if report.skipped:
            s.nonfinite += 1
            if s.nonfinite >= rule.nonfinite:
                run = self._saver.states.run
                raise RunError(
                    f"{run}: step {s.step}: {s.nonfinite} steps in a row had no finite loss or gradient; "
                    f"lower optimizer.lr, and continue in another run with start={run}"
                )
            report.add_note("skipped: loss or gradient is not finite")
            return
        s.nonfinite = 0


class SpikeGuard(FiniteGuard):
    """Also rewinds a run whose loss is out of the ordinary."""

    def __init__(self, rule: SpikeSettings, saver: StateSaver, loader: Loader[Any]) -> None:
        super().__init__(rule, saver)
        self._loader = loader

    def after_step(self, loop: Loop, report: StepReport) -> None:
        super().after_step(loop, report)
        s, rule = loop.state, self._rule
        if report.skipped or (is_spike(report.loss, s.losses, rule) and self._rewind(loop, report)):
            return
        s.losses = [*s.losses, report.loss][-rule.window :]

    def _rewind(self, loop: Loop, report: StepReport) -> bool:
        """Return to the last state, and leave out the rows up to the spike's. False: there is no state."""
        saved = self._saver.states.last()
        if saved is None:
            return False
        at, rewinds, rows = loop.state.step, loop.state.rewinds + 1, self._loader.state()["rows"]
        if rewinds > self._rule.rewinds:
            raise RunError(
                f"{self._saver.states.run}: step {at}: the loss rose to {report.loss:.2f}, after {rewinds - 1} "
                "rewinds to the last state; lower optimizer.lr, or raise spikes.deviations"
            )
        self._saver.restore(loop, saved)
        loop.state.rewinds = rewinds
        self._loader.skip(rows - self._loader.state()["rows"])
        report.step, report.tokens, report.epoch = loop.state.step, loop.state.tokens, self._loader.epoch
        report.add_note(f"the loss rose to {report.loss:.2f} at step {at}: back to step {saved}, then other rows")
        return True


class Evaluator(Callback):
    """Measures the loss of `batches` every so many steps and after the last one, for each source alone."""

    def __init__(self, batches: Sequence[TrainBatch], every: int) -> None:
        self._every = every
        self._sources: dict[str, list[TrainBatch]] = {}
        for batch in batches:
            self._sources.setdefault(batch.source, []).append(batch)

    def after_step(self, loop: Loop, report: StepReport) -> None:
        if not self._sources or (report.step % self._every and report.step != loop.steps):
            return
        losses = {source: loop.step.evaluate(batches) for source, batches in self._sources.items()}
        report.add_note(loop.step.take_note())
        report.validation = next(iter(losses.values()))
        if len(losses) > 1:
            counts = {source: sum(batch.count for batch in batches) for source, batches in self._sources.items()}
            losses = {source: loss for source, loss in losses.items() if counts[source]}
            total = sum(loss * counts[source] for source, loss in losses.items())
            report.validation = total / sum(counts.values()) if losses else math.nan
            report.sources = losses
        if not math.isfinite(report.validation):
            report.add_note("the validation loss is not finite")


class StateSaver(Callback):
    """Saves a state every so many steps and after the last one."""

    def __init__(self, states: States, every: int) -> None:
        self.states, self._every = states, every

    def due(self, loop: Loop, step: int) -> bool:
        """Whether a step's state is saved."""
        return step % self._every == 0 or step == loop.steps

    def after_step(self, loop: Loop, report: StepReport) -> None:
        self.states.poll()
        if self.due(loop, report.step):
            self.states.save(report.step, loop.memory())
        report.add_note(self.states.failure)

    def end(self, loop: Loop) -> None:
        self.states.finish()
        if self.states.failure:
            raise RunError(self.states.failure + ", and continue with --resume")

    def restore(self, loop: Loop, step: int) -> None:
        """Continue from the state of a step."""
        loop.restore(self.states.load(step))


class Throughput(Callback):
    """Tokens a second, model FLOPs utilization (MFU), the time left, and energy where a device's `watts` are known."""

    def __init__(self, *, batch_tokens: int, flops: float, peak: float, devices: int, watts: float | None) -> None:
        self._batch_tokens, self._flops, self._peak = batch_tokens, flops, peak * devices
        self._devices, self._watts = devices, watts

    def after_step(self, loop: Loop, report: StepReport) -> None:
        report.tokens_per_second = self._batch_tokens / report.seconds
        report.mfu = self._flops * report.tokens_per_second / self._peak
        report.seconds_left = (loop.steps - report.step) * loop.seconds() / max(1, report.step)
        if self._watts:
            report.energy = plan.energy(loop.seconds() / 3600 * self._devices, self._watts)


class MetricsLog(Callback):
    """A line of `metrics.jsonl` a step."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def after_step(self, loop: Loop, report: StepReport) -> None:
        self._run.log(**report.metrics())


class TensorBoard(Callback):
    """The metrics for TensorBoard, if it is installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, loop: Loop) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(self._folder), purge_step=loop.state.step + 1)

    def after_step(self, loop: Loop, report: StepReport) -> None:
        if self._writer:
            for name, value in (report.metrics() | dict(report.measured)).items():
                if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                    self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class Reported(Callback):
    """Shows each step to a person."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def after_step(self, loop: Loop, report: StepReport) -> None:
        self._reporter.step(report)


class SampleWriter(Callback):
    """Texts of the model at every save, in `samples.jsonl`. What goes wrong with them costs no more than them."""

    def __init__(
        self, run: Run, saver: StateSaver, settings: SampleSettings, sample: Sample, reporter: Reporter | None
    ) -> None:
        self._run, self._saver, self._settings = run, saver, settings
        self._sample, self._reporter = sample, reporter

    def after_step(self, loop: Loop, report: StepReport) -> None:
        states, settings = self._saver.states, self._settings
        if not settings.prompts or not self._saver.due(loop, report.step):
            return
        states.finish()
        if not states.is_main or states.failure:
            return
        lines: list[dict[str, Any]]
        reason = ""
        try:
            texts = self._sample(states.written(report.step), settings.prompts, settings.tokens)
            lines = [{"step": report.step, "text": text} for text in texts]
        except Exception as error:  # whatever it is, a run is worth more than its samples
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            lines = [{"step": report.step, "note": reason}]
        try:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            files.append(self._run.folder / "samples.jsonl", text, error=RunError)
        except RunError as error:
            reason = str(error)
        if reason and self._reporter:
            self._reporter.note(f"step {report.step}: no samples ({reason}); the run continues")
