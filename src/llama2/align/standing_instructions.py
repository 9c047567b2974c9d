"""Instructions that hold for a whole dialog, as Ghost Attention teaches them (paper 3.3): what they say, and checks.

The paper combines hobbies, languages and public figures, and asks people whether the model still knows them. A check of
IFEval (Zhou et al. 2023) decides it without people, so the instructions that are probed are those that have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from llama2.evaluate.instructions import followed
from llama2.recipe import Settings


@dataclass(frozen=True, slots=True)
class StandingInstruction:
    """An instruction in a sentence and in few words, with its checks: names of IFEval's, and their arguments."""

    text: str
    terse: str
    checks: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def is_followed(self, answer: str) -> bool | None:
        """Whether an answer passes every check; None where there is none. Raises EvaluationError without the extra."""
        if not self.checks:
            return None
        row = {"instruction_id_list": [name for name, _ in self.checks], "kwargs": [a for _, a in self.checks]}
        return all(followed(answer, row | {"prompt": self.text}, loose=False))


def _checked(text: str, terse: str, name: str, **arguments: Any) -> StandingInstruction:
    return StandingInstruction(text, terse, ((name, arguments),))


#: Those with a check, by name.
VERIFIABLE: dict[str, StandingInstruction] = {
    "no comma": _checked("Never use a comma.", "Commas: none", "punctuation:no_comma"),
    "quotes": _checked(
        "Put every answer in double quotation marks, from its first to its last character.",
        "Answers: in double quotation marks",
        "startend:quotation",
    ),
    "last words": _checked(
        "End every answer with exactly these words: Take care, friend.",
        "Last words: Take care, friend.",
        "startend:end_checker",
        end_phrase="Take care, friend.",
    ),
    "harbour": _checked(
        'Use the word "harbour" in every answer.', "Word: harbour", "keywords:existence", keywords=["harbour"]
    ),
    "one sentence": _checked(
        "Answer in one sentence.",
        "Length: one sentence",
        "length_constraints:number_sentences",
        num_sentences=2,
        relation="less than",
    ),
    "title": _checked(
        "Begin every answer with a title in double angular brackets, such as <<Tea>>.",
        "Title: <<in double angular brackets>>",
        "detectable_format:title",
    ),
    "postscript": _checked(
        "Add a postscript that begins with P.S. to every answer.",
        "Postscript: P.S.",
        "detectable_content:postscript",
        postscript_marker="P.S.",
    ),
    "capitals": _checked(
        "Write in capital letters only.", "Letters: capital", "change_case:english_capital"
    ),
    "lowercase": _checked(
        "Write in lowercase letters only.", "Letters: lowercase", "change_case:english_lowercase"
    ),
}  # fmt: skip

#: Languages that IFEval's check knows, by their English names.
LANGUAGES = {"Italian": "it", "German": "de", "French": "fr", "Spanish": "es", "Portuguese": "pt"}


class InstructionSettings(Settings):
    """Which instructions. The paper's lists came from the model itself, so that it knows what is on them."""

    hobbies: list[str] = Field([], description='what the model enjoys: "You enjoy NAME."; no check')
    figures: list[str] = Field([], description='whom it acts as: "Act as NAME."; no check')
    languages: list[str] = Field([], description=f"what it speaks: of {', '.join(LANGUAGES)}; checked")
    verifiable: list[str] = Field([*VERIFIABLE], description="others with a check, by name")
    combine: int = Field(2, ge=1, le=4, description="instructions at once, at most, of different kinds")
    terse: float = Field(0.5, ge=0, le=1, description="share of them in few words, as in Figure: Napoleon")

    @model_validator(mode="after")
    def _known(self) -> InstructionSettings:
        for name, given, known in (
            ("verifiable", self.verifiable, VERIFIABLE),
            ("languages", self.languages, LANGUAGES),
        ):
            if wrong := next((each for each in given if each not in known), None):
                raise ValueError(f"{name}: {wrong!r} is unknown; there are {', '.join(known)}")
        if not (self.hobbies or self.figures or self.languages or self.verifiable):
            raise ValueError("needs hobbies, figures, languages or verifiable")
        return self

    def kinds(self) -> list[list[StandingInstruction]]:
        """Instructions of each kind that there are; two of one kind never go together."""
        kinds = [
            [StandingInstruction(f"You enjoy {name}.", f"Hobby: {name}") for name in self.hobbies],
            [StandingInstruction(f"Act as {name}.", f"Figure: {name}") for name in self.figures],
            [
                _checked(
                    f"Speak in {name}.", f"Language: {name}", "language:response_language", language=LANGUAGES[name]
                )
                for name in self.languages
            ],
            [VERIFIABLE[name] for name in self.verifiable],
        ]
        return [kind for kind in kinds if kind]


def combination(settings: InstructionSettings, rng: np.random.Generator) -> StandingInstruction:
    """A random combination of kinds, one instruction of each, in a sentence each or in few words."""
    kinds = settings.kinds()
    count = int(rng.integers(1, min(settings.combine, len(kinds)) + 1))
    chosen = [kinds[i][int(rng.integers(len(kinds[i])))] for i in sorted(rng.permutation(len(kinds))[:count])]
    terse = rng.random() < settings.terse
    text = joined(chosen, terse=False)
    few = joined(chosen, terse=True)
    return StandingInstruction(few if terse else text, few, tuple(check for each in chosen for check in each.checks))


def joined(instructions: Sequence[StandingInstruction], *, terse: bool) -> str:
    """Several instructions as one text."""
    return "; ".join(each.terse for each in instructions) if terse else " ".join(each.text for each in instructions)


#: Where the instruction is: at every user's message, as answers are sampled; once, in a system message or in the first
#: user's; or in none.
Place = Literal["every", "system", "user", "nowhere"]


def placed(instruction: str, users: Sequence[str], answers: Sequence[str], place: Place) -> list[dict[str, str]]:
    """A dialog's messages, with its instruction in a place."""
    messages = [{"role": "system", "content": instruction}] if place == "system" else []
    for turn, user in enumerate(users):
        with_it = place == "every" or (place == "user" and turn == 0)
        messages.append({"role": "user", "content": f"{instruction}\n\n{user}" if with_it else user})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages
