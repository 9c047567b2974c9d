"""A run: tasks, asked of a model, in a folder with every answer, every sample and one record of scores.

run.json         command, commit, versions, hardware and when it began
recipe.json      the model's hash, the tasks' and every setting
answers.jsonl    the model's answers as they came, by the hash of what was asked
samples/         NAME.jsonl, one item a line
record.json      the scores
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from llama2 import files
from llama2.api import Model
from llama2.errors import EvaluationError
from llama2.evaluate import rows as sets
from llama2.evaluate.abstention import abstention, confidence
from llama2.evaluate.harm import NotJudgedError, judges
from llama2.evaluate.intervals import Interval, mean_interval, weighted_mean
from llama2.evaluate.published import LLAMA_2, figures
from llama2.evaluate.queries import AnswerStore, GenerationQuery, Query, key
from llama2.evaluate.scores import RECORD, SAMPLES, beside_published, format_spread, group_scores, read_samples
from llama2.evaluate.strata import sample
from llama2.evaluate.task import EvaluationTask
from llama2.hub import store
from llama2.hub.progress import Progress
from llama2.records import Run

if TYPE_CHECKING:
    from llama2.evaluate.items import TaskItem, TaskPart

ANSWERS = "answers.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How tasks are asked. `in_flight` queries run at once, which changes no bit of a score."""

    data: Path
    protocol: Literal["paper", "harness"] = "paper"
    limit: int | None = None  # items of a task, drawn at random
    seed: int = 0
    chat: bool = False  # ask questions that are to be answered by the chat template
    in_flight: int = 64
    corpus: Path | None = None  # in which items are looked for once they are scored


@dataclass(slots=True)
class AskedTask:
    """A task in a run: its parts and items, or why it is not run."""

    task: EvaluationTask
    parts: list[TaskPart] = field(default_factory=list)
    items: list[list[TaskItem]] = field(default_factory=list)  # of each part
    digests: Mapping[str, str] = field(default_factory=dict)  # of its files
    rows: int = 0  # of the split, before a limit
    chat: bool = False  # asked in the model's chat format
    reason: str | None = None  # why it is not run

    @property
    def asked(self) -> list[TaskItem]:
        """Items that fit the context."""
        return [item for some in self.items for item in some if item.refused is None]


def evaluate(
    model: Model,
    tasks: Sequence[EvaluationTask],
    folder: Path,
    settings: EvaluationSettings,
    *,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Ask a model the tasks, and return the run's record, which is also in `folder`.

    With `resume`, what was answered before is not asked again; the result has the same bytes. Raises RunError where
    there is a run already, or with `resume` none. Raises EvaluationError for a run of other settings, for files that
    are not the task's, and where the harness is not installed. Raises EngineError when the model fails.

    `progress` gets what is counted, how many are done, and how many there are. It counts "tasks" that are prepared,
    then "tokens" that the model has read, then items whose "programs" were executed, then tokens of the "corpus".
    """
    harness = _harness()
    weights = weights_digest(model)
    recipe = _recipe(model, weights, tasks, settings)
    Run.look(folder, resume=resume)
    lm = harness.EngineLM(model, in_flight=settings.in_flight)
    asked = []  # before there is a run, which bad files would leave behind
    for number, task in enumerate(tasks):
        progress("tasks", number, len(tasks))
        asked.append(_ask(task, lm, settings))
    run = _resumed(folder, recipe) if resume else Run.create(folder, recipe)
    answers = AnswerStore.open(folder / ANSWERS)
    _fill(answers, asked, model, settings, progress)
    (folder / SAMPLES).mkdir(exist_ok=True)
    programs = partial(progress, "programs")
    scored = {each.task.label: _scored(each, answers, folder, settings, programs) for each in asked}
    if settings.corpus is not None:
        for label, found in _contamination(asked, scored, folder, settings.corpus, progress).items():
            scored[label]["contamination"] = found
    record = {
        **run.origin,
        "model": model.checkpoint.path.name,
        "weights": weights,
        "settings": {name: value for name, value in recipe.items() if name != "tasks"},
        "tasks": scored,
        "groups": group_scores(scored),
        "formats": format_spread(scored),
    }
    with files.create(folder / RECORD, error=EvaluationError) as file:
        file.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return record


def _harness() -> ModuleType:
    """Our side of the harness. Raises EvaluationError where lm_eval is not installed."""
    try:
        from llama2.evaluate import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise EvaluationError(
            "evaluate needs lm-evaluation-harness, which is not installed; `pip install 'whole-llama[evaluate]'` "
            "brings it"
        ) from None
    return harness


def weights_digest(model: Model) -> str:
    """SHA-256 of a model's weights: of its one file, or of the names and hashes of several."""
    tensors = (*model.checkpoint.tensors.values(), *model.checkpoint.extras.values())
    paths = sorted({file.path for tensor in tensors for file in tensor.mapped})
    digests = [store.digest(path, "sha256", lambda *_: None) for path in paths]
    if len(digests) == 1:
        return digests[0]
    named = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return sha256("".join(named).encode()).hexdigest()


def _recipe(
    model: Model, weights: str, tasks: Sequence[EvaluationTask], settings: EvaluationSettings
) -> dict[str, Any]:
    """All that the scores depend on, and what runs must have in common to be one."""
    return {
        "weights": weights,
        "adapters": [adapter.summary() for adapter in model.checkpoint.adapters],
        "tokenizer_mode": model.checkpoint.tokenizer_mode,
        "context": model.engine.context,
        "arithmetic": model.engine.arithmetic,
        "protocol": settings.protocol,
        "limit": settings.limit,
        "seed": settings.seed,
        "chat": settings.chat,
        "tasks": {task.label: task.digest for task in tasks},
    }


def _resumed(folder: Path, recipe: Mapping[str, Any]) -> Run:
    run = Run.open(folder)
    before = run.recipe
    for name in recipe:
        if before.get(name) != (value := json.loads(json.dumps(recipe[name]))):
            was = "" if name in ("tasks", "adapters") else f": it was {before.get(name)} and is {value}"
            raise EvaluationError(
                f"{folder}: cannot go on with other {name}{was}; give the same, or choose another folder"
            )
    return run


def _ask(task: EvaluationTask, lm: Any, settings: EvaluationSettings) -> AskedTask:
    """A task's items with their queries, or why there are none."""
    from llama2.evaluate.items import parts

    reason = sets.missing(task, settings.data) or task.lacking
    if settings.protocol == "harness" and not task.harness:
        reason = "the harness's version is not used; ask by --protocol paper"
    if reason is not None:
        return AskedTask(task, reason=reason)
    splits, digests = sets.read(task, settings.data)
    found = parts(task, splits, settings.protocol)
    wanted = _wanted(found, settings)
    items = [list(part.items(lm, wanted, seed=settings.seed, chat=settings.chat)) for part in found]
    rows, chat = sum(len(part.ids) for part in found), found[0].in_chat(lm, settings.chat)
    return AskedTask(task, found, items, digests, rows=rows, chat=chat)


def _wanted(found: Sequence[TaskPart], settings: EvaluationSettings) -> set[str]:
    """The names of a task's items, or of a random sample of them, stratified where the task says by what."""
    rows = [(name, row) for part in found for name, row in zip(part.ids, part.rows, strict=True)]
    stratum = found[0].task.stratum
    strata = [str(row[stratum]) for _, row in rows] if stratum else None
    limit = len(rows) if settings.limit is None else settings.limit
    return {rows[i][0] for i in sample(len(rows), limit, settings.seed, strata)}


def _fill(
    answers: AnswerStore, asked: Sequence[AskedTask], model: Model, settings: EvaluationSettings, progress: Progress
) -> None:
    queries: dict[str, Query] = {}
    for each in asked:
        for item in each.asked:
            queries |= {key(query): query for some in item.queries for query in some}
    total = sum(query.needed for query in queries.values())
    done = sum(query.needed for name, query in queries.items() if name in answers.found)
    progress("tokens", done, total)

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("tokens", done, total)

    answers.fill(model.engine, queries, settings.in_flight, count)


def _scored(
    each: AskedTask,
    answers: AnswerStore,
    folder: Path,
    settings: EvaluationSettings,
    programs: Callable[[int, int], None],
) -> dict[str, Any]:
    """A task's part of the record; its samples are written."""
    task = each.task
    about: dict[str, Any] = {
        "title": task.title,
        "suite": task.suite,
        "group": task.group,
        "version": task.version,
        "task": task.digest,
        "protocol": settings.protocol,
        "source": task.source,
        "licence": task.licence,
        "note": task.note,
        "files": dict(each.digests),
    }
    if each.reason is not None:
        return about | {"not_run": each.reason}
    if not each.asked:
        return about | {"not_run": f"none of {each.rows} items fits the context"}
    samples = _samples(each, answers, programs)
    with files.create(folder / SAMPLES / f"{task.label}.jsonl", error=EvaluationError) as file:
        for sample in samples:
            file.write((json.dumps(sample, ensure_ascii=False, default=_plain) + "\n").encode())
    scored = [sample for sample in samples if "values" in sample]
    unjudged = [sample for sample in samples if "not_judged" in sample]
    if not scored:
        return about | {"not_run": f"no answer could be judged: {unjudged[0]['not_judged']}"}
    finishes = [finish for sample in scored for finish in sample.get("finish", ())]
    part = each.parts[0]
    headline = task.headline if settings.protocol == "paper" else task.harness_metric
    metrics = _metrics(each, scored)
    column = task.published or task.name
    by = _by_group(each, scored, headline)
    return about | {
        "prompts": sha256("".join(sample["prompt"] for sample in samples).encode()).hexdigest(),
        "example": each.asked[0].prompt,
        "shots": part.shots,
        "samples": part.samples,
        "stops": part.stops,
        "chat": each.chat,
        "rows": each.rows,
        "n": len(scored),
        "refused": sum("refused" in sample for sample in samples),
        "not_judged": len(unjudged),
        "judges": judges(task.scorer) if settings.protocol == "paper" else {},
        "cut": finishes.count("length") if finishes else 0,
        "metric": headline,
        "metrics": metrics,
        **by,
        **_abstention(task, scored, headline),
        "published": None if by.get("lacking") else beside_published(column, part.shots, metrics[headline]["value"]),
    }


def _contamination(
    asked: Sequence[AskedTask], scored: Mapping[str, Mapping[str, Any]], folder: Path, corpus: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """How much of each task's items is in a corpus, and whether that moved its score."""
    from llama2.evaluate.contaminated import contamination

    items = {}
    for each in asked:
        if "metric" in (task := scored[each.task.label]):
            samples = read_samples(folder, each.task.label)
            values = {sample["id"]: sample["values"][task["metric"]] for sample in samples if "values" in sample}
            pairs = [(part, item) for part, some in zip(each.parts, each.items, strict=True) for item in some]
            texts = {item.id: part.verbalised(item) for part, item in pairs if item.id in values}
            items[each.task.label] = [*texts.values()], [values[name] for name in texts]
    return contamination(items, corpus, partial(progress, "corpus"))


def _samples(each: AskedTask, answers: AnswerStore, programs: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """What a task's file of samples has of each item, in the order of the rows."""
    samples = []
    for part, items in zip(each.parts, each.items, strict=True):
        fitting = [item for item in items if item.refused is None]
        values = iter(part.values(fitting, answers, programs) if fitting else ())
        for item in items:
            sample: dict[str, Any] = {"id": item.id}
            if each.task.stratum:
                sample["stratum"] = str(item.row[each.task.stratum])
            if each.task.by:
                sample["by"] = str(item.row[each.task.by])
            if each.task.cluster:
                sample["cluster"] = _cluster(str(item.row[each.task.cluster]), item)
            sample["prompt"] = sha256(item.prompt.encode()).hexdigest()
            if item.question != item.prompt:
                sample["question"] = sha256(item.question.encode()).hexdigest()
            if item.refused is not None:
                samples.append(sample | {"refused": item.refused})
                continue
            found = next(values)
            judged = {"not_judged": str(found)} if isinstance(found, NotJudgedError) else {"values": found}
            samples.append(sample | _answered(item, answers) | judged)
    return samples


def _cluster(text: str, item: TaskItem) -> str:
    """A name for a text that items share, such as a passage; the item's own where it has none."""
    return sha256(text.encode()).hexdigest()[:16] if text else item.id


def _answered(item: TaskItem, answers: AnswerStore) -> dict[str, Any]:
    """The model's answers to an item: log-likelihoods in nats with the texts they are of, or texts."""
    if any(isinstance(query, GenerationQuery) for some in item.queries for query in some):
        stored = [answers[query] for some in item.queries for query in some]
        return {
            "answers": [answer["text"] for answer in stored],
            "tokens": [answer["tokens"] for answer in stored],
            "finish": [answer["finish"] for answer in stored],
            **({"logprobs": [answer["logprob"] for answer in stored]} if "logprob" in stored[0] else {}),
        }
    continuations = [
        {
            "text": instance.args[-1],
            "tokens": sum(len(query.continuation) for query in some if not isinstance(query, GenerationQuery)),
            "logprob": sum(answers[query]["logprob"] for query in some),
            "greedy": all(answers[query]["greedy"] for query in some),
        }
        for instance, some in zip(item.instances, item.queries, strict=True)
    ]
    return {"continuations": continuations}


def _metrics(
    each: AskedTask, scored: Sequence[Mapping[str, Any]], only: str | None = None
) -> dict[str, dict[str, Any]]:
    """Every metric of a task, or one: its value, and its interval where it is a mean.

    An item's value may be a list, as of a prompt's instructions: the score is their mean, and they are a cluster.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in [only] if only else scored[0]["values"]:
        lists = any(isinstance(sample["values"][name], list) for sample in scored)
        pairs = [
            (value, sample.get("cluster", sample["id"]))
            for sample in scored
            for value in (sample["values"][name] if lists else [sample["values"][name]])
        ]
        values = [value for value, _ in pairs]
        aggregate = each.parts[0].aggregate(name)
        if aggregate.__name__ != "mean":
            found[name] = {"value": float(aggregate([sample["values"][name] for sample in scored]))}
            continue
        clusters = [cluster for _, cluster in pairs] if lists or each.task.cluster else None
        if each.task.aggregation == "strata" and not lists:
            interval = _mean_of_means(values, [sample["stratum"] for sample in scored])
        else:
            interval = mean_interval(values, clusters, proportion={*values} <= {0, 1})
        found[name] = {"value": interval.mean, "interval": interval.to_json()}
    return found


def _by_group(each: AskedTask, scored: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The score by the values of the task's field `by`, with the published ones, and groups that are lacking."""
    if not each.task.by:
        return {}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in scored:
        groups.setdefault(item["by"], []).append(item)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(groups):
        found[name] = _metrics(each, groups[name], metric)[metric]
        if row := figures(f"{each.task.name} {name}", each.parts[0].shots):
            found[name]["published"] = {model: row.by_model[model] for model in LLAMA_2 if model in row.by_model}
    return {"by": found, "lacking": sorted({*each.task.groups} - {*found})}


def _abstention(task: EvaluationTask, scored: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """How well the model's own probabilities distinguish right answers from wrong ones, where the task wants that."""
    if not task.abstains:
        return {}
    right = [sample["values"][metric] for sample in scored]
    return {"abstention": abstention([confidence(sample) for sample in scored], right)}


def _mean_of_means(values: Sequence[float], strata: Sequence[str]) -> Interval:
    """The mean of strata's means."""
    groups: dict[str, list[float]] = {}
    for value, stratum in zip(values, strata, strict=True):
        groups.setdefault(stratum, []).append(value)
    return weighted_mean([mean_interval(group, proportion=False) for group in groups.values()])


def _plain(value: Any) -> Any:
    """A value of NumPy's as Python's, for JSON."""
    return value.item() if hasattr(value, "item") else list(value)
