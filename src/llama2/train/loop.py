"""The loop of training: batches in, steps done, states saved, spikes rewound, all of it recorded (paper 2.2)."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama2 import files, plan, records
from llama2.checkpoint import Checkpoint
from llama2.config import ModelConfig
from llama2.data.loader import IGNORED, Batch, Loader, Source
from llama2.errors import RecipeError, RunError
from llama2.model import parallel
from llama2.model.transformer import Transformer
from llama2.recipe import leaves
from llama2.records import Run
from llama2.text.tokenizer import Tokenizer
from llama2.train import card
from llama2.train.checkpoints import Checkpoints
from llama2.train.processes import Processes
from llama2.train.schedule import Part, rate_of
from llama2.train.settings import MOST, LoopSettings, Spikes, long_warmup
from llama2.train.step import Progress, Step

#: Continues texts with a model: (its folder, beginnings, tokens) → beginnings with what follows. The engine's work,
#: which the caller passes in.
Sample = Callable[[Path, Sequence[str], int], list[str]]

#: What may differ between a run and what continues it: what changes no loss but by rounding, and where the data are,
#: which must be the same. Tables and settings.
_FREE = {"mesh", "compile", "checkpointing", "save", "samples", "evaluate", "watts", "spikes", "batch.micro"}
_FREE |= {"optimizer.rewarm", "data.corpus", "data.recipe", "data.dir", "data.files"}
#: What may differ where a new warm-up is asked for.
_SCHEDULE = {"steps", "epochs", "optimizer.rate", "optimizer.warmup", "optimizer.final"}


@dataclass(frozen=True, slots=True)
class Line:
    """A step, for whoever watches."""

    step: int
    steps: int
    loss: float
    rate: float
    tokens_per_second: float
    mfu: float
    seconds_left: float
    validation: float | None = None
    sources: Mapping[str, float] = field(default_factory=dict)  # validation of each, where there are several
    note: str | None = None  # what else happened


@dataclass(frozen=True, slots=True)
class _Validation:
    """Mean loss of all targets that are evaluated on, and of each source's, where there are several."""

    mean: float
    sources: dict[str, float]


class Watch(Protocol):
    """Whoever is told how the run goes on."""

    def begin(self, facts: Sequence[str]) -> None:
        """What the run is."""
        ...

    def line(self, line: Line) -> None:
        """A step was done."""
        ...

    def note(self, note: str) -> None:
        """Something happened between steps."""
        ...


@dataclass
class _State:
    """What the loop remembers, and a checkpoint with it."""

    step: int = 0
    tokens: int = 0
    nonfinite: int = 0  # steps in a row
    rewinds: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of steps


class Loop:
    """A run: `network` learns from `source`, and leaves what it learned in `folder`, with its `tokenizer` and chat
    template.

    A network on the meta device gets random weights, by the recipe's seed, and is never whole where it is divided.
    `validation` is what the loss is measured on now and then, each source for itself; `about` goes into the record.
    Raises RecipeError for settings that lead nowhere.
    """

    def __init__(
        self,
        recipe: LoopSettings,
        folder: Path,
        here: Processes,
        *,
        source: Source,
        validation: Sequence[Batch],
        network: Transformer,
        tokenizer: Tokenizer,
        template: str | None = None,
        about: Mapping[str, Any] | None = None,
        sample: Sample | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.recipe, self.folder, self.here = recipe, folder, here
        self.sample, self.watch, self.about = sample, watch, about or {}
        self.validation: dict[str, list[Batch]] = {}
        for each in validation:
            self.validation.setdefault(each.source, []).append(each)
        _refuse(recipe, tokenizer, network.config.context_length if sample else None)
        batch = recipe.batch
        if batch.rows % (batch.micro * here.world):
            raise RecipeError(
                f"batch.rows={batch.rows} is no multiple of batch.micro={batch.micro} rows on each of {here.world} "
                "processes; change one of them"
            )
        self.accumulate = batch.rows // (batch.micro * here.world)
        self.parts = [part_of(recipe)]
        self.source = source
        self.loader = Loader(source, rows=batch.micro, seed=recipe.seed, rank=here.rank, world=here.world)
        self.config = network.config
        self.batch_tokens = batch.rows * source.length  # that a step reads; with masked loss fewer are targets
        self.flops = flops_per_token(self.config, source.length)
        new = network.norm.weight.is_meta
        self.step = step_of(recipe, network, mesh=here.mesh, device=here.device if new else None)
        if new:
            parallel.initialise(self.step.network, torch.Generator(here.device).manual_seed(recipe.seed))
        self.checkpoints = Checkpoints(folder, self.step, self.config, tokenizer, template, keep=recipe.save.keep)
        self.state = _State()
        self.peak = _peak(here.device, recipe.precision)

    def run(self, resume: bool) -> Run:
        run, another = self._open(resume)
        if resume and (last := self.checkpoints.last()) is not None:
            self._restore(self.checkpoints.load(last))
        if another:
            self._warm_again(run)
        if resume and self.here.first:
            run.keep(lambda line: line["step"] <= self.state.step)
        if self.watch and self.here.first:
            self.watch.begin(self._facts())
        board = _Board(run.folder / "tensorboard", self.state.step) if self.here.first else None
        begun, before = time.perf_counter(), self.state.seconds
        try:
            while self.state.step < self.recipe.steps:
                progress, rate, seconds, note = self._advance()
                done = self.state.step
                self.checkpoints.poll()
                measured = None
                if self.validation and (done % self.recipe.evaluate == 0 or done == self.recipe.steps):
                    measured = self._evaluate()
                saved = done % self.recipe.save.every == 0 or done == self.recipe.steps
                if saved:
                    self.checkpoints.save(done, self._remembered())
                self.state.seconds = before + time.perf_counter() - begun
                if self.here.first:
                    odd = measured and not math.isfinite(measured.mean) and "the validation loss is not finite"
                    notes = [each for each in (note, self.step.note, self.checkpoints.failure, odd) if each]
                    self.step.note = None
                    told = "; ".join(notes) or None
                    figures = self._figures(progress, rate, seconds, measured, told)
                    run.log(**figures)
                    if board:
                        board.add(figures)
                    if self.watch:
                        self.watch.line(self._line(progress, rate, seconds, measured, told))
                if saved:
                    self._write_samples(run, done)
            self.checkpoints.finish()
            if self.checkpoints.failure:
                raise RunError(self.checkpoints.failure + ", and continue with --resume")
            if self.here.first:
                card.write(run)
        finally:
            if self.here.mesh is None:  # others might wait for a process that has ended
                self.checkpoints.finish()
            if board:
                board.close()
        return run

    def _open(self, resume: bool) -> tuple[Run, bool]:
        """The run's record, and whether it goes on by another schedule than it was begun with."""
        asked = self.recipe.model_dump(mode="json")
        if not resume:
            if self.recipe.optimizer.rewarm is not None:
                raise RecipeError("optimizer.rewarm: is for a run that goes on; give --resume, or optimizer.warmup")
            about = {"seed": self.recipe.seed, "corpus": self.source.sha256, "devices": self.here.devices}
            about |= {"device": str(self.here.device), "parameters": self.config.parameters(), "peak": self.peak}
            about |= {"schedule": [part.model_dump() for part in self.parts]}
            if not self.here.first:
                return Run(self.folder), False
            return Run.create(self.folder, asked, **about, **self.about), False
        run = Run.open(self.folder)
        origin = run.origin
        try:
            then = leaves(type(self.recipe).model_validate(run.recipe).model_dump(mode="json"))
            self.parts = [Part.model_validate(part) for part in origin["schedule"]]
        except (ValueError, TypeError, KeyError):
            raise RunError(f"{self.folder}: its recipe is damaged, or of another version; begin another run") from None
        now = leaves(asked)
        other = [name for name in sorted(now) if now[name] != then.get(name) and not _within(name, _FREE)]
        other.sort(key=lambda name: name in _SCHEDULE)
        if other and (other[0] not in _SCHEDULE or self.recipe.optimizer.rewarm is None):
            name = other[0]
            told = (
                f"{self.folder}: the run was begun with {name} = {json.dumps(then.get(name))}, and the recipe says "
                f"{json.dumps(now[name])}"
            )
            if name not in _SCHEDULE:
                raise RunError(f"{told}; continue it with what it was begun with, or begin another")
            raise RunError(
                f"{told}, so the learning rate would jump; continue it with what it was begun with, or give "
                "optimizer.rewarm=N, a new warm-up of N steps"
            )
        if origin.get("corpus") != self.source.sha256:
            raise RunError(
                f"{self.source.name}: is not the data that {self.folder} was begun with; give the same data, or begin "
                "another run"
            )
        return run, bool(other)

    def _warm_again(self, run: Run) -> None:
        """Go on from the state by another schedule, which begins at the rate that the last step had."""
        at, warmup = self.state.step, self.recipe.optimizer.rewarm or 0
        if self.recipe.steps < at + max(1, warmup):
            raise RunError(
                f"{self.folder}: {at} steps are done, and steps={self.recipe.steps} leaves no room for a warm-up of "
                f"{warmup}; choose steps={at + max(1, warmup)} or more"
            )
        start = rate_of(self.parts, at) if at else 0.0
        self.parts.append(part_of(self.recipe, begin=at, start=start, warmup=warmup))
        if self.here.first:
            schedule = [part.model_dump() for part in self.parts]
            run.change(self.recipe.model_dump(mode="json"), schedule=schedule)

    def _advance(self) -> tuple[Progress, float, float, str | None]:
        """One step, and what came of it: its figures, learning rate, seconds, and a note if there is one."""
        s, spikes = self.state, self.recipe.spikes
        begun = time.perf_counter()
        rate = rate_of(self.parts, s.step + 1)
        progress = self.step.step([self.loader.next() for _ in range(self.accumulate)], rate)
        seconds = time.perf_counter() - begun
        s.step += 1
        s.tokens += progress.tokens
        if progress.skipped:
            s.nonfinite += 1
            if s.nonfinite >= spikes.nonfinite:
                raise RunError(
                    f"{self.folder}: step {s.step}: {s.nonfinite} steps in a row had no finite loss or gradient; "
                    f"lower optimizer.rate, and go on from the last state in another run, with start={self.folder}"
                )
            return progress, rate, seconds, "skipped: loss or gradient is not finite"
        s.nonfinite = 0
        if is_spike(progress.loss, s.losses, spikes):
            note = self._rewind(progress.loss)
            if note:
                return progress, rate, seconds, note
        s.losses = [*s.losses, progress.loss][-spikes.window :]
        return progress, rate, seconds, None

    def _rewind(self, loss: float) -> str | None:
        """Go back to the last state, and on with rows that come after the spike's. None: there is no state."""
        saved = self.checkpoints.last()
        if saved is None:
            return None
        at, rewinds, rows = self.state.step, self.state.rewinds + 1, self.loader.state()["rows"]
        if rewinds > self.recipe.spikes.rewinds:
            raise RunError(
                f"{self.folder}: step {at}: the loss rose to {loss:.2f}, after {rewinds - 1} times that the run went "
                "back and on with other rows; lower optimizer.rate, or raise spikes.deviations"
            )
        self._restore(self.checkpoints.load(saved))
        self.state.rewinds = rewinds
        self.loader.skip(rows - self.loader.state()["rows"])
        return f"the loss rose to {loss:.2f} at step {at}: back to step {saved}, and on with other rows"

    def _evaluate(self) -> _Validation:
        losses = {source: self.step.evaluate(batches) for source, batches in self.validation.items()}
        if len(losses) == 1:
            return _Validation(next(iter(losses.values())), {})
        targets = {
            source: sum(int((batch.targets != IGNORED).sum()) for batch in batches)
            for source, batches in self.validation.items()
        }
        losses = {source: loss for source, loss in losses.items() if targets[source]}
        total = sum(loss * targets[source] for source, loss in losses.items())
        return _Validation(total / sum(targets.values()) if losses else math.nan, losses)

    def _remembered(self) -> dict[str, Any]:
        return {"loader": self.loader.state(), **vars(self.state)}

    def _restore(self, remembered: dict[str, Any]) -> None:
        self.loader.restore(remembered.pop("loader"))
        self.state = _State(**remembered)

    def _figures(
        self, progress: Progress, rate: float, seconds: float, measured: _Validation | None, note: str | None
    ) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "step": self.state.step,
            "loss": progress.loss,
            "rate": rate,
            "norm": progress.norm,
            "tokens": self.state.tokens,
            "epoch": round(self.loader.epoch, 4),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.batch_tokens / seconds, 1),
            "mfu": round(self._mfu(self.batch_tokens / seconds), 4),
        }
        if measured:
            figures["validation"] = measured.mean
            if measured.sources:
                figures["sources"] = measured.sources
        if self.recipe.watts:
            hours = self.state.seconds / 3600 * self.here.devices
            figures["MWh"], figures["tCO2eq"] = plan.energy(hours, self.recipe.watts)
        if note:
            figures["note"] = note
        return figures

    def _line(
        self, progress: Progress, rate: float, seconds: float, measured: _Validation | None, note: str | None
    ) -> Line:
        speed = self.batch_tokens / seconds
        left = (self.recipe.steps - self.state.step) * self.state.seconds / max(1, self.state.step)
        mean, sources = (measured.mean, measured.sources) if measured else (None, {})
        mfu = self._mfu(speed)
        return Line(self.state.step, self.recipe.steps, progress.loss, rate, speed, mfu, left, mean, sources, note)

    def _mfu(self, tokens_per_second: float) -> float:
        return self.flops * tokens_per_second / (self.peak * self.here.devices)

    def _facts(self) -> list[str]:
        c, r = self.config, self.recipe
        device = self.here.device.type
        devices = f"{self.here.devices} × {device}" if self.here.devices > 1 else device
        epochs = r.steps * r.batch.rows / len(self.source)
        return [
            f"{c.parameters() / 1e6:.1f} M parameters, {r.precision}, on {devices}; "
            f"{r.steps:,} steps of {self.batch_tokens:,} tokens, {epochs:.2f} epochs",
            "MFU = (6 × parameters in products + 3 × attention's operations) × tokens/s ÷ peak "
            f"= {self.flops / 1e6:.1f} MFLOP × tokens/s ÷ {self.peak * self.here.devices / 1e9:,.0f} GFLOP/s",
        ]

    def _write_samples(self, run: Run, step: int) -> None:
        prompts = self.recipe.samples.prompts
        if not self.sample or not prompts:
            return
        self.checkpoints.finish()
        if not self.here.first or self.checkpoints.failure:
            return
        lines: list[dict[str, Any]]
        reason = ""
        try:
            texts = self.sample(self.checkpoints.path(step) / records.MODEL, prompts, self.recipe.samples.tokens)
            lines = [{"step": step, "text": text} for text in texts]
        except Exception as error:  # whatever it is, a run is worth more than its samples
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            lines = [{"step": step, "note": reason}]
        try:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            files.append(run.folder / "samples.jsonl", text, error=RunError)
        except RunError as error:
            reason = str(error)
        if reason and self.watch:
            self.watch.note(f"step {step}: no samples ({reason}); the run goes on")


def refuse_longer(length: int, start: Checkpoint) -> None:
    """Raise RecipeError for rows of more tokens than the model to begin with reads."""
    if length > start.config.context_length:
        raise RecipeError(
            f"data.length={length} is more than {start.path} reads, {start.config.context_length}; choose shorter rows"
        )


def step_of(
    recipe: LoopSettings,
    network: Transformer,
    *,
    mesh: DeviceMesh | None = None,
    device: torch.device | None = None,
) -> Step:
    """The step that a recipe describes; `mesh` and `device` as Step has them."""
    o = recipe.optimizer
    return Step(
        network,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip=o.clip,
        precision=recipe.precision,
        compile=recipe.compile,
        checkpointing=recipe.checkpointing,
        mesh=mesh,
        device=device,
    )


def part_of(recipe: LoopSettings, *, begin: int = 0, start: float = 0.0, warmup: int | None = None) -> Part:
    """The schedule of a recipe, from a step and a rate on."""
    o = recipe.optimizer
    up = o.warmup if warmup is None else warmup
    return Part(begin=begin, start=start, peak=o.rate, warmup=up, final=o.final, steps=recipe.steps)


def _refuse(recipe: LoopSettings, tokenizer: Tokenizer, context: int | None) -> None:
    """Raise RecipeError for a warm-up that never ends, and for samples that a model of this context cannot write."""
    if recipe.steps > MOST:  # as many as epochs take
        raise RecipeError(f"steps: would be more than {MOST:,}; choose fewer epochs")
    if reason := long_warmup(recipe.optimizer.warmup, recipe.steps):
        raise RecipeError(reason)
    for number, prompt in enumerate(recipe.samples.prompts, 1):
        count = 1 + len(tokenizer.encode(prompt)) + recipe.samples.tokens
        if context and count > context:
            raise RecipeError(
                f"samples.prompts: number {number} with samples.tokens={recipe.samples.tokens} has {count} tokens, and "
                f"the model reads {context}; shorten either"
            )


def _within(name: str, names: set[str]) -> bool:
    """Whether a setting, or the table that it is in, is among the names."""
    return name in names or name.partition(".")[0] in names


def is_spike(loss: float, before: Sequence[float], rule: Spikes) -> bool:
    """Whether a loss is out of the ordinary after those `before` it; never before there are `rule.window` of them."""
    if len(before) < rule.window:
        return False
    return loss > statistics.fmean(before) + max(rule.least, rule.deviations * statistics.pstdev(before))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Of forward and backward pass, 3 times the forward's: matrices, and causal attention over a row of `length`."""
    return 3 * (config.matrix_flops() + config.causal_attention_flops(length))


def _peak(device: torch.device, precision: str) -> float:
    """Operations a second: what the maker states of a GPU that `plan` knows, else those of a product of up to 2048²."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu in plan.GPUS.values():
            if gpu.name.partition("-")[0] in name:
                return gpu.operations
    first = torch.ones(256, 256, dtype=dtype, device=device)
    (first @ first)[0, 0].item()  # which prepares the library, for a second or more
    rate, end = 0.0, time.perf_counter() + 1
    for size in (256, *[2048] * 20):
        if rate and 2 * size**3 / rate > end - time.perf_counter():  # bfloat16 takes seconds where no unit is for it
            break
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        begun = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        rate = max(rate, 2 * size**3 / (time.perf_counter() - begun))
    return rate


class _Board:
    """The figures for TensorBoard, if it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, figures: dict[str, Any]) -> None:
        if self._writer:
            for name, value in figures.items():
                if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                    self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        if self._writer:
            self._writer.close()
