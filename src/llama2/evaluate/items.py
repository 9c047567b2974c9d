"""Our tasks as the harness's: items with their examples and queries, and their values once these are answered.

This module imports lm_eval, which takes seconds: import it where it is used.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import lm_eval.tasks
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from llama2 import machine
from llama2.data.set_files import Row, Splits
from llama2.errors import EvaluationError
from llama2.evaluate import harm, metrics
from llama2.evaluate.harm import NotJudgedError
from llama2.evaluate.harness import EngineLM
from llama2.evaluate.queries import AnswerStore, Query
from llama2.evaluate.task import EvaluationTask

Protocol = Literal["paper", "harness"]

#: The context of the likelihood that others are divided by (Brown et al. 2020, 2.4; Touvron et al. 2023, 3).
ANSWER = "Answer:"
#: The seed with which the harness draws examples unless it is given another.
HARNESS_SEED = 1234


@dataclass(slots=True)
class TaskItem:
    """An item as it is asked: the harness's instances, and for each the queries whose answers it waits for."""

    id: str
    row: Row
    prompt: str  # of its first instance
    question: str  # the same before the chat template; runs of models with other templates have it in common
    instances: list[Instance]
    queries: list[list[Query]]
    refused: str | None  # why it cannot be asked


@dataclass(slots=True)
class TaskPart:
    """Rows that share a pool of examples: a whole task, or one of its parts, such as a subject."""

    task: EvaluationTask
    protocol: Protocol
    inner: ConfigurableTask
    ids: list[str]
    rows: list[Row]

    @property
    def shots(self) -> int:
        """Examples in front of each question."""
        return int(self.inner.config.num_fewshot or 0)

    @property
    def samples(self) -> int:
        """Answers to each question."""
        return self.task.samples if self.protocol == "paper" else int(self.inner.config.repeats)

    @property
    def generates(self) -> bool:
        """Whether the model answers in its own words."""
        return bool(self.inner.OUTPUT_TYPE == "generate_until")

    def in_chat(self, lm: EngineLM, chat: bool) -> bool:
        """Whether items are asked in the model's chat format, given whether the user wants that."""
        return (chat or (self.task.chat and lm.has_template)) and self.generates

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        until = (self.inner.config.generation_kwargs or {}).get("until") or []
        return [until] if isinstance(until, str) else list(until)

    def items(self, lm: EngineLM, wanted: Container[str], *, seed: int, chat: bool) -> list[TaskItem]:
        """The wanted items. An item's examples do not depend on which others are wanted.

        By the paper's protocol they are drawn by seed and item; by the harness's in one sequence over all items, as it
        draws them. With `chat`, a question to be answered is one message of the user, with its examples.
        """
        chat = self.in_chat(lm, chat)
        self.inner.set_fewshot_seed(HARNESS_SEED)
        with _compiled_once():
            return list(self._items(lm, wanted, seed, chat))

    def _items(self, lm: EngineLM, wanted: Container[str], seed: int, chat: bool) -> Iterator[TaskItem]:
        messages: list[dict[str, str]] = []

        def render(dialog: list[dict[str, str]], **options: Any) -> str:
            messages[:] = dialog
            return lm.apply_chat_template(dialog, **options)

        drawn = self.shots > 0 and not isinstance(self.inner.sampler, FirstNSampler)
        for number, (name, doc) in enumerate(zip(self.ids, self.inner.task_docs, strict=True)):
            if name not in wanted and not (drawn and self.protocol == "harness"):
                continue
            if self.protocol == "paper":
                self.inner.set_fewshot_seed(f"{seed} {self.task.name} {name}")
            context = self.inner.fewshot_context(
                doc,
                num_fewshot=self.shots,
                apply_chat_template=chat,
                chat_template=render if chat else None,
                gen_prefix=self.inner.doc_to_prefix(doc),
            )
            if name in wanted:
                instances = self._instances(doc, context, number, chat)
                queries = [self._queries(lm, each, seed) for each in instances]
                refused = next((why for some in queries for q in some if (why := lm.refuse_longer(q))), None)
                prompt = str(instances[0].args[0])
                question = json.dumps(messages) if chat else prompt
                yield TaskItem(name, self.rows[number], prompt, question, instances, queries, refused)

    def _instances(self, doc: Row, context: Any, number: int, chat: bool) -> list[Instance]:
        built = self.inner.construct_requests(
            doc, context, metadata=(self.task.name, number, self.samples), apply_chat_template=chat, chat_template=None
        )
        instances = built if isinstance(built, list) else [built]
        if self._answer_normalised:
            instances += [replace(each, arguments=(ANSWER, each.args[1]), filtered_resps={}) for each in instances]
        return instances

    def _queries(self, lm: EngineLM, instance: Instance, seed: int) -> list[Query]:
        if instance.request_type == "generate_until":
            queries = [lm.generation(*instance.args, sample=i, seed=seed) for i in range(self.samples)]
            return [replace(query, scored=True) for query in queries] if self.task.abstains else [*queries]
        if instance.request_type == "loglikelihood":
            return [lm.likelihood(*instance.args)]
        return [*lm.windows(*instance.args)]

    @property
    def _answer_normalised(self) -> bool:
        return self.protocol == "paper" and self.task.normalisation == "answer"

    def values(
        self,
        items: Sequence[TaskItem],
        store: AnswerStore,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[dict[str, Any] | NotJudgedError]:
        """The values of each item by metric, from the stored answers; or why none of its answers can be judged.

        What executing programs gives is stored too, as a time limit may decide otherwise on another day. `progress` is
        called with the items whose programs were executed, and all whose programs are to be.
        """
        for item in items:
            for instance, queries in zip(item.instances, item.queries, strict=True):
                instance.resps = _responses(instance, [store[query] for query in queries])
        if self.protocol == "paper" and self.generates:
            return self._scored(items, store, progress)
        self.inner._instances = [each for item in items for each in item.instances]
        self.inner.apply_filters()
        with _compiled_once():
            return [self._processed(item) for item in items]

    def _scored(
        self, items: Sequence[TaskItem], store: AnswerStore, progress: Callable[[int, int], None]
    ) -> list[dict[str, Any] | NotJudgedError]:
        """The values of our own scorer; programs are executed on all processors."""
        scorer = _scorer(self.task)

        def score(item: TaskItem) -> dict[str, Any] | NotJudgedError:
            return self._judged(item, scorer)

        if not self.task.executes:
            return [score(item) for item in items]
        names = [_outcome_key(self.task, item) for item in items]
        waiting = {name: item for name, item in zip(names, items, strict=True) if name not in store.found}
        pool = ThreadPoolExecutor(machine.processors())
        try:
            found = pool.map(score, waiting.values())
            for number, (name, values) in enumerate(zip(waiting, found, strict=True), 1):
                store.add(name, cast("dict[str, Any]", values))  # a program is always judged
                progress(number, len(waiting))
        finally:
            pool.shutdown(cancel_futures=True)
        return [store.found[name] for name in names]

    def _judged(self, item: TaskItem, scorer: Callable[[str, Row], dict[str, Any]]) -> dict[str, Any] | NotJudgedError:
        """An item's values over those of its answers that can be judged."""
        found: dict[str, dict[str, Any] | NotJudgedError] = {}
        for text in item.instances[0].resps:
            if text not in found:
                try:
                    found[text] = scorer(text, item.row)
                except NotJudgedError as reason:
                    found[text] = reason
        each = [found[text] for text in item.instances[0].resps]
        values = [value for value in each if not isinstance(value, NotJudgedError)]
        return _over_samples(values, self.task) if values else next(v for v in each if isinstance(v, NotJudgedError))

    def _processed(self, item: TaskItem) -> dict[str, Any]:
        """An item's values as the harness has them, a metric of several filters under `metric,filter`."""
        values: dict[str, Any] = {}
        filters = list(item.instances[0].filtered_resps)
        for name in filters:
            results = [each.filtered_resps[name] for each in item.instances]
            doc = item.instances[0].doc
            choices = len(results) // 2 if self._answer_normalised else len(results)
            found = dict(self.inner.process_results(doc, results[:choices]))
            if self._answer_normalised:
                gains = [after - alone for (after, _), (alone, _) in zip(results, results[choices:], strict=False)]
                found["acc_answer"] = float(gains.index(max(gains)) == self.inner.doc_to_target(doc))
            if self.protocol == "paper" and self.task.scorer:
                found |= _scorer(self.task)([logprob for logprob, _ in results[:choices]], item.row)
            values |= found if len(filters) == 1 else {f"{metric},{name}": value for metric, value in found.items()}
        return values

    def verbalised(self, item: TaskItem) -> str:
        """An item as it is asked, without examples, and with the right one of its choices."""
        doc = item.instances[0].doc
        question = self.inner.doc_to_text(doc)
        if self.generates:
            return str(question)
        holds = isinstance(question, int)  # then the choices hold the question, and this is the right one
        context = self.inner.doc_to_choice(doc) if holds else question
        built = self.inner.construct_requests(
            doc, context, metadata=(self.task.name, 0, 1), apply_chat_template=False, chat_template=None
        )
        if isinstance(built, list):
            gold = question if holds else self.inner.doc_to_target(doc)
            gold = gold[0] if isinstance(gold, list) else gold
            built = built[self.inner.doc_to_choice(doc).index(gold) if isinstance(gold, str) else gold]
        return "".join(map(str, built.args))

    def aggregate(self, metric: str) -> Callable[[list[Any]], float]:
        """How the harness makes a score of a metric's values; `mean` unless it says otherwise."""
        name = metric.partition(",")[0]
        found: Callable[[list[Any]], float] = self.inner.aggregation().get(name, mean)
        return found


def _responses(instance: Instance, stored: Sequence[Mapping[str, Any]]) -> list[Any]:
    if instance.request_type == "generate_until":
        return [answer["text"] for answer in stored]
    if instance.request_type == "loglikelihood":
        return [(answer["logprob"], answer["greedy"]) for answer in stored]
    return [sum(answer["logprob"] for answer in stored)]


def _over_samples(values: Sequence[Mapping[str, Any]], task: EvaluationTask) -> dict[str, Any]:
    """The mean of each metric over several answers to one question, its maxima, and each pass@k. Of one, its values."""
    if len(values) == 1 and not task.pass_at and not task.maxima:
        return dict(values[0])
    found = {name: sum(each[name] for each in values) / len(values) for name in values[0]}
    found |= {f"max_{name}": max(each[name] for each in values) for name in task.maxima}
    correct = sum(each["passed"] for each in values) if task.pass_at else 0
    return found | {f"pass@{k}": metrics.pass_at_k(len(values), int(correct), k) for k in task.pass_at}


def _outcome_key(task: EvaluationTask, item: TaskItem) -> str:
    """A name for what executing an item's answers gives, from all that it depends on."""
    executed = [task.digest, item.id, item.instances[0].resps]
    return sha256(json.dumps(executed).encode()).hexdigest()[:32]


def _scorer(task: EvaluationTask) -> Callable[[Any, Row], dict[str, float]]:
    """The task's scorer, of an answer's text, or of the choices' log-likelihoods."""
    scorer = getattr(metrics, task.scorer, None) or getattr(harm, task.scorer, None)
    if task.scorer.startswith("_") or not callable(scorer):
        raise EvaluationError(
            f"{task.name}: scorer: {task.scorer} is not a function of metrics.py or harm.py; check the task's file"
        )
    return scorer  # type: ignore[no-any-return]  # found by name


def parts(task: EvaluationTask, splits: Splits, protocol: Protocol) -> list[TaskPart]:
    """A task as the harness's own, its rows divided by `task.part`.

    Raises EvaluationError where the harness has no such task, or a part has no examples.
    """
    groups: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    ids: dict[str, list[str]] = defaultdict(list)
    for split, rows in splits.items():
        for row in rows:
            part = str(row[task.part]) if task.part else ""
            some = groups[part].setdefault(split, [])
            if split == task.split:
                ids[part].append(f"{part}/{len(some)}".removeprefix("/"))
            some.append(row)
    index = _index(task) if protocol == "harness" else {}
    found: list[TaskPart] = []
    for part, pool in groups.items():
        if task.split not in pool:
            raise EvaluationError(
                f"{task.name}: {part} has examples and no rows of the split {task.split}; check the files"
            )
        with _quiet():
            inner = _paper(task, pool) if protocol == "paper" else _harness(task, index, part, pool)
        found.append(TaskPart(task, protocol, inner, ids[part], pool[task.split]))
    return found


def _paper(task: EvaluationTask, rows: Mapping[str, list[Row]]) -> ConfigurableTask:
    """The task as our file declares it."""
    shots_split = task.shots_split or task.split
    if task.shots and len(rows.get(shots_split, ())) < task.shots + (shots_split == task.split):
        raise EvaluationError(
            f"{task.name}: needs {task.shots} examples of the split {shots_split}, and there are "
            f"{len(rows.get(shots_split, ()))}; check the files"
        )
    named = {"multiple_choice": ("acc", "acc_norm"), "loglikelihood": ("acc", "perplexity")}
    kinds = named.get(task.output, (task.metric,))
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: _tables(rows),
        "output_type": task.output,
        "test_split": task.split,
        "num_fewshot": task.shots,
        "description": task.description,
        "doc_to_text": task.prompt,
        "doc_to_target": task.target,
        "doc_to_choice": task.choices or None,
        "target_delimiter": task.delimiter,
        "fewshot_delimiter": task.separator,
        "metric_list": [
            {"metric": kind, "aggregation": "perplexity" if kind == "perplexity" else "mean", "higher_is_better": True}
            for kind in kinds
        ],
    }
    if task.shots:
        config["fewshot_split"] = shots_split
        config["fewshot_config"] = {"sampler": "first_n" if task.shots_order == "first" else "default"}
    if task.output == "generate_until":
        config["process_results"] = lambda doc, results: {}  # `values` calls the task's scorer
        config["generation_kwargs"] = {
            "until": task.stops,
            "max_gen_toks": task.max_tokens,
            "do_sample": task.temperature > 0,
            "temperature": task.temperature,
            "top_p": task.top_p,
        }
    return ConfigurableTask(config=config)


def _index(task: EvaluationTask) -> dict[str, Path]:
    """The harness's files in the task's folder, by the names of their tasks."""
    if not task.harness_folder:
        raise EvaluationError(f"{task.name}: the harness does not have this task; use --protocol paper")
    folder = Path(lm_eval.tasks.__file__).parent / task.harness_folder
    index = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).task_index
    return {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path is not None}


def _harness(
    task: EvaluationTask, index: Mapping[str, Path], part: str, rows: Mapping[str, list[Row]]
) -> ConfigurableTask:
    """The task as the harness's own file declares it, over our rows."""
    name = task.harness.replace("{part}", part)
    if name not in index:
        raise EvaluationError(f"{task.name}: the harness does not have a task {name!r} for it; use --protocol paper")
    entry = load_yaml(index[name])
    splits = {each: entry.get(each) for each in ("training_split", "fewshot_split")}
    changes = {each: split if split in rows else None for each, split in splits.items()}
    shots = task.harness_shots if entry.get("num_fewshot") is None else int(entry["num_fewshot"])
    own = (entry.get("fewshot_config") or {}).get("samples")
    if shots and not own and not any(changes.values()):
        changes["fewshot_split"] = task.split  # so that the harness leaves out the item itself
    for unused in ("tag", "group", "task_list", "task_alias", "dataset_path", "dataset_name", "dataset_kwargs"):
        entry.pop(unused, None)
    config = {
        **entry,
        **changes,
        "custom_dataset": lambda **_: _tables(rows),
        "validation_split": None,
        "test_split": task.split,
        "num_fewshot": shots,
    }
    return ConfigurableTask(config=config)


def _tables(rows: Mapping[str, list[Row]]) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(some) for split, some in rows.items()}


@contextmanager
def _compiled_once() -> Iterator[None]:
    """The harness compiles a template anew for each row, which takes longer than a small model; here once."""
    compiled, plain = cache(utils.env.from_string), utils.apply_template
    utils.apply_template = lambda template, doc: compiled(template).render(**doc)
    try:
        yield
    finally:
        utils.apply_template = plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on settings that are ours, and the bars of its library of tables."""
    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
