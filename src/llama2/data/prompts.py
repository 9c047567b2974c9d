"""Prompts to draw answers to: dialogs that end with the user, each tagged where it may elicit unsafe answers.

A record is `prompt` (text, or messages), `messages`, or any form of a dialog or of a preference pair that training
reads. A last answer is left out. `safety: true` tags a prompt, as does a place among `safety_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.data import comparisons, dialog_files
from llama2.data.comparisons import UnusableError, conversation, order
from llama2.data.dialog_forms import understand
from llama2.errors import DataError, DialogError
from llama2.recipe import Settings
from llama2.text.dialog import Dialog, Message

Messages = Sequence[Mapping[str, str]]


class PromptSettings(Settings):
    """Which prompts."""

    files: list[Path] = Field([], description="files or folders of prompts")
    safety_files: list[Path] = Field([], description="more, whose prompts may all elicit unsafe answers")
    held_out: int = Field(
        0, ge=0, description="prompts left aside to measure with; reward models of the same seed hold them out, too"
    )
    count: int = Field(0, ge=0, description="so many of the others, chosen by `seed`; 0: all")
    skip_bad: bool = Field(False, description="leave out and count bad prompts instead of refusing them")

    @property
    def every_file(self) -> list[Path]:
        """Both lists."""
        return [*self.files, *self.safety_files]


@dataclass(frozen=True, slots=True)
class TaggedPrompt:
    """A dialog that ends with the user; `id` is a digest of its messages."""

    id: str
    messages: tuple[dict[str, str], ...]
    safety: bool  # whether it may elicit unsafe answers (IS_SAFETY of the paper's 3.2.3)
    where: str = ""  # FILE:LINE

    @property
    def group(self) -> str:
        """What prompts of one conversation share (`comparisons.conversation`)."""
        return conversation(message["content"] for message in self.messages if message["role"] == "user")


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
    """Prompts of files, without repetitions and without those held out; with `count`, so many, chosen by the seed.

    They are in the files' order. A prompt that is tagged anywhere is tagged. Raises DataError for a file that cannot be
    read, and for fewer prompts than `count`. A record that is not a prompt is an error, too, unless `skip_bad`.
    """
    prompts, _ = _split(settings, seed, report or PromptReport())
    if not settings.count:
        return prompts
    if settings.count > len(prompts):
        raise DataError(f"prompts.count is {settings.count}, and there are {len(prompts)} prompts; give more files")
    chosen = {prompt.id for prompt in sorted(prompts, key=lambda prompt: order(seed, prompt.id))[: settings.count]}
    return [prompt for prompt in prompts if prompt.id in chosen]


def read_held_out(settings: PromptSettings, seed: int, report: PromptReport | None = None) -> list[TaggedPrompt]:
    """The `settings.held_out` prompts that `read` leaves aside. Raises as it does."""
    return _split(settings, seed, report or PromptReport())[1]


def _split(settings: PromptSettings, seed: int, report: PromptReport) -> tuple[list[TaggedPrompt], list[TaggedPrompt]]:
    """Prompts to use, and those held out, in the order in which pairs are; no conversation has prompts of both."""
    found: dict[str, TaggedPrompt] = {}
    for paths, safety in ((settings.files, False), (settings.safety_files, True)):
        for prompt in _prompts(paths, safety, settings.skip_bad, report):
            before = found.setdefault(prompt.id, prompt)
            report.repeated += before is not prompt
            if prompt.safety and not before.safety:
                found[prompt.id] = prompt
    held = sorted(found.values(), key=lambda prompt: order(seed, prompt.group))[: settings.held_out]
    groups = {prompt.group for prompt in held}
    prompts = [prompt for prompt in found.values() if prompt.group not in groups]
    if not prompts:
        names = ", ".join(map(str, settings.every_file)) or "prompts.files"
        less = ", or hold out fewer" if held else ""
        raise DataError(f"{names}: no prompts are there to use; give files that have some{less}")
    return prompts, held


def _prompts(paths: Sequence[Path], safety: bool, skip_bad: bool, report: PromptReport) -> Iterator[TaggedPrompt]:
    for file in dialog_files.find(paths):
        for where, raw in dialog_files.records(file):
            try:
                record = dialog_files.value(raw)
                yield from (_prompt(dialog, tagged or safety, where) for dialog, tagged in _dialogs(record))
            except UnusableError as error:
                report.leave_out(f"{where}: {error}")
            except DialogError as error:
                reason = f"{where}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason}; prompts.skip_bad=true leaves such out") from None
                report.leave_out(reason)


def _prompt(dialog: Dialog, safety: bool, where: str) -> TaggedPrompt:
    """Raises DialogError for a dialog with tools."""
    if dialog.uses_tools or any(message.role == "tool" for message in dialog.messages):
        raise DialogError("the prompt has calls of tools, which reward models do not read; leave it out")
    messages = dialog.messages[:-1] if dialog.messages[-1].role == "assistant" else dialog.messages
    plain = tuple({"role": message.role, "content": message.content} for message in messages)
    return TaggedPrompt(identify(plain), plain, safety, where)


def _dialogs(record: Any) -> Iterator[tuple[Dialog, bool]]:
    """The dialogs of a record, and whether it tags them. Raises DialogError for one that is not a prompt."""
    if not isinstance(record, Mapping):
        raise DialogError("a record has prompt, or messages, or a dialog's form")
    if "chosen" in record or "message_tree_id" in record:
        for pair in comparisons.understand(record)[1]:
            try:
                yield Dialog(pair.prompt), False
            except DialogError as error:
                raise UnusableError(str(error)) from None
        return
    tagged = record.get("safety")
    if tagged is not None and not isinstance(tagged, bool):
        raise DialogError(f"safety is {tagged!r}, and must be true or false")
    yield _dialog(record), bool(tagged)


def _dialog(record: Mapping[str, Any]) -> Dialog:
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and prompt.strip():
        return Dialog([Message("user", prompt)])
    given = prompt if isinstance(prompt, list) else messages
    if isinstance(given, list):
        return Dialog(given)
    return understand(record)[1].dialog
