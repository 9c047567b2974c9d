"""A test that a model is put to, declared in one TOML file: its rows, its prompt, its score."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from llama2 import recipe
from llama2.errors import EvaluationError
from llama2.recipe import Settings

FOLDER = Path(__file__).parent / "tasks"

#: The metric of a multiple choice by what its log-likelihoods are divided by, or reduced by.
_CHOICE_METRICS = {"none": "acc", "characters": "acc_norm", "answer": "acc_answer"}


class PromptFormat(Settings):
    """Another way to ask the same rows; what it leaves out is as in the task."""

    prompt: str | None = Field(None, description="Jinja template of the question.")
    choices: str | list[str] | None = Field(None, description="Jinja template of the choices, or the choices.")
    target: str | None = Field(None, description="Jinja template of the answer, or of its index among the choices.")
    delimiter: str | None = Field(None, description="Text between question and answer.")
    description: str | None = Field(None, description="Text before everything, a Jinja template.")
    shots: int | None = Field(None, ge=0, description="Solved examples before the question.")
    normalisation: Literal["none", "characters", "answer"] | None = Field(
        None, description="Log-likelihoods of choices: as they are, a character, or less those after `Answer:`."
    )


class EvaluationTask(Settings):
    """A task. Templates are Jinja, over a row's fields; the harness renders them."""

    name: str = Field(description="The name, which is the file's.")
    title: str = Field(description="The name for people.")
    suite: Literal["academic", "truth", "safety"] = Field(description="The suite that runs it.")
    group: str = Field(description="The column of the paper's table that it belongs to.")
    version: int = Field(1, ge=1, description="Increases with each change that moves a score.")
    source: str = Field(description="Where the rows come from.")
    licence: str = Field(description="Their licence.")
    note: str = Field("", description="What a reader of the score must know.")
    files: dict[str, str] = Field(description="Files below the data folder, with their SHA-256; empty if not known.")
    rows: str = Field(description="The reader of these files, a function of `rows.py`.")
    split: str = Field("test", description="The rows that are asked.")
    output: Literal["multiple_choice", "loglikelihood", "generate_until"] = Field(
        "multiple_choice", description="What is compared: likelihoods of choices, a text's likelihood, an answer."
    )
    shots: int = Field(0, ge=0, description="Solved examples before the question.")
    shots_split: str = Field("", description="Rows that examples come from; the asked ones without the item if empty.")
    shots_order: Literal["random", "first"] = Field("random", description="How examples are chosen.")
    part: str = Field("", description="The field by which rows are divided: examples come from the same part.")
    cluster: str = Field("", description="The field that items with common text share; scores of these depend.")
    stratum: str = Field("", description="The field by which a limit's sample is stratified.")
    by: str = Field("", description="The field by whose values the score is reported too, such as a group of people.")
    groups: list[str] = Field([], description="Values of `by` that the score is of; without one it is another score.")
    description: str = Field("", description="Text before everything.")
    prompt: str = Field(description="The question.")
    choices: str | list[str] = Field("", description="The choices, if any; a template gives a list.")
    target: str = Field(description="The answer, or its index among the choices.")
    delimiter: str = Field(" ", description="Text between question and answer.")
    separator: str = Field("\n\n", description="Text after each example.")
    normalisation: Literal["none", "characters", "answer"] = Field(
        "none", description="Log-likelihoods of choices: as they are, a character, or less those after `Answer:`."
    )
    stops: list[str] = Field([], description="Texts that end an answer.")
    max_tokens: int = Field(256, ge=1, description="Tokens of an answer at most.")
    samples: int = Field(1, ge=1, description="Answers to each question.")
    full_samples: int = Field(0, ge=0, description="Answers to each question with --full; 0 for the same.")
    maxima: list[str] = Field(
        [], description="Values whose largest over the answers to a question is a value too: max_NAME."
    )
    chat: bool = Field(False, description="Asked in the model's chat format where it has one, also without --chat.")
    pass_at: list[int] = Field([], description="The k of pass@k, whose estimator needs as many answers.")
    executes: bool = Field(False, description="Whether answers are programs, executed in a sandbox.")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    scorer: str = Field(
        "", description="The function of `metrics.py` that scores an answer, or likelihoods of choices."
    )
    metric: str = Field("", description="Its value that is the score; without it the normalisation of choices decides.")
    aggregation: Literal["items", "strata"] = Field(
        "items", description="The mean: of all items, or of strata's means."
    )
    abstains: bool = Field(
        False, description="Whether to report how well the model's own probability distinguishes right answers."
    )
    published: str = Field("", description="The paper's column of figures, where it has another name than the task.")
    harness: str = Field("", description="The harness's task, with `{part}` for the part.")
    harness_folder: str = Field("", description="Its folder among the harness's tasks.")
    harness_metric: str = Field("", description="Its metric that is the score.")
    harness_shots: int = Field(0, ge=0, description="Examples, where the harness's own file does not set them.")
    formats: dict[str, PromptFormat] = Field({}, description="Other prompts, over which a score's spread is reported.")
    format: str = Field("", description="The one of `formats` that this is.")

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationTask:
        if self.output == "multiple_choice" and not self.choices:
            raise ValueError("choices: is missing; multiple_choice compares some")
        if self.output == "generate_until" and not (self.scorer and self.metric):
            raise ValueError("scorer, metric: an answer needs both; name a function of metrics.py and its value")
        if self.scorer and not self.metric:
            raise ValueError("metric: is missing; name the scorer's value that is the score")
        if self.normalisation != "none" and self.output != "multiple_choice":
            raise ValueError(f"normalisation: {self.normalisation} is for multiple_choice")
        if self.aggregation == "strata" and not self.stratum:
            raise ValueError("aggregation: strata needs a stratum")
        return self

    @property
    def lacking(self) -> str | None:
        """Why the task cannot be run on this machine, or with so few answers; None if it can."""
        k = max(self.pass_at, default=0)
        if k > self.samples:
            return f"pass@{k} needs {k} answers to a question, not {self.samples}; --full draws {self.full_samples}"
        if self.scorer == "sentiment":
            from llama2.evaluate import harm

            return harm.absent_judge()
        if self.executes:
            from llama2.evaluate import execution

            return execution.available()
        return None

    def full(self) -> EvaluationTask:
        """The same task with as many answers as the paper's estimators need."""
        return self.model_copy(update={"samples": self.full_samples or self.samples})

    @property
    def headline(self) -> str:
        """The metric of the paper's protocol that is the score."""
        if self.output == "multiple_choice" and not self.metric:
            return _CHOICE_METRICS[self.normalisation]
        return self.metric or "acc"

    @property
    def label(self) -> str:
        """The name, with the format's."""
        return f"{self.name}@{self.format}" if self.format else self.name

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all settings: two scores with one digest asked and scored the same way."""
        return sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def with_format(self, name: str) -> EvaluationTask:
        """The same task asked in one of its formats. Raises EvaluationError for a format that it does not have."""
        if name not in self.formats:
            raise EvaluationError(
                f"{self.name}: does not have the format {name}; it has {', '.join(self.formats) or 'none'}"
            )
        changes = {key: value for key, value in self.formats[name].model_dump().items() if value is not None}
        return recipe.make(self.model_dump() | changes | {"format": name}, EvaluationTask, where=self.label)

    def other_formats(self) -> list[EvaluationTask]:
        """The task in each of its formats, for the spread of a likelihood's score; none for a task that generates."""
        if self.format or self.output == "generate_until":
            return []
        return [self.with_format(name) for name in self.formats]


def names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> EvaluationTask:
    """A task by name, or by the path of a TOML file of one's own, and `@FORMAT` behind it.

    Raises EvaluationError for an unknown name, with the nearest. Raises RecipeError for a file that is not a task.
    """
    from difflib import get_close_matches

    plain, _, format = name.partition("@")
    path = Path(plain) if plain.endswith(".toml") else FOLDER / f"{plain}.toml"
    if path.parent == FOLDER and plain not in names():
        near = get_close_matches(plain, names(), n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise EvaluationError(f"{plain}: unknown task; {advice}")
    task = recipe.load(path, EvaluationTask, [f'name="{path.stem}"'])
    return task.with_format(format) if format else task


def suite(name: str) -> list[EvaluationTask]:
    """The tasks of a suite, or of all."""
    return [task for task in map(load, names()) if name in ("all", task.suite)]
