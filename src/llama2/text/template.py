"""A checkpoint's own chat template: Jinja source to token ids, with limits, and with user text kept what it is.

A template is a program of a stranger, and what it writes is text in which control tokens are recognised. So before
rendering, every place where a message spells a control token is broken by a character that no text has. What the
template then writes is split at its own control tokens, and that character is dropped from the text between.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain, islice, pairwise
from typing import Any

from llama2.errors import DialogError, TemplateError
from llama2.text import sandbox
from llama2.text.tokenizer import Tokenizer

#: Templates that were reviewed: sha256 of their source. Any other but ours renders in a process of its own.
KNOWN = {
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "SmolLM2",
    "de9cde7d1b0ca0cc87459a6673e0d12fb89c070bdb24e4a30b6e4d187b226221": "SmolLM2",
    "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e": "ChatML",
    "153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3": "ChatML",
    "e8d5b5a546d3f19df16a5320c614fab05bdc4edd50e850f1afd947b503ea41cf": "Llama 2",
    "9780fae5bfea3cfd7be37d328c6edfd296a8869be8131495bbe7eb37e780c88c": "Llama 2",
    "1623de5159d584da0b6c78f86ae57b2328746122f2c58446ab7f84bce8c7c57f": "Llama 2",
    "17b9854f459dd1e767c9a01a117f61fc1ddf30ca7e5fdd450e4ea20933f7933c": "Llama 2",
    "4f46ecd43418f216df8c26936c60e5d04bcc81db47db5d86fbe889f64212dd4c": "Llama 3",
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "Llama 3",
    "66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362": "Zephyr",
    "ce1ebfc6d5d6f6223732b3e3c3dc2ad6f343f3fa78e636ba74c1bb3f76e04f38": "Zephyr",
}

#: Names that a caller's own variables must not replace.
RESERVED = frozenset(
    {"messages", "bos_token", "eos_token", "add_generation_prompt", "tools", "documents"}
    | {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
    | {"loop", "self", "caller", "varargs", "kwargs"}
)

#: Words of functions' declarations and calls that templates look for: not anyone's text, so not changed.
_DECLARING = frozenset(
    {"type", "function", "id", "name", "description", "parameters", "arguments", "properties", "required", "items"}
    | {"enum", "additionalProperties", "anyOf", "object", "array", "string", "number", "integer", "boolean", "null"}
)
_DEEPEST = 64  # levels of a function's declaration or arguments

#: Seconds that an unknown template may take to render; with starting and killing its process, under a second.
SECONDS = 0.6
_LONGEST_SOURCE = 1 << 20
_MOST_MARKERS = 1 << 10

#: How chat formats write roles. What has this shape and is not a control token marks roles in ordinary text.
_BRACKETED = re.compile(
    r"\[/?[A-Z][A-Z_]+\]|<</?[A-Z]+>>|<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>|</?s>|</?tools?(?:_[a-z]+)?>"
)
_HEADING = re.compile(r"^#{2,} ?[A-Z]\w*:?|\b[A-Z]{4,}:", re.MULTILINE)
_PROBE = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u"))]
_SAID = "said by a probe"


def knows_tools(source: str) -> bool:
    """Whether a template does something with declarations of functions."""
    return re.search(r"\btools\b", source) is not None


def known(source: str) -> str | None:
    """Name of a template that was reviewed, which ours have, or None."""
    name = KNOWN.get(sha256(source.encode(errors="surrogatepass")).hexdigest())
    if name is None:
        from llama2.text import chat_formats

        name = chat_formats.named(source)
    return name


def is_llama2(source: str) -> bool:
    """Whether a template is known to write Llama 2's own format."""
    return known(source) in ("Llama 2", "llama2")


def stops(source: str) -> tuple[str, ...]:
    """Texts that end an answer by a template of ours, besides the tokens that do."""
    name = known(source)
    if name is None or name in KNOWN.values():
        return ()
    from llama2.text import chat_formats

    return chat_formats.STOPS.get(name, ())


def recognise(source: str, tokenizer: Tokenizer) -> str | None:
    """The name of the chat format that a template writes: of one that is known, or of ours that writes the same."""
    from llama2.text import chat_formats

    if name := known(source):
        return name
    bos = _variables(tokenizer)["bos_token"]
    jobs = [_job(p, [(len(p), True)], _variables(tokenizer)) for p in (_PROBE[1:], _PROBE)]

    def texts(source: str) -> list[str | None]:
        return [None if text is None else "".join(text).removeprefix(bos) for text in _run(source, jobs, tokenizer)]

    try:
        wanted = texts(source)
    except TemplateError:
        return None
    ours = (name for name in chat_formats.STOPS if texts(chat_formats.source(name, bos=False)) == wanted)
    return next(ours, None)


def check(source: str) -> None:
    """Raise TemplateError for a template that is too long, or not text that UTF-8 can write."""
    if len(source) > _LONGEST_SOURCE:
        raise TemplateError(f"chat template: its {len(source)} characters are more than the limit of {_LONGEST_SOURCE}")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(source[error.start]):04X}"
        raise TemplateError(
            f"chat template: character {error.start} is a lone surrogate, {surrogate}; remove it, or choose a template"
        ) from None


@lru_cache(maxsize=16)
def role_markers(source: str, tokenizer: Tokenizer, system: bool) -> frozenset[str]:
    """What marks a role or a turn in the template's text, besides the control tokens.

    Looked for in the source, and in what it writes for a small dialog, with a `system` message or without.
    """
    probe = _PROBE if system else _PROBE[1:]
    (texts,) = _run(source, [_job(probe, [(len(probe), True)], _variables(tokenizer))], tokenizer)
    text = "".join(texts or ())
    found = {*_BRACKETED.findall(source), *_BRACKETED.findall(text), *_HEADING.findall(text)}
    markers = found - set(tokenizer.control) | {text for text in tokenizer.control if len(text) == 1}
    if len(markers) > _MOST_MARKERS:
        raise TemplateError(f"chat template: it has {len(markers)} role markers, and the limit is {_MOST_MARKERS}")
    return frozenset(markers)


@lru_cache(maxsize=16)
def ends(source: str, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and the one that the template writes behind an answer."""
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _SAID}]
    try:
        (texts,) = _run(source, [_job(messages, [(len(messages), False)], _variables(tokenizer))], tokenizer)
    except TemplateError:
        return tokenizer.stop_ids
    _, _, after = "".join(texts or ()).rpartition(_SAID)
    token = next((token for part, token in tokenizer.split(after) if token is not None or part.strip()), None)
    return tokenizer.stop_ids if token is None else tokenizer.stop_ids | {token}


def text(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """What the template writes for `messages`, which are our own. Raises TemplateError."""
    job = _job(messages, [(len(messages), False)], {**_variables(tokenizer), "tools": tools})
    (texts,) = _run(source, [job], tokenizer)
    return "".join(texts or ())


def written(
    source: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What the template writes for the first message with the prompt for an answer, and for all `messages`.

    The messages and tools are our own. Raises TemplateError.
    """
    variables = {**_variables(tokenizer), "tools": tools}
    (texts,) = _run(source, [_job(messages, [(1, True), (len(messages), False)], variables)], tokenizer)
    return texts or []


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a dialog as the template `source` writes it, and which of them the assistant said.

    The prompt for an answer is added unless the last message is the assistant's. With `continue_final` that one is cut
    off where its text ends, white space at its end included. What the assistant said begins where the prompt for an
    answer ends, and ends with the end-of-turn token. A second rendering, with edges around the answers, shows where;
    for answers that call tools, renderings of the messages up to each. If the template rewrites answers, that fails.
    Then no token of a dialog that ends with a question is marked. One that ends with the assistant is refused.

    An unknown template could still join a message's letters to a control token. So it renders once more, with the
    marker around each letter, and must write the same control tokens.

    Raises TemplateError for a template that fails or exceeds its limits, DialogError for a message that it makes a
    control token of.
    """
    _check_variables(variables)
    marker, edge = _unused_characters(source, *tokenizer.control, *texts_of([messages, variables, tools]))
    dialog = _Marked(messages, variables, tools, tokenizer, marker, edge)
    prompts = messages[-1]["role"] != "assistant"
    calls = any("tool_calls" in m for m in messages)
    whole = [(len(messages), prompts)]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    question = [(i, flag) for i in answers[:1] for flag in (False, True)]
    resumed = continue_final and not prompts
    jobs = [
        dialog.job(dialog.gently, whole),
        dialog.job(dialog.gently, whole, answers[-1:] if resumed else answers),
        dialog.job(dialog.gently, question),
        dialog.job(dialog.everywhere, whole),
    ]
    texts, marked, prefixes, *check = _run(source, jobs[: 3 if known(source) else 4], tokenizer)
    text = "".join(texts or ())
    if any(_control_tokens("".join(again or ()), tokenizer) != _control_tokens(text, tokenizer) for again in check):
        raise DialogError("the chat template turns a message's text into a control token; reword the message")
    parts = marked[0].split(edge) if marked and (resumed or not calls) else []
    if resumed:
        if "".join(parts) != text or len(parts) != 3:
            raise TemplateError("the chat template rewrites the assistant's message, so it cannot be continued")
        content = messages[-1]["content"]
        return _encode(parts[0] + parts[1] + content[len(content.rstrip()) :], [], marker, tokenizer)
    if "".join(parts) == text and len(parts) == 1 + 2 * len(answers):
        prompt = prefixes[1].removeprefix(prefixes[0]) if prefixes else ""
        spans = _spans(parts, prompt, tokenizer, ends(source, tokenizer), stops(source))
    elif prompts:
        spans = []
    elif not (calls and (spans := _spans_of_calls(source, dialog, answers, text))):
        raise TemplateError("the chat template rewrites the assistant's messages, so its answers cannot be found")
    return _encode(text, spans, marker, tokenizer)


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name, value in variables.items():
        if name in RESERVED:
            raise TemplateError(f"template variable {name!r} is the template's own; it cannot be set")
        if not isinstance(value, (str, int, float, type(None))):
            raise TemplateError(f"template variable {name!r} must be text, a number, true, false or null")


@dataclass(frozen=True, slots=True)
class _Marked:
    """A dialog as a template is given it: with a `marker` in what spells control tokens, an `edge` around answers."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] | None
    tokenizer: Tokenizer
    marker: str
    edge: str

    def gently(self, text: str) -> str:
        """`text` with the marker in every control token."""
        return _break_tokens(text, self.marker, self.tokenizer)

    def everywhere(self, text: str) -> str:
        """`text` with the marker around each letter; an empty one remains empty, since a template may check that."""
        return text and self.marker + "".join(letter + self.marker for letter in text)

    def job(
        self, breaks: Callable[[str], str], prefixes: Sequence[tuple[int, bool]], edged: Container[int] = ()
    ) -> dict[str, Any]:
        """The job of writing `prefixes` of the dialog, its texts changed by `breaks`, those of some messages edged."""

        def message(i: int, m: Mapping[str, Any]) -> dict[str, Any]:
            says = self._edged if i in edged else breaks
            rest = {name: each_text(value, breaks) for name, value in m.items() if name in ("name", "tool_calls")}
            return {**m, **rest, "content": m["content"] and says(m["content"])}

        given = {**each_text(dict(self.variables), breaks, keys=False), "tools": each_text(self.tools, breaks)}
        messages = [message(i, m) for i, m in enumerate(self.messages)]
        return _job(messages, prefixes, _variables(self.tokenizer) | given)

    def _edged(self, text: str) -> str:
        broken = self.gently(text)
        core = broken.strip()
        return broken.replace(core, self.edge + core + self.edge, 1)


def each_text(value: Any, change: Callable[[str], str], *, keys: bool = True, deep: int = _DEEPEST) -> Any:
    """`value`, which JSON can hold, with every text in it changed, keys too.

    Numbers and words that declare functions stay. Raises DialogError when it is too deep.
    """
    if deep < 0:
        raise DialogError(f"a function's declaration or arguments have more than {_DEEPEST} levels; make them flatter")
    if isinstance(value, str):
        return value if value in _DECLARING or value.isdigit() else change(value)  # an id of a call has its length
    if isinstance(value, Mapping):
        return {
            each_text(name, change) if keys else name: each_text(item, change, deep=deep - 1)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [each_text(item, change, deep=deep - 1) for item in value]
    return value


def texts_of(value: Any) -> list[str]:
    """Every text in `value`, keys too. Raises DialogError as `each_text` does."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    each_text(value, note, deep=_DEEPEST + 4)
    return found


def said(ends: Iterable[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens, that cover a text up to `ends`, end within one of `spans`, which are (start, end) in it."""
    return [any(start < end <= stop for start, stop in spans) for end in ends]


def _encode(
    text: str, spans: Sequence[tuple[int, int]], marker: str, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for part, token in tokenizer.split(text):
        end = at + len(part)
        inside = [(max(start, at) - at, min(stop, end) - at) for start, stop in spans if start < end and at < stop]
        if token is None:
            literal = part.replace(marker, "")
            new, ends = tokenizer.encode_with_ends(literal, begins=at == 0)
            places = [(len(part[:a].replace(marker, "")), len(part[:b].replace(marker, ""))) for a, b in inside]
            ids += new
            mask += said(ends, places)
        else:
            ids.append(token)
            mask.append(bool(inside))
        at = end
    return ids, mask


def _spans(
    parts: Sequence[str], prompt: str, tokenizer: Tokenizer, ends: frozenset[int], stops: Sequence[str]
) -> list[tuple[int, int]]:
    """Where answers are in the joined `parts`, of which every second is an answer without what belongs to it.

    White space between the `prompt` for an answer and the answer belongs to it. So does what follows up to a token of
    `ends`, or a text of `stops` that comes next.
    """
    spans = []
    at = 0
    for before, answer, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        at += len(before)
        lead = len(before) - len(before.rstrip())
        while lead and prompt and not before[: len(before) - lead].endswith(prompt):
            lead -= 1
        end = at + len(answer)
        turn = end
        for part, token in tokenizer.split(after):
            turn += len(part)
            if token is not None:
                end = turn if token in ends else end
                break
        if stop := next((stop for stop in stops if after.lstrip().startswith(stop)), ""):
            end = at + len(answer) + after.index(stop) + len(stop)
        spans.append((at - lead, end))
        at += len(answer)
    return spans


def _spans_of_calls(source: str, dialog: _Marked, answers: Iterable[int], text: str) -> list[tuple[int, int]]:
    """Where answers are in `text`, by what the template writes up to the prompt for each, and up to its end.

    An answer ends with its end-of-turn token. There are none where the template writes something else than `text`.
    """
    prefixes = [prefix for i in answers for prefix in ((i, True), (i + 1, False))]
    (written,) = _run(source, [dialog.job(dialog.gently, prefixes)], dialog.tokenizer)
    spans = []
    for before, through in zip(*[iter(written or ())] * 2, strict=True):
        if not (through.startswith(before) and text.startswith(through)):
            return []
        end = len(before)
        for part, token in dialog.tokenizer.split(through[len(before) :]):
            end += len(part)
            if token in ends(source, dialog.tokenizer):
                break
        spans.append((len(before), end))
    return spans


def _variables(tokenizer: Tokenizer) -> dict[str, Any]:
    texts = {token: text for text, token in tokenizer.control.items()}
    bos, eos = ("" if token is None else texts.get(token, "") for token in (tokenizer.bos_id, tokenizer.eos_id))
    return {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}


def _control_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    return [token for _, token in tokenizer.split(text) if token is not None]


def _unused_characters(*texts: str) -> tuple[str, str]:
    used = set().union(*texts)
    private = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    unused = [*islice((chr(code) for code in private if chr(code) not in used), 2)]
    if len(unused) < 2:
        raise DialogError("the messages use every private character of Unicode; remove some")
    return unused[0], unused[1]


class _Spellings:
    """Where a text spells a control token, whatever the case of its letters, or half of one at an edge."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._tokens = sorted(text for text in texts if len(text) > 1)
        self._backwards = sorted(text[::-1] for text in self._tokens)
        self._folded: list[str] = []  # sorted, without those that begin with another
        for text in sorted(map(_fold, self._tokens)):
            if not self._folded or not text.startswith(self._folded[-1]):
                self._folded.append(text)
        self._longest = max(map(len, self._tokens), default=0)
        firsts = {letter for text in self._tokens for letter in (text[0], _fold(text[0]))}
        self._first = re.compile(f"[{re.escape(''.join(sorted(firsts)))}]" if firsts else "(?!)", re.IGNORECASE)

    def starts(self, text: str) -> Iterator[int]:
        """Where a token begins in `text`.

        None of the sorted texts begins another. So the only candidate at a place is the last one that does not sort
        behind the text there. The time does not depend on how many there are.
        """
        folded = _fold(text) if self._first.search(text) else ""
        for match in self._first.finditer(text) if folded else ():
            at = match.start()
            i = bisect_right(self._folded, folded[at : at + self._longest])
            if i and folded.startswith(self._folded[i - 1], at):
                yield at

    def halves(self, text: str) -> Iterator[int]:
        """The edges of `text`, trimmed or not, where a token could begin before it or end behind it."""
        for end in (len(text), len(text.rstrip())):
            if _ends_as_one_begins(text[max(0, end - self._longest) : end], self._tokens):
                yield end
        for start in (0, len(text) - len(text.lstrip())):
            if _ends_as_one_begins(text[start : start + self._longest][::-1], self._backwards):
                yield start


@lru_cache(maxsize=8)
def _spellings(tokenizer: Tokenizer) -> _Spellings:
    return _Spellings(tokenizer.control)


def _fold(text: str) -> str:
    """`text` in one case, as long as it was: what `re.IGNORECASE` holds for equal, and what a template may change."""
    return text.lower() if text.isascii() else "".join(letter.lower().upper().lower()[0] for letter in text)


def _break_tokens(text: str, marker: str, tokenizer: Tokenizer) -> str:
    """`text` with `marker` within every control token, and at an edge with half of one, trimmed or not."""
    spelled = _spellings(tokenizer)
    cuts = {at + 1 for at in spelled.starts(text)} | {*spelled.halves(text)}
    edges = [0, *sorted(cuts), len(text)]
    return marker.join(text[start:end] for start, end in pairwise(edges)) if cuts else text


def _ends_as_one_begins(text: str, tokens: Sequence[str]) -> bool:
    """Whether an end of `text` is a beginning of one of the sorted `tokens`."""
    for size in range(1, len(text) + 1):
        at = bisect_left(tokens, text[-size:])
        if at < len(tokens) and tokens[at].startswith(text[-size:]):
            return True
    return False


def _job(
    messages: Sequence[Mapping[str, Any]], prefixes: Sequence[tuple[int, bool]], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `sandbox.render` besides the source; the limit on its output is 16 times the input, at most 4 MB."""
    size = sum(map(len, texts_of([messages, variables])))
    limit = min(16 * size + (64 << 10), 4 << 20)
    return {"messages": messages, "prefixes": prefixes, "variables": variables, "limit": limit}


def _run(source: str, jobs: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[list[str] | None]:
    """What the template writes for each of `jobs`, None where it fails; raises TemplateError if the first one does.

    A template that goes through `tools` without asking whether there are any fails where there are none, as it does in
    transformers. It is then given an empty list.
    """
    check(source)
    results = _attempt(source, jobs, tokenizer)
    if "NoneType" in results[0].get("error", "") and jobs[0]["variables"].get("tools") is None and knows_tools(source):
        given = [{**job, "variables": {**job["variables"], "tools": []}} for job in jobs]
        empty = _attempt(source, given, tokenizer)
        results = results if "error" in empty[0] else empty
    if "error" in results[0]:
        raise TemplateError(f"chat template: {results[0]['error']}")
    return [result.get("texts") for result in results]


def _attempt(source: str, jobs: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Texts or error of each job, an unknown template's by the tokenizer's process. Raises TemplateError when it takes
    too long.
    """
    if known(source):
        return [sandbox.attempt(source, job) for job in jobs]
    results: list[dict[str, Any]] = tokenizer.sandbox.ask({"source": source, "jobs": jobs}, SECONDS)
    return results
