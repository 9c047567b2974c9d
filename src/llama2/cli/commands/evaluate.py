"""`llama2 evaluate`: the paper's tests of a model."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama2.cli.options import Json, ModelOptions
from llama2.cli.progress import Bar
from llama2.console import data as print_data
from llama2.console import say
from llama2.native import CacheType

if TYPE_CHECKING:
    from llama2.evaluate.task import EvaluationTask

EXAMPLE = "Example: llama2 evaluate smollm2-135m-instruct --tasks arc_easy,piqa --limit 100 --data ../shared/data"

#: Requests of the whole context that the cache holds: the shots that items share, and their own ends.
_SEQUENCES = 4


@dataclass(frozen=True)
class EvaluatedModel(ModelOptions):
    """The model that is measured, and how it runs."""

    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Name, file or Hugging Face repository; see `llama2 list`."),
    ] = None


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how they are asked."""

    suite: Annotated[
        Literal["academic", "truth", "safety", "all"] | None, typer.Option(help="All tasks of a kind.")
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks by name, or TOML files of one's own; an unknown name lists all."),
    ] = None
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the sets, one folder each.")] = Path("data")
    protocol: Annotated[
        Literal["paper", "harness"], typer.Option(help="Prompts of the paper, or lm-evaluation-harness's own.")
    ] = "paper"
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ask N items of each task, drawn at random.", show_default="all"),
    ] = None
    full: Annotated[
        bool, typer.Option("--full", help="Draw as many answers to a question as the paper's pass@k needs, not 10.")
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of the drawn items, of examples and of drawn answers.")] = 0
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask for answers by the chat template; likelihoods never use it.")
    ] = False

    formats: Annotated[
        bool, typer.Option("--formats", help="Ask likelihood tasks in their other prompt formats too: the spread.")
    ] = False

    def chosen(self) -> list[EvaluationTask]:
        """The tasks, each once, and with `formats` in each of their formats."""
        from llama2.evaluate import task

        if (self.suite is None) == (self.tasks is None):
            raise typer.BadParameter("give either --suite or --tasks")
        if self.suite is not None:
            named = task.suite(self.suite)
        else:
            named = [task.load(name) for name in (self.tasks or "").split(",") if name]
        if self.full:
            named = [some.full() for some in named]
        found = {each.label: each for some in named for each in (some, *(some.other_formats() if self.formats else ()))}
        if not found:
            raise typer.BadParameter("--tasks names no task")
        return list(found.values())


@dataclass(frozen=True)
class EvaluationRunOptions:
    """Where the run is, and how much runs at once."""

    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder.", show_default="runs/evaluate-MODEL-SUITE")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run; no answer is computed twice.")] = False
    batch: Annotated[
        int, typer.Option(min=1, max=4096, metavar="N", help="Requests at once; changes no bit of a score.")
    ] = 64
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Compare with the run in this folder, item by item.", show_default=False),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the scores with intervals: a .png, .svg or .pdf.", show_default=False),
    ] = None

    corpus: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Look for the items in this built corpus: contamination.", show_default=False),
    ] = None

    def check(self, chosen: list[EvaluationTask], protocol: str) -> None:
        """Refuse, before anything is asked, a file that cannot be drawn, and a run that cannot be compared."""
        from llama2.evaluate import comparison, scores, table

        if self.plot is not None and self.plot.suffix not in table.FORMATS:
            raise typer.BadParameter(f"--plot {self.plot}: the name must end in one of {', '.join(table.FORMATS)}")
        if self.corpus is not None:
            from llama2.data.shards import read_manifest

            read_manifest(self.corpus)
        if self.against is not None:
            before = scores.read_record(self.against)["tasks"]
            for task in chosen:
                if "metrics" in (theirs := before.get(task.label, {})):
                    ours = {"version": task.version, "task": task.digest, "protocol": protocol}
                    comparison.refuse_other_task(task.label, ours, theirs, self.against)


def command(*, model: EvaluatedModel, tasks: TaskOptions, run: EvaluationRunOptions, as_json: Json = False) -> None:
    """Measure a model by the paper's tests, offline.

    The sets are files below --data, each checked by its SHA-256. A task without its files is not run, and listed so.
    Every answer is stored as it comes: after Ctrl-C or a crash, --resume goes on, to the same bytes.

    The run's folder holds every sample (samples/), and a record of all scores (record.json).
    """
    chosen = tasks.chosen()
    if not tasks.data.is_dir():
        raise typer.BadParameter(f"--data {tasks.data}: is not a folder; give the one that holds the sets")
    run.check(chosen, tasks.protocol)
    name = tasks.suite or "-".join(task.label for task in chosen[:3])
    folder = run.out or Path("runs") / f"evaluate-{Path(model.name).stem}-{name}"
    from llama2.evaluate.run import EvaluationSettings, evaluate

    settings = EvaluationSettings(
        data=tasks.data,
        protocol=tasks.protocol,
        limit=tasks.limit,
        seed=tasks.seed,
        chat=tasks.chat,
        in_flight=run.batch,
        corpus=run.corpus,
    )
    with model.load(sequences=_SEQUENCES, cache_type=_cache_type(model)) as loaded:
        try:
            record = evaluate(loaded, chosen, folder, settings, resume=run.resume, progress=Bar())
        except KeyboardInterrupt:
            say(f"\nllama2: stopped; the same command with --resume goes on in {folder}", file=sys.stderr)
            raise
    _report(record, folder, run, as_json=as_json)


def _cache_type(model: ModelOptions) -> CacheType:
    """float16, by which figures are nearer to others' and the same on more processors, unless `LLAMA2_ISA` is set."""
    return "auto" if model.runner != "native" or os.environ.get("LLAMA2_ISA") else "float16"


def _report(record: dict[str, Any], folder: Path, run: EvaluationRunOptions, *, as_json: bool) -> None:
    """Print, draw and compare what a run found."""
    from llama2.evaluate import comparison, table

    if run.plot is not None:
        table.draw(record, run.plot)
    compared = comparison.compare_runs(folder, run.against) if run.against is not None else None
    if as_json:
        print_data(json.dumps(record | ({"comparison": compared} if compared else {})))
        return
    for line in (*table.lines(record), *(("", *table.comparison_lines(compared)) if compared else ())):
        say(line)
    say(f"{folder}: every sample and the record")
