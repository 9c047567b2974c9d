"""Prompts to draw answers to: dialogs that end with the user, each tagged where it may elicit unsafe answers.

A record is `prompt` (text, or messages), `messages`, or any form of a dialog that `llama2 sft` reads. A last answer is
left out. `safety: true` tags a prompt, as does a place among `safety_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.data import dialog_files
from llama2.data.dialog_forms import understand
from llama2.data.loader import shuffled
from llama2.errors import DataError, DialogError
from llama2.recipe import Settings
from llama2.text.dialog import Dialog, Message

Messages = Sequence[Mapping[str, str]]


class PromptSettings(Settings):
    """Which prompts."""

    files: list[Path] = Field([], description="files or folders of prompts")
    safety_files: list[Path] = Field([], description="more, whose prompts may all elicit unsafe answers")
    count: int = Field(0, ge=0, description="so many of them, chosen by `seed`; 0: all")
    skip_bad: bool = Field(False, description="leave out and count bad prompts instead of refusing them")


@dataclass(frozen=True, slots=True)
class TaggedPrompt:
    """A dialog that ends with the user; `id` is a digest of its messages."""

    id: str
    messages: tuple[dict[str, str], ...]
    safety: bool  # whether it may elicit unsafe answers (IS_SAFETY of the paper's 3.2.3)
    where: str = ""  # FILE:LINE


@dataclass
class PromptReport:
    """What was left out of files of prompts."""

    repeated: int = 0
    bad: int = 0
    first_bad: str = ""

    def lines(self) -> list[str]:
        """The report for a person, line by line."""
        lines = [f"{self.repeated:,} prompts left out: they repeat others"] if self.repeated else []
        return lines + ([f"{self.bad:,} prompts left out; the first: {self.first_bad}"] if self.bad else [])

    def leave_out(self, reason: str) -> None:
        """Count a bad prompt."""
        self.bad += 1
        self.first_bad = self.first_bad or reason


def identify(messages: Messages) -> str:
    """A digest of a dialog: 32 hexadecimal digits of SHA-256 over roles and contents."""
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(settings: PromptSettings, seed: int, report: PromptReport | None = None) -> list[TaggedPrompt]:
    """Prompts of files, without repetitions; of many, `settings.count`, chosen by the seed, in the files' order.

    A prompt that is tagged anywhere is tagged. Raises DataError for a file that cannot be read, a record that is not a
    prompt (with `skip_bad`, `report` counts it), and fewer prompts than `count`.
    """
    report = report or PromptReport()
    found: dict[str, TaggedPrompt] = {}
    for paths, safety in ((settings.files, False), (settings.safety_files, True)):
        for prompt in _prompts(paths, safety, settings.skip_bad, report):
            before = found.setdefault(prompt.id, prompt)
            report.repeated += before is not prompt
            if prompt.safety and not before.safety:
                found[prompt.id] = prompt
    prompts = [*found.values()]
    names = ", ".join(map(str, (*settings.files, *settings.safety_files)))
    if not prompts:
        raise DataError(f"{names or 'prompts.files'}: no prompts are there; give files that have some")
    if settings.count > len(prompts):
        raise DataError(f"{names}: {len(prompts)} prompts, and prompts.count is {settings.count}; give more files")
    if settings.count:
        chosen = sorted(shuffled(place, len(prompts), key=seed) for place in range(settings.count))
        prompts = [prompts[place] for place in chosen]
    return prompts


def _prompts(paths: Sequence[Path], safety: bool, skip_bad: bool, report: PromptReport) -> Iterator[TaggedPrompt]:
    for file in dialog_files.find(paths):
        for where, raw in dialog_files.records(file):
            try:
                if raw is None:
                    raise DialogError(f"has more than {dialog_files.LONGEST >> 20} MB; cut it")
                yield _prompt(dialog_files.parse(raw) if isinstance(raw, bytes) else raw, safety, where)
            except DialogError as error:
                reason = f"{where}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason}; prompts.skip_bad=true leaves such out") from None
                report.leave_out(reason)


def _prompt(record: Any, safety: bool, where: str) -> TaggedPrompt:
    """Raises DialogError for a record that is not a prompt."""
    if not isinstance(record, Mapping):
        raise DialogError("a record has prompt, or messages, or a dialog's form")
    tagged = record.get("safety")
    if tagged is not None and not isinstance(tagged, bool):
        raise DialogError(f"safety is {tagged!r}, and must be true or false")
    dialog = _dialog(record)
    if dialog.uses_tools or any(message.role == "tool" for message in dialog.messages):
        raise DialogError("the prompt has calls of tools, which reward models do not read; leave it out")
    messages = dialog.messages[:-1] if dialog.messages[-1].role == "assistant" else dialog.messages
    plain = tuple({"role": message.role, "content": message.content} for message in messages)
    return TaggedPrompt(identify(plain), plain, safety or bool(tagged), where)


def _dialog(record: Mapping[str, Any]) -> Dialog:
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and prompt.strip():
        return Dialog([Message("user", prompt)])
    given = prompt if isinstance(prompt, list) else messages
    if isinstance(given, list):
        return Dialog(given)
    return understand(record)[1].dialog
