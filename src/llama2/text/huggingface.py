"""Hugging Face's tokenizer files ⇄ Tokenizer.

`tokenizer.model` is a SentencePiece model. `tokenizer.json` is what the tokenizers library reads: byte-level BPE, or a
SentencePiece vocabulary whose scores became an order of merges. `tokenizer_config.json` beside them tells which tokens
begin and end a text, and which were added after training.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2.errors import TokenizerError
from llama2.text import tokenizer
from llama2.text.tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

_MAX_BYTES = 1 << 26  # of a file; Llama 3's tokenizer.json has 2^24
_MAX_ADDED = 1 << 16  # rows of embeddings beyond a vocabulary
_SPACE = "▁"

Tokens = dict[int, tuple[str, int]]  # text and type of each token, by its id


def read(folder: Path, *, size: int | None = None, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer of a folder: of its `tokenizer.model`, else of its `tokenizer.json`. Raises TokenizerError.

    A model with `size` rows of embeddings has no added tokens beyond them, and rows beyond the vocabulary are tokens
    that are not used. `bos_id` and `eos_id` count where the folder's tokenizer files name none.
    """
    settings = _object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = folder / "tokenizer.model"
    source = model if model.exists() else folder / "tokenizer.json"
    try:
        if source == model:
            return _from_model(source, settings, size, bos_id, eos_id)
        return _from_json(source, settings, size, bos_id, eos_id)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{source}: it, or a file beside it, is malformed: {tokenizer.one_line(error)}") from None


def _from_model(
    path: Path, settings: Mapping[str, Any], size: int | None, bos_id: int | None, eos_id: int | None
) -> Tokenizer:
    plain = tokenizer.from_sentencepiece(path)
    added = _added(path.parent, settings)
    size = max([plain.vocab_size, *(token + 1 for token in added)]) if size is None else size
    rest = _rest(path, plain.vocab_size, size)
    tokens = _unused(rest) | {token: entry for token, entry in added.items() if token in rest}
    ids = plain.control | {text: token for token, (text, _) in tokens.items()}
    bos = ids.get(_content(settings.get("bos_token")), bos_id if plain.bos_id is None else plain.bos_id)
    options = {
        "bos_id": bos,
        "eos_id": ids.get(_content(settings.get("eos_token")), eos_id if plain.eos_id is None else plain.eos_id),
        "add_bos": bos is not None and bool(settings.get("add_bos_token", True)),
        "add_eos": bool(settings.get("add_eos_token", False)),
    }
    if not rest and all(getattr(plain, name) == value for name, value in options.items()):
        return plain
    return tokenizer.from_sentencepiece(path, [tokens[token] for token in rest], **options)


def _from_json(
    path: Path, settings: Mapping[str, Any], size: int | None, bos_id: int | None, eos_id: int | None
) -> Tokenizer:
    source = _object(path)
    model = source["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"{path}: only byte-level BPE and SentencePiece vocabularies are supported")
    rules = [source.get("normalizer"), source.get("pre_tokenizer")]
    sentencepiece = _SPACE in json.dumps(rules, ensure_ascii=False)
    unknown = model.get("unk_token") or _content(settings.get("unk_token"))
    tokens = _tokens(path, source, settings, size)
    if sentencepiece:
        for token, (text, _) in tokens.items():
            if text == unknown:
                tokens[token] = text, UNKNOWN
            elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                tokens[token] = text, BYTE
    pieces, types = zip(*(tokens[i] for i in range(len(tokens))), strict=True)
    ids = {text: token for token, (text, _) in tokens.items()}
    bos = ids.get(_content(settings.get("bos_token")), bos_id)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    common: dict[str, Any] = {
        "pieces": pieces,
        "types": types,
        "bos_id": bos,
        "eos_id": ids.get(_content(settings.get("eos_token")), eos_id),
        "add_bos": bos is not None and _adds("bos_token", source, settings),
        "add_eos": _adds("eos_token", source, settings),
    }
    if sentencepiece:
        return tokenizer.from_vocabulary(
            "sentencepiece",
            scores=_scores(path, pieces, types, merges),
            merges=None,
            pre=None,
            unk_id=ids.get(unknown),
            add_space_prefix=_adds_space(path, source),
            **common,
        )
    scheme = _comparable(source["pre_tokenizer"])
    pre = next((name for name in PRE_TOKENIZERS.values() if _scheme(name) == scheme), None)
    if source.get("normalizer") or pre is None:
        raise TokenizerError(
            f"{path}: only byte-level BPE with pre-tokenizer {', '.join(PRE_TOKENIZERS)} is supported; "
            "if the model has a tokenizer.model, use that"
        )
    return tokenizer.from_vocabulary(
        "bpe", scores=None, merges=merges, pre=pre, unk_id=None, add_space_prefix=False, **common
    )


def _tokens(path: Path, source: Mapping[str, Any], settings: Mapping[str, Any], size: int | None) -> Tokens:
    """Every token of a `tokenizer.json`, by ids from 0 on without a gap."""
    vocabulary: Mapping[str, int] = source["model"]["vocab"]
    added = _added(path.parent, settings) | _listed({entry["id"]: entry for entry in source.get("added_tokens", ())})
    tokens: Tokens = {token: (text, NORMAL) for text, token in vocabulary.items()}
    tokens |= {token: entry for token, entry in added.items() if size is None or token < size}
    if size is not None:
        tokens |= _unused(token for token in _rest(path, len(vocabulary), size) if token not in tokens)
    if sorted(tokens) != list(range(len(tokens))):
        raise TokenizerError(f"{path}: the ids of its {len(tokens)} tokens are not 0 to {len(tokens) - 1}")
    return tokens


def _added(folder: Path, settings: Mapping[str, Any]) -> Tokens:
    """Tokens that were added after training, by `tokenizer_config.json`, or the older `added_tokens.json`."""
    if listed := settings.get("added_tokens_decoder"):
        return _listed({int(token): entry for token, entry in listed.items()})
    older = folder / "added_tokens.json"
    named = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")]
    special = {_content(token) for token in [*named, *settings.get("additional_special_tokens", ())]}
    texts = _object(older) if older.exists() else {}
    return _listed({token: {"content": text, "special": text in special} for text, token in texts.items()})


def _listed(entries: Mapping[int, Mapping[str, Any]]) -> Tokens:
    return {
        token: (entry["content"], CONTROL if entry.get("special") else USER_DEFINED) for token, entry in entries.items()
    }


def _rest(path: Path, tokens: int, size: int) -> range:
    """The ids from the end of a vocabulary's own `tokens` to that of the embeddings."""
    if not 0 <= size - tokens <= _MAX_ADDED:
        raise TokenizerError(f"{path}: has {tokens} tokens, and the model {size} rows of embeddings")
    return range(tokens, size)


def _unused(ids: Iterable[int]) -> Tokens:
    return {token: (f"[PAD{token}]", UNUSED) for token in ids}


def _scores(path: Path, pieces: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> list[float]:
    """Scores in the order of `merges`. Raises TokenizerError when no scores have that order.

    SentencePiece joins any two pieces whose text together is a piece, the best first, and of equals the leftmost. So
    every way to cut a piece into two must be among the merges, and the merges that make a piece must stand together.
    Llama 2's runs of spaces are all equally good; a run grows from the left where the longest left part comes first.
    """
    normal = {text for text, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    cuts = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    cuts = [(left, right) for left, right in cuts if {left, right, left + right} <= normal]  # no control tokens
    runs = [cut for cut in cuts if not "".join(cut).strip(_SPACE)]
    equals = {left + right for left, right in runs} if runs == sorted(runs, key=_longest_first) else set()
    ranks: dict[str, int] = {}  # of each piece that is made, all equals as a space
    last = ""
    for left, right in cuts:
        piece = _SPACE if left + right in equals else left + right
        if piece != last and piece in ranks:
            raise TokenizerError(f"{path}: merges to {piece!r} do not stand together; a tokenizer.model is needed")
        last = piece
        ranks.setdefault(piece, len(ranks))
    made = Counter(left + right for left, right in cuts)
    for piece in normal:
        count = sum(piece[:i] in normal and piece[i:] in normal for i in range(1, len(piece)))
        if count != made[piece]:
            raise TokenizerError(f"{path}: {piece!r} is not made by all {count} merges; a tokenizer.model is needed")
    places = (ranks.get(_SPACE if piece in equals else piece, len(ranks)) for piece in pieces)
    return [-float(place) if kind == NORMAL else 0.0 for place, kind in zip(places, types, strict=True)]


def _longest_first(cut: tuple[str, str]) -> tuple[int, int]:
    """The order of the ways to make pieces that are equally good, as transformers has it."""
    return -len(cut[0]), -len(cut[1])


def _adds_space(path: Path, source: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises TokenizerError when anything else than spaces would change.

    Metaspace, as transformers 5 writes it, puts none before a space or behind a control token. Llama 2 was trained with
    SentencePiece, which does (spec 2.3), and so it is here.
    """
    normalizer = source.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    prefix, words = {"type": "Prepend", "prepend": _SPACE}, source.get("pre_tokenizer") or {}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not words and steps in ([prefix, spaces], [spaces]):
        return prefix in steps
    if (
        not steps
        and words.get("type") == "Metaspace"
        and words.get("replacement") == _SPACE
        and words.get("split") is False
    ):
        return bool(words["prepend_scheme"] != "never")
    raise TokenizerError(f"{path}: changes texts in a way that is not supported; a tokenizer.model is needed")


def files(source: Tokenizer, template: str | None) -> dict[str, bytes]:
    """Files with which transformers has the same tokens, by name.

    Raises TokenizerError as `vocabulary` does, and for a user-defined piece with a space, which they cannot say.
    """
    parts = source.vocabulary()
    for text, kind in zip(parts.pieces, parts.types, strict=True):
        if kind == USER_DEFINED and _SPACE in text and parts.kind == "sentencepiece":
            raise TokenizerError(f"the user-defined token {text!r} has a space, and transformers finds none with one")
    texts = dict(enumerate(parts.pieces))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as tokenizer.json says, with no rules of its own
        "clean_up_tokenization_spaces": False,
        "add_bos_token": source.add_bos,
        "add_eos_token": source.add_eos,
    }
    ends = {"bos_token": source.bos_id, "eos_token": source.eos_id, "unk_token": parts.unk_id}
    settings |= {name: texts[token] for name, token in ends.items() if token is not None}
    if template is not None:
        settings["chat_template"] = template
    made = {
        "tokenizer.json": _library(source, parts).to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    model = source.model_file()
    return made if model is None else {"tokenizer.model": model, **made}


def _library(source: Tokenizer, parts: tokenizer.Vocabulary) -> Any:
    """The tokenizers library's own of these parts."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Library

    vocabulary = {text: token for token, text in enumerate(parts.pieces)}
    if parts.kind == "bpe":
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in parts.merges or ())]
        made = Library(models.BPE(vocabulary, merges, ignore_merges=parts.pre == "llama-bpe"))
        made.pre_tokenizer = tokenizer.pre_tokenizer(str(parts.pre))
        made.decoder = decoders.ByteLevel()
    else:
        unknown, bytes_ = parts.pieces[parts.unk_id or 0], BYTE in parts.types
        made = Library(models.BPE(vocabulary, _merges(parts), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_))
        prefix = [normalizers.Prepend(_SPACE)] if parts.add_space_prefix else []
        made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if parts.add_space_prefix else []
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        made.decoder = decoders.Sequence(steps)
    for text, kind in zip(parts.pieces, parts.types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            special = kind != USER_DEFINED
            made.add_tokens([AddedToken(text, special=special, normalized=False)])
    begin = [source.bos_id] if source.add_bos and source.bos_id is not None else []
    end = [source.eos_id] if source.add_eos and source.eos_id is not None else []
    if begin or end:
        ends = [(parts.pieces[token], token) for token in dict.fromkeys([*begin, *end])]
        one = [*(parts.pieces[token] for token in begin), "$A", *(parts.pieces[token] for token in end)]
        two = [part.replace("$A", "$B:1") for part in one]
        made.post_processor = processors.TemplateProcessing(single=one, pair=[*one, *two], special_tokens=ends)
    return made


def _merges(parts: tokenizer.Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best piece first, as SentencePiece does it without a list."""
    scores = dict(zip(parts.pieces, parts.scores or (), strict=True))
    normal = {text for text, kind in zip(parts.pieces, parts.types, strict=True) if kind == NORMAL}
    cuts = [(text[:i], text[i:]) for text in normal for i in range(1, len(text))]
    known = [(left, right) for left, right in cuts if left in normal and right in normal]
    return sorted(known, key=lambda cut: (-scores["".join(cut)], *_longest_first(cut), cut))


def _object(path: Path) -> dict[str, Any]:
    text = tokenizer.read(path)
    if len(text) > _MAX_BYTES:
        raise TokenizerError(f"{path}: has {len(text)} bytes, and the limit is {_MAX_BYTES}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: is not JSON ({tokenizer.one_line(error)})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: is not a JSON object")
    return value


def _scheme(name: str) -> Any:
    """A pre-tokenizer as `tokenizer.json` writes it."""
    return _comparable(json.loads(tokenizer.pre_tokenizer(name).__getstate__()))


def _comparable(scheme: Any) -> Any:
    """Without what does not change the ids, and with the defaults filled in."""
    if isinstance(scheme, list):
        return [_comparable(part) for part in scheme]
    if not isinstance(scheme, dict):
        return scheme
    defaults = {"use_regex": True} if scheme.get("type") == "ByteLevel" else {}
    return defaults | {key: _comparable(value) for key, value in scheme.items() if key != "trim_offsets"}


def _adds(name: str, source: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a text gets BOS in front, or EOS behind: by the settings, else by a step of the post-processor."""
    if f"add_{name}" in settings:
        return bool(settings[f"add_{name}"])
    whole = source.get("post_processor") or {}
    place = slice(1) if name == "bos_token" else slice(-1, None)
    parts = [part for step in whole.get("processors", [whole]) for part in step.get("single", ())[place]]
    return any("SpecialToken" in part for part in parts)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
