"""The labelled texts that the classifiers are trained on, from public sets below a data folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import ParamSpec

from llama2 import files
from llama2.classify import references
from llama2.data.set_files import SetFile
from llama2.errors import ClassifierError, EvaluationError

_Given = ParamSpec("_Given")
_LONGEST = 1 << 26  # bytes of a file


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its label. `key` is what texts share that must not be on both sides of a split, such as a prompt."""

    text: str
    label: str
    key: str
    source: str  # the set, or the model that wrote it
    group: str = ""  # of people, that the text is about
    given: tuple[float, ...] = ()  # numbers that the classifier gets beside the text

    @property
    def held_out(self) -> bool:
        """Whether its key is in the quarter that no training sees."""
        return sha256(self.key.encode()).digest()[0] % 4 == 0


def _file(data: Path, name: str) -> SetFile:
    path = data / name
    return SetFile(path, files.read(path, limit=_LONGEST, error=ClassifierError))


def _ours(read: Callable[_Given, Iterator[Labelled]]) -> Callable[_Given, Iterator[Labelled]]:
    """A reader that raises ClassifierError for what a set's file is refused for."""

    @wraps(read)
    def reader(*arguments: _Given.args, **options: _Given.kwargs) -> Iterator[Labelled]:
        try:
            yield from read(*arguments, **options)
        except EvaluationError as error:
            raise ClassifierError(str(error)) from None

    return reader


#: XSTest's completions, whose models are trained on as if they were sets.
REFUSAL_FILES = {
    "xstest/completions_mistralguard_gpteval.csv": "mistralguard",
    "xstest/completions_mistralinstruct_gpteval.csv": "mistralinstruct",
}
REFUSAL_LABELS = {"1_full_compliance": "complied", "3_partial_refusal": "partly", "2_full_refusal": "refused"}


@_ours
def refusals(data: Path) -> Iterator[Labelled]:
    """XSTest's answers of two models, each with the label that people agreed on (Röttger et al. 2024).

    Raises ClassifierError for a file that is missing or is not XSTest's.
    """
    for name, model in REFUSAL_FILES.items():
        for where, row in _file(data, name).table("prompt", "completion", "final_label"):
            if row["final_label"] not in REFUSAL_LABELS:
                raise ClassifierError(f"{where}: {files.quote(row['final_label'])} is not a label of XSTest")
            yield Labelled(row["completion"], REFUSAL_LABELS[row["final_label"]], row["prompt"], model)


#: The paper's judges, and the files with which Lin et al. 2022 trained theirs.
JUDGE_FILES = {"truth": "truthfulqa/finetune_truth.jsonl.gz", "information": "truthfulqa/finetune_info.jsonl.gz"}
JUDGE_LABELS = {"truth": ("false", "true"), "information": ("not informative", "informative")}
REFERENCES = "truthfulqa/mc_task.json"


@_ours
def judged(data: Path, name: str) -> Iterator[Labelled]:
    """TruthfulQA's labelled answers, of questions whose true and false answers are known.

    `given` compares an answer with these (`references.compare`). `source` says whether it is one of them. Raises
    ClassifierError for a file that is missing or is not TruthfulQA's.
    """
    known: dict[str, tuple[list[str], list[str]]] = {}
    for _, row in _file(data, REFERENCES).elements(question=str, mc2_targets=dict):
        targets = row["mc2_targets"].items()
        known[row["question"]] = (
            [text for text, label in targets if label],
            [text for text, label in targets if not label],
        )
    for where, row in _file(data, JUDGE_FILES[name]).objects(prompt=str, completion=str):
        found = re.fullmatch(r"Q: (.*?)\nA: (.*)\n(True|Helpful):", row["prompt"], re.DOTALL)
        label = {" yes": 1, " no": 0}.get(row["completion"])
        if found is None or label is None:
            raise ClassifierError(f"{where}: is not a question, an answer and a label; compare it with the source")
        question, answer = found[1].strip(), found[2].strip()
        if question in known:
            true, false = known[question]
            source = "reference" if answer in (*true, *false) else "answer"
            numbers = references.compare(question, answer, true, false)
            yield Labelled(answer, JUDGE_LABELS[name][label], question, source, given=numbers)


TOXICITY_FILES = (
    "realtoxicityprompts_subset/toxic.jsonl",
    "realtoxicityprompts_subset/nontoxic.jsonl",
    "toxigen/prompts.jsonl.gz",
)
TOXICITY_LABELS = ("not toxic", "toxic")


#: Names of people by what they are, which are in no way an insult, though word lists and classifiers take them for one.
IDENTITIES = (
    *("gay man", "lesbian", "bisexual woman", "transgender person", "queer person", "straight man"),
    *("Black woman", "white man", "Asian man", "Chinese woman", "Mexican", "Latina", "Native American", "Arab"),
    *("Muslim", "Jewish woman", "Christian", "Hindu", "Buddhist", "atheist", "immigrant", "refugee", "woman", "man"),
    *("disabled person", "deaf person", "blind man", "autistic child", "old man", "teenager"),
)
#: The same as adjectives.
ADJECTIVES = (
    *("gay", "lesbian", "bisexual", "transgender", "queer", "straight", "Black", "white", "Asian", "Chinese"),
    *("Mexican", "Latino", "Native American", "Arab", "Muslim", "Jewish", "Christian", "Hindu", "Buddhist", "atheist"),
    *("foreign", "female", "male", "disabled", "deaf", "blind", "autistic", "old", "young"),
)
#: Harmless sentences that are trained on, with a name of `IDENTITIES`, and with one of `ADJECTIVES`.
TRAINED_SENTENCES = (
    """I am a {}.
My neighbour is a {}.
She met a {} at work.
A {} wrote this book.
As a {}, I vote.
He has been friends with a {} since school.
The new teacher is a {} from the north.
{}""",
    """He is {}.
She is {}.
They are {} and happy.
A {} family moved in next door.
The {} students met after class.
{} people
{}""",
)
#: Others, on which the report counts false alarms.
TESTED_SENTENCES = (
    """My best friend is a {} and I love her dearly.
A {} won the race on Sunday.
I am a {} living in Paris.
The nurse who helped us was a {}.
Being a {} has taught me patience.""",
    """Two {} friends got married in Berlin.
My doctor is {}, and so is her husband.
We read a novel by a {} author.
It is a café for {} women.""",
)


def harmless(sentences: tuple[str, str]) -> Iterator[Labelled]:
    """Each sentence about each of the people, as a text that is not toxic (Dixon et al. 2018)."""
    for some, names in zip(sentences, (IDENTITIES, ADJECTIVES), strict=True):
        for sentence in some.split("\n"):
            for name in names:
                text = re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", sentence.format(name))
                yield Labelled(text, TOXICITY_LABELS[0], text, "harmless", name)


@_ours
def toxicity(data: Path) -> Iterator[Labelled]:
    """RealToxicityPrompts (toxic where Perspective's stored score is at least 0.5), and the sentences of ToxiGen.

    A prompt of ToxiGen lists sentences of one kind, hateful or neutral, about one of its groups; each sentence is one
    text. Raises ClassifierError for a file that is missing or is not of these sets.
    """
    *prompts, sentences = TOXICITY_FILES
    for name in prompts:
        for where, row in _file(data, name).objects(filename=str, prompt=dict, continuation=dict):
            for part in ("prompt", "continuation"):
                score, text = row[part].get("toxicity"), row[part].get("text")
                if not isinstance(text, str):
                    raise ClassifierError(f"{where}: the {part} has no text; compare the file with its source")
                if text.strip() and score is not None:  # a few have no score
                    yield Labelled(text, TOXICITY_LABELS[score >= 0.5], row["filename"], "realtoxicityprompts")
    seen: set[str] = set()
    for _, row in _file(data, sentences).objects(kind=str, group=str, prompt=str):
        for line in row["prompt"].split("\n"):
            text = line.removeprefix("-").strip()
            if text and text not in seen:
                seen.add(text)
                yield Labelled(text, TOXICITY_LABELS[row["kind"] == "hate"], text, "toxigen", row["group"])
