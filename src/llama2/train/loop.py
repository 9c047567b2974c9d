"""The loop of training: batches in, steps done. Callbacks do everything else (paper 2.2)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama2.data.loader import TrainBatch
from llama2.train.schedule import SchedulePart, lr_of
from llama2.train.step import Step


class Batches(Protocol):
    """Where batches come from: data's Loader, or rollouts of the network itself."""

    @property
    def epoch(self) -> float:
        """How often all rows were read."""
        ...

    def next(self) -> TrainBatch:
        """This process's next micro-batch."""
        ...

    def state(self) -> Any:
        """What `restore` continues from, as JSON can hold it."""
        ...

    def restore(self, state: Any) -> None:
        """Continue from a state."""
        ...


@dataclass
class LoopState:
    """What the loop remembers, and a saved state with it."""

    step: int = 0
    tokens: int = 0  # losses of all steps
    nonfinite: int = 0  # steps in a row
    rewinds: int = 0
    losses: list[float] = field(default_factory=list)  # the last ones
    seconds: float = 0.0  # of the run


@dataclass
class StepReport:
    """A step: what it did, and what callbacks add."""

    step: int
    steps: int
    loss: float
    lr: float
    norm: float
    tokens: int  # losses so far
    epoch: float
    seconds: float
    skipped: bool = False
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    seconds_left: float = 0.0
    validation: float | None = None
    sources: Mapping[str, float] = field(default_factory=dict)  # validation of each, where there are several
    energy: tuple[float, float] | None = None  # MWh, tCO2eq
    measured: Mapping[str, float] = field(default_factory=dict)  # what else callbacks measured, by name
    notes: list[str] = field(default_factory=list)  # what else happened

    @property
    def note(self) -> str | None:
        """All notes, if there are any."""
        return "; ".join(self.notes) or None

    def add_note(self, note: str | None) -> None:
        """Add a note, if it is one."""
        if note:
            self.notes.append(note)

    def metrics(self) -> dict[str, Any]:
        """The step's line in `metrics.jsonl`."""
        metrics: dict[str, Any] = {name: getattr(self, name) for name in ("step", "loss", "lr", "norm", "tokens")}
        rounded = {"epoch": 4, "seconds": 4, "tokens_per_second": 1, "mfu": 4}
        metrics |= {name: round(getattr(self, name), digits) for name, digits in rounded.items()}
        if self.validation is not None:
            metrics["validation"] = self.validation
        if self.sources:
            metrics["sources"] = dict(self.sources)
        if self.measured:
            metrics["measured"] = dict(self.measured)
        if self.energy:
            metrics["MWh"], metrics["tCO2eq"] = self.energy
        if self.note:
            metrics["note"] = self.note
        return metrics


class Callback:
    """What is done around steps, in a list's order. Every process has the callbacks that communicate."""

    def begin(self, loop: Loop) -> None:
        """Before the first step."""

    def after_step(self, loop: Loop, report: StepReport) -> None:
        """After each step; `report` has what callbacks before this one added."""

    def end(self, loop: Loop) -> None:
        """After the last step."""

    def close(self) -> None:
        """Release what `begin` opened, also after an error."""


class Loop:
    """Steps of `accumulate` micro-batches each, up to step `steps`, at the rates of `schedule`."""

    def __init__(
        self,
        step: Step,
        batches: Batches,
        *,
        steps: int,
        schedule: Sequence[SchedulePart],
        accumulate: int = 1,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.step, self.batches = step, batches
        self.steps, self.schedule, self.accumulate = steps, [*schedule], accumulate
        self.callbacks = callbacks
        self.state = LoopState()
        self._begun = 0.0

    def run(self) -> None:
        """Take steps until the last. What a callback raises ends the run."""
        self._begun = time.perf_counter() - self.state.seconds
        try:
            for callback in self.callbacks:
                callback.begin(self)
            while self.state.step < self.steps:
                report = self._advance()
                for callback in self.callbacks:
                    callback.after_step(self, report)
            for callback in self.callbacks:
                callback.end(self)
        finally:
            for callback in self.callbacks:
                callback.close()

    def _advance(self) -> StepReport:
        """One step."""
        begun = time.perf_counter()
        lr = lr_of(self.schedule, self.state.step + 1)
        progress = self.step.step([self.batches.next() for _ in range(self.accumulate)], lr, self.state.step + 1)
        seconds = time.perf_counter() - begun
        s = self.state
        s.step += 1
        s.tokens += progress.count
        report = StepReport(s.step, self.steps, progress.loss, lr, progress.norm, s.tokens, self.batches.epoch, seconds)
        report.skipped = progress.skipped
        report.add_note(self.step.take_note())
        return report

    def seconds(self) -> float:
        """The time that the run took so far, as often as it was resumed."""
        return time.perf_counter() - self._begun

    def memory(self) -> dict[str, Any]:
        """What `restore` continues from, as JSON can hold it."""
        self.state.seconds = self.seconds()
        return {"loader": self.batches.state(), **vars(self.state)}

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Continue where `memory` was taken."""
        memory = dict(memory)
        self.batches.restore(memory.pop("loader"))
        self.state = LoopState(**memory)
