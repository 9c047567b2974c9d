"""Preference pairs: two answers to one prompt, of which people chose one (paper 3.2.1; spec 6.1).

Four forms are read, from the same kinds of files as dialogs:

- ours and TRL's: `prompt` (text or messages), `chosen` and `rejected` (text or messages), and perhaps `grade`, `safety`
  and `source`;
- TRL's without `prompt`: both sides are whole dialogs;
- Anthropic's: both sides are texts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns;
- OpenAssistant's trees: replies of one message, in an order, become pairs with a grade by the distance of their ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llama2 import files
from llama2.data import compressed, dialog_files
from llama2.errors import DataError, DialogError
from llama2.text.dialog import Dialog, Message

#: How much better the chosen answer is, as annotators grade it; a grade is a place here (spec 6.1).
GRADES = ("negligibly better", "slightly better", "better", "significantly better")
#: Which answers are safe: labels, and what they say of the chosen and of the rejected one.
SAFETY = {"chosen safe": (True, False), "both safe": (True, True), "both unsafe": (False, False)}
Safety = Literal["chosen safe", "both safe", "both unsafe"]
#: The label of pairs that teach the wrong thing, which the paper leaves out.
_UNSAFE_CHOSEN = "rejected safe"

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"prompter": "user", "assistant": "assistant"}  # of OpenAssistant
_MOST_REPLIES = 100  # of one message, in a tree


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A dialog that ends with the user, and two answers, of which the first was chosen."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    grade: int | None = None  # a place in GRADES; None: not graded
    safety: str | None = None  # a key of SAFETY; None: not labelled
    source: str = ""  # the set that it belongs to
    where: str = ""  # FILE:LINE

    def dialog(self, answer: str) -> Dialog:
        """The dialog with one of the answers. Raises DialogError where its messages are out of order."""
        return Dialog([*self.prompt, Message("assistant", answer)])

    @property
    def group(self) -> str:
        """What pairs of one conversation share: the first user message, without its case and spaces."""
        return conversation(message.content for message in self.prompt if message.role == "user")

    @property
    def longer_wins(self) -> float:
        """Whether the chosen answer has more characters, 1 or 0; 0.5 for as many."""
        difference = len(self.chosen) - len(self.rejected)
        return 0.5 if difference == 0 else float(difference > 0)


@dataclass
class PairReport:
    """What was found in files of pairs."""

    forms: Counter[str] = field(default_factory=Counter)  # pairs by the rule that read them
    left_out: Counter[str] = field(default_factory=Counter)  # pairs by the reason
    first: dict[str, str] = field(default_factory=dict)  # the first place of each reason

    def leave_out(self, reason: str, where: str) -> None:
        """Count a pair that is not used."""
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """The report for a person, line by line."""
        read = ", ".join(f"{count:,} pairs read as {form}" for form, count in self.forms.most_common())
        return [read or "no pairs read"] + [
            f"{count:,} left out: {reason}; the first: {self.first[reason]}"
            for reason, count in self.left_out.most_common()
        ]


class UnusableError(DialogError):
    """A pair that is well formed, and teaches nothing; the message is the reason."""


def read(
    paths: Sequence[Path], report: PairReport, *, safety: str | None = None, skip_bad: bool = False
) -> Iterator[PreferencePair]:
    """Pairs of files and folders; `safety` is the label of those that have none.

    `report` counts pairs that teach nothing: an empty answer, equal answers, prompts that differ, roles out of order.
    It also counts an unsafe answer that was chosen over a safe one. Raises DataError for a record that is not a pair;
    with `skip_bad`, `report` counts these too.
    """
    for path in paths:
        for file in dialog_files.find([path]):
            for where, raw in dialog_files.records(file):
                try:
                    record = dialog_files.value(raw)
                    form, pairs = understand(record)
                except UnusableError as error:
                    report.leave_out(str(error), where)
                    continue
                except DialogError as error:
                    if not skip_bad:
                        raise DataError(f"{where}: {error}; data.skip_bad=true leaves such out") from None
                    report.leave_out("not a pair", f"{where}: {error}")
                    continue
                for pair in pairs:
                    try:
                        _check(pair)
                    except UnusableError as error:
                        report.leave_out(str(error), where)
                        continue
                    report.forms[form] += 1
                    yield replace(pair, where=where, source=pair.source or _name(file), safety=pair.safety or safety)


def _name(file: Path) -> str:
    """A file's name without its suffixes of format and compression."""
    return Path(compressed.bare(file.name)).stem


def understand(record: Any) -> tuple[str, list[PreferencePair]]:
    """The name of a record's form, and its pairs.

    Raises DialogError for what is not a pair, and UnusableError for one whose two sides do not go together.
    """
    if not isinstance(record, Mapping):
        raise DialogError("a record has prompt, chosen and rejected")
    if "message_tree_id" in record and isinstance(record.get("prompt"), Mapping):
        return "OpenAssistant's trees", list(_tree(record["prompt"], ()))
    for name in ("chosen", "rejected"):
        if not isinstance(record.get(name), (str, list)):
            raise DialogError(f"{name} must be text or messages, in a record with prompt, chosen and rejected")
    prompt = record.get("prompt", record.get("messages"))
    anthropic = all(isinstance(record[name], str) and _TURN.match(record[name]) for name in ("chosen", "rejected"))
    if prompt is None and not anthropic and isinstance(record["chosen"], str):
        raise DialogError("has no prompt, and chosen is neither messages nor text of '\\n\\nHuman:' turns")
    form = "Anthropic's dialogues" if anthropic else "prompt, chosen and rejected" if prompt else "two dialogs"
    sides = [_side(prompt, record[name], name) for name in ("chosen", "rejected")]
    grade, safety = _grade(record.get("grade")), record.get("safety")
    if safety not in (None, *SAFETY, _UNSAFE_CHOSEN):
        raise DialogError(f"safety {safety!r} is not one of {', '.join(SAFETY)}")
    if safety == _UNSAFE_CHOSEN:
        raise UnusableError("an unsafe answer is chosen over a safe one")
    (before, chosen), (other, rejected) = sides
    if before != other:
        raise UnusableError("the prompts differ")
    source = record.get("source")
    return form, [PreferencePair(before, chosen, rejected, grade, safety, source if isinstance(source, str) else "")]


def _side(prompt: Any, answer: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """The prompt and the answer of one side."""
    if isinstance(answer, str) and _TURN.match(answer):
        whole = _turns(answer)
    elif isinstance(answer, str):
        whole = [*_prompt(prompt), Message("assistant", answer.strip())]
    else:
        messages = _messages(answer, name)
        own = bool(messages) and messages[0].role == "assistant"  # else the side is a whole dialog
        whole = [*(_prompt(prompt) if own else ()), *messages]
    if not whole or whole[-1].role != "assistant":
        raise UnusableError("a side ends without an answer of the assistant")
    return tuple(whole[:-1]), whole[-1].content


def _prompt(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        if _TURN.match(prompt):
            turns = _turns(prompt)
            return turns[:-1] if turns[-1] == Message("assistant", "") else turns
        return [Message("user", prompt.strip())]
    return _messages(prompt, "prompt")


def _messages(messages: Any, name: str) -> list[Message]:
    """Messages of role and content. Raises DialogError."""
    if not isinstance(messages, list):
        raise DialogError(f"{name} must be text or a list of messages")
    found = []
    for i, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DialogError(f"{name}: message {i} must have a role (system, user or assistant) and a text as content")
        found.append(Message(role, content.strip()))
    return found


def _turns(text: str) -> list[Message]:
    """Anthropic's dialogue, which begins with two newlines and who speaks."""
    _, *parts = _TURN.split(text)
    return [Message(_SPEAKERS[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]


def _grade(grade: Any) -> int | None:
    """A grade by its number or its name. Raises DialogError."""
    if grade is None or (type(grade) is int and 0 <= grade < len(GRADES)):
        return grade
    if grade in GRADES:
        return GRADES.index(grade)
    names = ", ".join(f"{number} ({name})" for number, name in enumerate(GRADES))
    raise DialogError(f"grade {grade!r} is out of range; grades are {names}")


def _tree(node: Mapping[str, Any], before: tuple[Message, ...]) -> Iterator[PreferencePair]:
    """Pairs of a message's ranked replies, and of all messages below it. Raises DialogError."""
    role, text = _ROLES.get(str(node.get("role"))), node.get("text")
    replies = node.get("replies", [])
    if role is None or not isinstance(text, str) or not isinstance(replies, list) or len(replies) > _MOST_REPLIES:
        raise DialogError("a message of the tree needs role, text and replies")
    prompt = (*before, Message(role, text.strip()))
    ranked = [
        reply
        for reply in replies
        if isinstance(reply, Mapping) and reply.get("role") == "assistant" and type(reply.get("rank")) is int
    ]
    ranked.sort(key=lambda reply: reply["rank"])
    for better, worse in itertools.combinations(ranked, 2):
        distance = worse["rank"] - better["rank"]
        if distance and isinstance(better.get("text"), str) and isinstance(worse.get("text"), str):
            grade = min(distance, len(GRADES) - 1)
            yield PreferencePair(prompt, better["text"].strip(), worse["text"].strip(), grade)
    for reply in replies:
        if isinstance(reply, Mapping):
            yield from _tree(reply, prompt)


def _check(pair: PreferencePair) -> None:
    """Raise UnusableError for a pair that teaches nothing."""
    if not pair.chosen or not pair.rejected:
        raise UnusableError("an answer is empty")
    if pair.chosen == pair.rejected:
        raise UnusableError("both answers are the same")
    if not pair.prompt or pair.prompt[-1].role != "user":
        raise UnusableError("the prompt does not end with the user")
    try:
        pair.dialog(pair.chosen)
    except DialogError:
        raise UnusableError("roles are out of order, or a message is empty") from None


def hold_out(
    pairs: Iterable[PreferencePair], count: int, *, seed: int = 0
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to train on, and those held out: of each source about `count`, and at most two fifths.

    Conversations are held out whole: no first user message is on both sides, in any source. A key of the seed orders
    them, so the same ones are held out whatever else is read.
    """
    every = list(pairs)
    sizes = Counter(pair.source for pair in every)
    held: set[str] = set()
    taken: Counter[str] = Counter()
    for pair in sorted(every, key=lambda pair: order(seed, pair.group)):
        if taken[pair.source] < min(count, sizes[pair.source] * 2 // 5):
            held.add(pair.group)
            taken[pair.source] += 1
    return [pair for pair in every if pair.group not in held], [pair for pair in every if pair.group in held]


def mix(
    own: Sequence[PreferencePair], other: Sequence[PreferencePair], share: float, *, seed: int = 0
) -> list[PreferencePair]:
    """All of `own`, and as many of `other`, drawn uniformly, as leave `own` that share of the whole (spec 6.4).

    Where `other` has too few, all of it is taken.
    """
    wanted = round(len(own) * (1 - share) / share)
    drawn = sorted(other, key=lambda pair: order(seed, f"{pair.group} {pair.chosen} {pair.rejected}"))
    return [*own, *drawn[:wanted]]


def some(pairs: Sequence[PreferencePair], fraction: float, *, seed: int = 0) -> list[PreferencePair]:
    """A fraction of pairs, at least one; a smaller one is part of a larger."""
    drawn = sorted(pairs, key=lambda pair: order(seed, f"{pair.group} {pair.chosen} {pair.rejected}"))
    return drawn[: max(1, round(len(pairs) * fraction))]


def conversation(user_messages: Iterable[str]) -> str:
    """The first of the user's messages, without its case and spaces; none: an empty text."""
    return " ".join(next(iter(user_messages), "").casefold().split())


def order(seed: int, text: str) -> bytes:
    """A key to sort texts by, at random: the seed chooses the order, and what else is sorted does not change it."""
    return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()


def to_json(pair: PreferencePair, *, margin: float | None = None) -> dict[str, Any]:
    """A pair as TRL's DPO, KTO and reward trainers read it, with its grade and label; `read` reads it back."""
    record: dict[str, Any] = {
        "prompt": [{"role": message.role, "content": message.content} for message in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
    if pair.grade is not None:
        record["grade"] = pair.grade
    optional = {"safety": pair.safety, "source": pair.source or None, "margin": margin}
    return record | {name: value for name, value in optional.items() if value is not None}


def write(pairs: Iterable[PreferencePair], path: Path) -> None:
    """Write pairs as JSON lines of `to_json`; the file appears whole or not at all. Raises DataError."""
    with files.create(path, error=DataError) as file:
        for pair in pairs:
            file.write((json.dumps(to_json(pair), ensure_ascii=False) + "\n").encode())
