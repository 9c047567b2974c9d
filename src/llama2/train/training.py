"""A training run in its folder: the loop with its callbacks, from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama2.checkpoint import Checkpoint
from llama2.data.loader import Loader, RowSource, TrainBatch
from llama2.errors import RecipeError
from llama2.model import parallel
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.text.tokenizer import Tokenizer
from llama2.train import card
from llama2.train.callbacks import (
    Evaluator,
    FiniteGuard,
    MetricsLog,
    Reported,
    Reporter,
    Sample,
    SampleWriter,
    SpikeGuard,
    StateSaver,
    TensorBoard,
    Throughput,
)
from llama2.train.continuation import Continuation, refuse_rewarm, schedule_of
from llama2.train.loop import Batches, Callback, Loop
from llama2.train.objective import Objective, next_token
from llama2.train.processes import Processes
from llama2.train.settings import MOST, LoopSettings, long_warmup
from llama2.train.states import AdapterWriter, States
from llama2.train.step import Step
from llama2.train.throughput import estimate, flops_per_token, peak_flops

#: Makes batches of a network's own, such as rollouts, from its step and the source's rows, and what goes with them.
MakeBatches = Callable[[Step, Loader[Any]], tuple[Batches, Sequence[Callback]]]


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, on what, by which objective. What is saved has `tokenizer` and chat template.

    A network on the meta device gets random weights, by the recipe's seed, and is never whole where it is divided. The
    loss of `validation` is measured now and then, for each source alone. Where an adapter of a frozen network is
    trained, `adapter` writes it.
    """

    network: Transformer
    source: RowSource[Any]
    tokenizer: Tokenizer
    template: str | None = None
    validation: Sequence[TrainBatch] = ()
    objective: Objective[Any] = next_token
    adapter: AdapterWriter | None = None
    unit: str = card.LANGUAGE  # what has a loss
    batches: MakeBatches | None = None  # None: the source's rows
    passes: float = 1.0  # operations of a token, in passes forward and backward of the network


class Training:
    """A run: a task by a recipe, in `folder`. Raises RecipeError for settings that lead nowhere."""

    def __init__(
        self,
        recipe: LoopSettings,
        folder: Path,
        dist: Processes,
        task: Task,
        *,
        sample: Sample | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.recipe, self.folder, self.dist, self.task = recipe, folder, dist, task
        self.sample, self.reporter = sample, reporter if dist.is_main else None
        self.config = task.network.config
        _refuse(recipe, task.tokenizer, self.config.context_length if sample else None)
        batch = recipe.batch
        if batch.size % (batch.micro_size * dist.dp_size):
            raise RecipeError(
                f"batch.size={batch.size} is not a multiple of batch.micro_size={batch.micro_size} rows on each of "
                f"{dist.dp_size} processes; change one of them"
            )
        self.loader = Loader(
            task.source, rows=batch.micro_size, seed=recipe.seed, dp_rank=dist.dp_rank, dp_size=dist.dp_size
        )
        new = task.network.norm.weight.is_meta
        self.step = step_of(recipe, task.network, task.objective, mesh=dist.mesh, device=dist.device if new else None)
        if new:
            parallel.initialise(self.step.network, torch.Generator(dist.device).manual_seed(recipe.seed))
        self.batches: Batches = self.loader
        self.own: Sequence[Callback] = ()  # what goes with batches of the network's own
        if task.batches:
            self.batches, self.own = task.batches(self.step, self.loader)
        self.states = States(
            *(folder, self.step, self.config, task.tokenizer, task.template),
            keep_last=recipe.save.keep_last,
            adapter=task.adapter,
        )
        self.batch_tokens = batch.size * task.source.length  # that a step reads; with a loss mask fewer have losses
        self.trained: int | None = None  # parameters of those beside frozen ones; None: all are trained
        self.frozen = 0  # bytes of the others
        if not all(p.requires_grad for p in task.network.parameters()):
            self.trained, self.frozen = _trained(task.network)
        self.flops = task.passes * flops_per_token(self.config, task.source.length, self.trained)
        self.peak = peak_flops(dist.device, recipe.precision)

    def run(self, *, resume: bool, **about: Any) -> Run:
        """Train to the last step, from the last state with `resume`. `about` goes into a new run's record."""
        continuation = Continuation.open(self.folder, self.recipe, self.task.source) if resume else None
        schedule = continuation.schedule if continuation else [schedule_of(self.recipe)]
        run = continuation.run if continuation else self._create(schedule, about)
        saver = StateSaver(self.states, self.recipe.save.every)
        loop = Loop(
            self.step,
            self.batches,
            steps=self.recipe.steps,
            schedule=schedule,
            accumulate=self.recipe.batch.size // (self.recipe.batch.micro_size * self.dist.dp_size),
            callbacks=self._callbacks(run, saver),
        )
        with self.states:
            if continuation:
                self._resume(continuation, loop, saver)
            if self.reporter:
                self.reporter.begin(self._header())
            loop.run()
        if self.dist.is_main:
            card.write(run, self.task.unit)
        return run

    def _create(self, schedule: Sequence[Any], about: dict[str, Any]) -> Run:
        """A new run's record, which the main process writes."""
        refuse_rewarm(self.recipe)
        if not self.dist.is_main:
            return Run(self.folder)
        return Run.create(
            self.folder,
            self.recipe.model_dump(mode="json"),
            seed=self.recipe.seed,
            corpus=self.task.source.sha256,
            devices=self.dist.devices,
            device=str(self.dist.device),
            parameters=self.config.parameters(),
            peak=self.peak,
            schedule=[part.model_dump() for part in schedule],
            **about,
        )

    def _resume(self, continuation: Continuation, loop: Loop, saver: StateSaver) -> None:
        """Continue from the last state, if there is one, perhaps by another schedule."""
        if (last := self.states.last()) is not None:
            saver.restore(loop, last)
        if continuation.other:
            continuation.rewarm(self.recipe, loop.state.step, record=self.dist.is_main)
            loop.schedule = continuation.schedule
        if self.dist.is_main:
            continuation.run.keep_lines(lambda line: line["step"] <= loop.state.step)

    def _callbacks(self, run: Run, saver: StateSaver) -> list[Callback]:
        """What happens after a step, in this order. The main process alone writes and reports."""
        recipe, dist = self.recipe, self.dist
        rule = recipe.spikes
        guard = FiniteGuard(rule, saver) if self.task.batches else SpikeGuard(rule, saver, self.loader)
        callbacks: list[Callback] = [
            guard,
            *self.own,
            Evaluator(self.task.validation, recipe.evaluate),
            saver,
            Throughput(
                batch_tokens=self.batch_tokens,
                flops=self.flops,
                peak=self.peak,
                devices=dist.devices,
                watts=recipe.watts,
            ),
        ]
        if dist.is_main:
            callbacks += [MetricsLog(run), TensorBoard(run.folder / "tensorboard")]
        if self.reporter:
            callbacks.append(Reported(self.reporter))
        if self.sample:
            callbacks.append(SampleWriter(run, saver, recipe.samples, self.sample, self.reporter))
        return callbacks

    def _header(self) -> list[str]:
        """What the run is, for a person."""
        r, devices = self.recipe, self.dist.devices
        device = self.dist.device.type
        on = f"{devices} × {device}" if devices > 1 else device
        epochs = r.steps * r.batch.size / len(self.task.source)
        some = "" if self.trained is None else f", frozen, and {self.trained:,} that are trained"
        first = (
            f"{self.config.parameters() / 1e6:.1f} M parameters{some}, {r.precision}, on {on}; "
            f"{r.steps:,} steps of {self.batch_tokens:,} tokens, {epochs:.2f} epochs"
        )
        if self.task.batches:
            return [first]  # those who make the batches estimate their time
        products = "6 × parameters" if self.trained is None else "(4 × frozen + 6 × trained parameters)"
        return [
            first,
            f"MFU = ({products} in products + 3 × attention's operations) × tokens/s ÷ peak "
            f"= {self.flops / 1e6:.1f} MFLOP × tokens/s ÷ {self.peak * devices / 1e9:,.0f} GFLOP/s",
            estimate(
                *(self.config, r, self.dist.device),
                length=self.task.source.length,
                devices=devices,
                trained=self.trained,
                frozen=self.frozen,
                peak=self.peak,
            ),
        ]


def _trained(network: Transformer) -> tuple[int, int]:
    """Parameters that are trained, and bytes of the others, which are frozen."""
    frozen = [*(p for p in network.parameters() if not p.requires_grad), *network.buffers()]
    return sum(p.numel() for p in network.parameters() if p.requires_grad), sum(each.nbytes for each in frozen)


def step_of(
    recipe: LoopSettings,
    network: Transformer,
    objective: Objective[Any] = next_token,
    *,
    mesh: torch.distributed.device_mesh.DeviceMesh | None = None,
    device: torch.device | None = None,
) -> Step:
    """The step that a recipe describes; `mesh` and `device` as Step has them."""
    return Step(
        network,
        objective,
        optimizer=recipe.optimizer,
        precision=recipe.precision,
        compile=recipe.compile,
        recompute=recipe.recompute,
        mesh=mesh,
        device=device,
        seed=recipe.seed,
    )


def refuse_longer(length: int, start: Checkpoint) -> None:
    """Raise RecipeError for rows of more tokens than the model to begin with reads."""
    if length > start.config.context_length:
        raise RecipeError(
            f"data.length={length} is more than {start.path} reads, {start.config.context_length}; choose shorter rows"
        )


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
