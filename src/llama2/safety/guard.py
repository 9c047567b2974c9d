"""Llama Guard as the judge: 1, 2 and 3, whose architecture is Llama's (Inan et al. 2023; spec 8.10).

The prompt is what the checkpoint's own chat template writes. The score is the probability of "unsafe" against "safe" at
the answer's first token. Categories come from the answer's second line, by the names that the prompt gives to codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2 import api
from llama2.api import Model
from llama2.engine.answer import collect
from llama2.engine.request import Request, Sampling
from llama2.engine.runtime import Runtime
from llama2.errors import CheckpointError, SafetyError
from llama2.safety.categories import ours_of
from llama2.safety.judges import Dialog, Scores
from llama2.text import template as templates
from llama2.text.dialog import Dialog as ChatDialog

#: Tokens of an answer at most: white space, "unsafe", and a line of codes.
_LONGEST = 48
#: Below this probability of "unsafe", no categories are asked for.
_FLOOR = 0.05
_GREEDY = Sampling(temperature=0)
#: Lines such as "S1: Violent Crimes." in the part of the prompt that lists the categories.
_LISTED = re.compile(r"^\s*([A-Z]\d{1,3}):?\s+([^\n]+?)\.?\s*$", re.MULTILINE)
_LIST = re.compile(r"<BEGIN UNSAFE CONTENT CATEGORIES>(.*?)<END UNSAFE CONTENT CATEGORIES>", re.DOTALL)
_CODE = re.compile(r"[A-Z]\d{1,3}")
#: What ends the conversation in a guard's prompt. A message that has it would end it early.
_EDGE = re.compile(r"<(?=(?:BEGIN|END) [A-Z])")


class Guard:
    """A Llama Guard that judges in our engine."""

    windowed = False

    def __init__(self, model: Model, name: str) -> None:
        """Raises SafetyError for a model whose template is missing, or writes no list of categories."""
        self.name = name
        self._model = model
        template = model.checkpoint.template
        if template is None:
            raise SafetyError(
                f"{name}: has no chat template, which a guard's prompt comes from; give a folder with its "
                "tokenizer_config.json or chat_template.jinja"
            )
        self._template = template
        prompt = templates.text(template, [{"role": "user", "content": "Hello."}], model.tokenizer)
        listed = _LIST.search(prompt)
        self.codes = dict(_LISTED.findall(listed[1])) if listed else {}
        if not self.codes:
            raise SafetyError(f"{name}: its chat template lists no unsafe content categories; is it a Llama Guard?")
        self.judges = frozenset(ours for label in self.codes.values() for ours in ours_of(label)) | {"other"}

    def close(self) -> None:
        """Release the model."""
        self._model.close()

    def prompt(self, dialog: Dialog) -> list[int]:
        """Token ids of the prompt for the last message, as the checkpoint's template writes it."""
        turns = ChatDialog(_turns(dialog), strict=False)
        return turns.render(self._model.tokenizer, self._template, neutralise=True)[0]

    def judge(self, dialog: Dialog, start: int = 0) -> Scores:
        """The probability of "unsafe" for each category that the guard names, 0 for those that it does not name.

        The whole dialog is judged, whatever `start` is. Where it does not fit the context, nothing is judged.
        """
        prompt = self.prompt(dialog)
        room = self._model.engine.context - len(prompt)
        if room < _LONGEST:
            return Scores(reason=f"the dialog has {len(prompt)} tokens, more than the guard's context holds")
        said, space = self._answer(prompt)
        unsafe = self._score([*prompt, *space])
        if unsafe < _FLOOR:
            return Scores(dict.fromkeys(self.judges, 0.0))
        if not said.lstrip().startswith("unsafe"):  # what would it have said?
            said = "unsafe" + self._answer([*prompt, *space, *self._tokens["unsafe"]])[0]
        codes = tuple(_CODE.findall(said.lstrip().partition("\n")[2].partition("\n")[0]))
        named = {ours for code in codes for ours in ours_of(self.codes.get(code, code))} or {"other"}
        return Scores({name: unsafe if name in named else 0.0 for name in self.judges | named}, codes=codes)

    @cached_property
    def _tokens(self) -> dict[str, list[int]]:
        """The tokens of both first words."""
        return {word: self._model.tokenizer.encode(word) for word in ("safe", "unsafe")}

    def _answer(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        """The likeliest answer, and the tokens of white space that it begins with."""
        stop_tokens = templates.ends(self._template, self._model.tokenizer)
        request = Request(tuple(prompt), _LONGEST, _GREEDY, stop_tokens=stop_tokens, raw_completion=True)
        (answer,) = collect(self._model.engine.run(request), [request])
        space = []
        for token in answer.token_ids:
            if self._model.tokenizer.decode([token]).strip() or token in stop_tokens:
                break
            space.append(token)
        return answer.text, space

    def _score(self, prompt: Sequence[int]) -> float:
        """The probability of "unsafe" against "safe" as the next token."""
        words = tuple((self._tokens[word][0],) for word in ("safe", "unsafe"))
        if words[0] == words[1]:
            raise SafetyError(f'{self.name}: "safe" and "unsafe" begin with one token, so they cannot be compared')
        request = Request(tuple(prompt), 0, continuations=words)
        (answer,) = collect(self._model.engine.run(request), [request])
        safe, unsafe = (each[0].logprob for each in answer.continuation_logprobs or ())
        return 1 / (1 + math.exp(min(700.0, safe - unsafe)))


def _turns(dialog: Dialog) -> list[dict[str, Any]]:
    """A dialog as guards know it: user and assistant in turn, the user first, without what the deployer says.

    A tool's message is the user's. What would end the conversation in the prompt is broken by a space.
    """
    turns: list[dict[str, Any]] = []
    for message in dialog:
        if message["role"] == "system" or not message.get("content"):
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        text = _EDGE.sub("< ", message["content"])
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        elif turns or role == "user":
            turns.append({"role": role, "content": text})
        else:  # an answer to nothing
            turns += [{"role": "user", "content": "…"}, {"role": role, "content": text}]
    return turns


def load(name: str, runtime: Runtime | None = None) -> Guard:
    """Open a guard by name or path. Raises as `api.load`, and SafetyError for a guard of another architecture."""
    try:
        return Guard(api.load(name, runtime), Path(name).name)
    except CheckpointError as error:
        for sign, other in (("gemma", "ShieldGemma has Gemma's"), ("llama4", "Llama Guard 4 has Llama 4's")):
            if sign in str(error).lower():
                raise SafetyError(
                    f"{name}: {other} architecture, which this engine does not run; use Llama Guard 1, 2 or 3"
                ) from None
        raise
