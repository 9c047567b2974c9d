"""Prompts without a chat format: text with control tokens in it, token ids, and the gap of an infill."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from llama2.serve.errors import Refusal
from llama2.serve.service import Service
from llama2.text.tokenizer import Tokenizer

#: The tokens before a prefix, before a suffix, and before the text between them, by family of models.
INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


#: Texts that one request may have judged, and characters of all of them: some seconds of work.
MOST_TEXTS, MOST_CHARACTERS = 256, 200_000


def refuse_long(texts: Sequence[str]) -> None:
    """Raise Refusal for more characters than are judged at once."""
    if (count := sum(map(len, texts))) > MOST_CHARACTERS:
        what = f"input: has {count} characters, and the limit is {MOST_CHARACTERS}; divide it"
        raise Refusal(400, what, param="input", code="invalid_value")


def prompt_tokens(service: Service, prompt: str | list[str | int]) -> list[int]:
    """A prompt's tokens. Control tokens in texts are recognised, and BOS comes first where the model expects it."""
    t = service.model.tokenizer
    if isinstance(prompt, list):
        service.limit.check_count(len(prompt), "tokens and texts")
    parts = prompt if isinstance(prompt, list) else [prompt]
    service.limit.check(*(part for part in parts if isinstance(part, str)))
    tokens: list[int] = []
    for part in parts:
        tokens += t.encode(part, special=True) if isinstance(part, str) else [part]
    if t.add_bos and t.bos_id is not None and isinstance(parts[0], str) and tokens[:1] != [t.bos_id]:
        tokens.insert(0, t.bos_id)
    return tokens or service.model.encode("")


def prompt_text(service: Service, tokens: Sequence[int]) -> str:
    """The text of tokens, control tokens by their names."""
    parts = []
    for control, group in groupby(tokens, lambda token: service.texts.bytes(token) is None):
        run = list(group)
        parts.append("".join(map(service.texts, run)) if control else service.model.tokenizer.decode(run))
    return "".join(parts)


def infill_tokens(service: Service, prefix: str, suffix: str, middle: str = "") -> list[int] | None:
    """The prompt of an infill between two texts, behind `middle`; None if the model has no tokens for it.

    Raises ContextError for texts that cannot fit.
    """
    t = service.model.tokenizer
    markers = infill_markers(t)
    if markers is None:
        return None
    service.limit.check(prefix, suffix, middle)
    ids = [t.bos_id] if t.add_bos and t.bos_id is not None else []
    for marker, text in zip(markers, (prefix, suffix, middle), strict=True):
        ids += [marker, *t.encode(text)]
    return ids


def infill_markers(tokenizer: Tokenizer) -> list[int] | None:
    """The ids of the three tokens of an infill; None if the vocabulary has none."""
    names = tokenizer.control
    return next(([names[name] for name in trio] for trio in INFILL if all(name in names for name in trio)), None)
