"""A checkpoint's own chat template: Jinja source to token ids, with limits, and with user text kept what it is.

A template is a program of a stranger, and what it writes is text in which control tokens are recognised. So before
rendering, every place where a message spells a control token is broken by a character that no text has; what the
template then writes is split at its own control tokens, and that character is dropped from the text between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate, chain, islice, pairwise
from typing import Any

from llama2.errors import DialogError, TemplateError
from llama2.text import sandbox
from llama2.text.tokenizer import Tokenizer
from llama2.text.worker import Worker

#: Templates that have been read: sha256 of their source. Any other renders in a process of its own.
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

#: Words of functions' declarations and calls that templates look for; they are no one's text, and stay as they are.
_DECLARING = frozenset(
    {"type", "function", "id", "name", "description", "parameters", "arguments", "properties", "required", "items"}
    | {"enum", "additionalProperties", "anyOf", "object", "array", "string", "number", "integer", "boolean", "null"}
)
_DEEPEST = 64  # levels of a function's declaration or arguments

#: Seconds that an unknown template may take to render; with starting and killing its process, under a second.
SECONDS = 0.6
_LONGEST_SOURCE = 1 << 20

#: How chat formats write roles. What has this shape and is no control token marks roles in ordinary text.
_BRACKETED = re.compile(
    r"\[/?[A-Z][A-Z_]+\]|<</?[A-Z]+>>|<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>|</?s>|</?tools?(?:_[a-z]+)?>"
)
_HEADING = re.compile(r"^#{2,} ?[A-Z]\w*:?|\b[A-Z]{4,}:", re.MULTILINE)
_PROBE = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u"))]


def knows_tools(source: str) -> bool:
    """Whether a template does something with declarations of functions."""
    return re.search(r"\btools\b", source) is not None


def known(source: str) -> str | None:
    """Name of a template that has been read, or None."""
    return KNOWN.get(sha256(source.encode(errors="surrogatepass")).hexdigest())


@lru_cache(maxsize=16)
def role_markers(source: str, tokenizer: Tokenizer, system: bool) -> frozenset[str]:
    """What marks a role or a turn in the template's text without being a control token that can be told from text.

    Looked for in the source, and in what it writes for a small dialog, with a `system` message or without.
    """
    probe = _PROBE if system else _PROBE[1:]
    (texts,) = _run(source, [_job(probe, [(len(probe), True)], _variables(tokenizer))])
    text = "".join(texts or ())
    found = {*_BRACKETED.findall(source), *_BRACKETED.findall(text), *_HEADING.findall(text)}
    return frozenset(found - set(tokenizer.control) | {text for text in tokenizer.control if len(text) == 1})


def written(
    source: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What the template writes for the first message with the prompt for an answer, and for all `messages`.

    The messages and tools are our own. Raises TemplateError.
    """
    variables = {**_variables(tokenizer), "tools": tools}
    (texts,) = _run(source, [_job(messages, [(1, True), (len(messages), False)], variables)])
    return texts or []


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a dialog as the template `source` writes it, and which of them the assistant said.

    The prompt for an answer is added when the last message is the user's or a tool's. What the assistant said begins
    where the prompt for an answer ends, and ends with the end-of-turn token; a second rendering, with marks around the
    answers, tells where. If a template does more with an answer than trim it, or the assistant called tools, that
    cannot be told: then no token of a dialog that ends with a question is marked, and one that ends with the assistant
    is refused.

    A template that nobody has read could cut and join a message's letters to a control token all the same. So it
    renders once more, with the marker around each letter, and must write the same control tokens.

    Raises TemplateError for a template that fails or exceeds its limits, DialogError for a message that it makes a
    control token of.
    """
    for name, value in variables.items():
        if name in RESERVED:
            raise TemplateError(f"template variable {name!r} is the template's own; it cannot be set")
        if not isinstance(value, (str, int, float, type(None))):
            raise TemplateError(f"template variable {name!r} must be text, a number, true, false or null")
    marker, edge = _unused_characters(source, *tokenizer.control, *texts_of([messages, variables, tools]))

    def gently(text: str) -> str:
        return _break_tokens(text, marker, tokenizer)

    def edged(text: str) -> str:
        broken = gently(text)
        core = broken.strip()
        return broken.replace(core, edge + core + edge, 1)

    def everywhere(text: str) -> str:
        return marker + "".join(letter + marker for letter in text)

    def job(
        breaks: Callable[[str], str], prefixes: Sequence[tuple[int, bool]], answer: Callable[[str], str] | None = None
    ) -> dict[str, Any]:
        def message(m: Mapping[str, Any]) -> dict[str, Any]:
            says = answer if answer and m["role"] == "assistant" else breaks
            rest = {name: each_text(value, breaks) for name, value in m.items() if name in ("name", "tool_calls")}
            return {**m, **rest, "content": says(m["content"])}

        given = {**each_text(dict(variables), breaks, keys=False), "tools": each_text(tools, breaks)}
        return _job([message(m) for m in messages], prefixes, _variables(tokenizer) | given)

    asks = messages[-1]["role"] in ("user", "tool")
    calls = any("tool_calls" in m for m in messages)
    whole = [(len(messages), asks)]
    question = [(i, flag) for i, m in enumerate(messages) if m["role"] == "assistant" for flag in (False, True)][:2]
    jobs = [job(gently, whole), job(gently, whole, edged), job(gently, question), job(everywhere, whole)]
    texts, marked, asked, *check = _run(source, jobs[: 3 if known(source) else 4])
    text = "".join(texts or ())
    if any(_control_tokens("".join(again or ()), tokenizer) != _control_tokens(text, tokenizer) for again in check):
        raise DialogError("the chat template turns a message's text into a control token; reword the message")
    parts = marked[0].split(edge) if marked and not calls else []
    if "".join(parts) == text and len(parts) == 1 + 2 * sum(m["role"] == "assistant" for m in messages):
        prompt = asked[1].removeprefix(asked[0]) if asked else ""
        spans = _spans(parts, prompt, tokenizer)
    elif asks:
        spans = []
    elif calls:
        raise TemplateError("what an assistant said that called tools cannot be told; end the dialog with a question")
    else:
        raise TemplateError("the chat template rewrites the assistant's messages, so what it said cannot be told")
    return _encode(text, spans, marker, tokenizer)


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


def said(ids: Sequence[int], text: str, spans: Iterable[tuple[int, int]], tokenizer: Tokenizer) -> list[bool]:
    """Which of `ids`, the tokens of `text`, end within one of `spans`, which are (start, end) in characters of it."""
    sizes = [len(tokenizer.token_bytes(token)) for token in ids]
    added = sum(sizes) - len(text.encode())  # the space that SentencePiece puts in front
    ends = [end - added for end in accumulate(sizes)]
    places = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    return [any(start < end <= stop for start, stop in places) for end in ends]


def _encode(
    text: str, spans: Sequence[tuple[int, int]], marker: str, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for part, token in tokenizer.split(text):
        end = at + len(part)
        here = [(max(start, at) - at, min(stop, end) - at) for start, stop in spans if start < end and at < stop]
        if token is None:
            literal = part.replace(marker, "")
            new = tokenizer.encode(literal)
            places = [(len(part[:a].replace(marker, "")), len(part[:b].replace(marker, ""))) for a, b in here]
            ids += new
            mask += said(new, literal, places, tokenizer)
        else:
            ids.append(token)
            mask.append(bool(here))
        at = end
    return ids, mask


def _spans(parts: Sequence[str], prompt: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Where answers stand in the joined `parts`, of which every second is an answer without what belongs to it.

    White space between the `prompt` for an answer and the answer belongs to it, and so does what follows up to an
    end-of-turn token.
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
                end = turn if token in tokenizer.stop_ids else end
                break
        spans.append((at - lead, end))
        at += len(answer)
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


@lru_cache(maxsize=8)
def _places(tokenizer: Tokenizer) -> tuple[re.Pattern[str], tuple[str, ...], tuple[str, ...]]:
    """What to break in a text: a whole control token in it, the first part of one at its end, the last at its start."""
    tokens = [text for text in tokenizer.control if len(text) > 1]
    whole = "|".join(map(re.escape, tokens)) or "(?!)"
    heads = {text[:i] for text in tokens for i in range(1, len(text))}
    tails = {text[i:] for text in tokens for i in range(1, len(text))}
    return re.compile(f"(?={whole})", re.IGNORECASE), tuple(heads), tuple(tails)  # a template may change the case


def _break_tokens(text: str, marker: str, tokenizer: Tokenizer) -> str:
    """`text` with `marker` within every control token, and at an edge where half of one stands, trimmed or not."""
    whole, heads, tails = _places(tokenizer)
    cuts = {match.start() + 1 for match in whole.finditer(text)}
    cuts |= {end for end in (len(text), len(text.rstrip())) if text.endswith(heads, 0, end)}
    cuts |= {start for start in (0, len(text) - len(text.lstrip())) if text.startswith(tails, start)}
    edges = [0, *sorted(cuts), len(text)]
    return marker.join(text[start:end] for start, end in pairwise(edges)) if cuts else text


def _job(
    messages: Sequence[Mapping[str, Any]], prefixes: Sequence[tuple[int, bool]], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `sandbox.render` besides the source; the limit on its output is 16 times the input, at most 4 MB."""
    size = sum(map(len, texts_of([messages, variables])))
    limit = min(16 * size + (64 << 10), 4 << 20)
    return {"messages": messages, "prefixes": prefixes, "variables": variables, "limit": limit}


def _run(source: str, jobs: Sequence[dict[str, Any]]) -> list[list[str] | None]:
    """What the template writes for each of `jobs`, None where it fails; raises TemplateError if the first one does."""
    if len(source) > _LONGEST_SOURCE:
        raise TemplateError(f"chat template: its {len(source)} characters are more than the limit of {_LONGEST_SOURCE}")
    if known(source):
        results = [sandbox.attempt(source, job) for job in jobs]
    else:
        results = _worker.ask({"source": source, "jobs": jobs}, SECONDS)
    if "error" in results[0]:
        raise TemplateError(f"chat template: {results[0]['error']}")
    return [result.get("texts") for result in results]


def _failure(reason: str) -> TemplateError:
    return TemplateError(f"chat template: {reason}")


_worker = Worker(sandbox.__file__, _failure)
