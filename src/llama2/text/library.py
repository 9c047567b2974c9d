"""A `tokenizer.json` as the tokenizers library understands it: byte-level BPE, or BPE over SentencePiece's pieces.

The library does all that the file says: it normalises, splits, merges, and finds added tokens. This module says
which tokens text must not yield, and reads off its decoder what its pieces represent.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

from llama2 import files
from llama2.ending import section
from llama2.errors import TokenizerError
from llama2.text import splits, tokenizer
from llama2.text.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Ends,
    Flags,
    Mode,
    PrependScheme,
    Tokenizer,
    Vocabulary,
)

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: Put before text that does not begin the prompt, where the file's rules ask whether it does. No text has these.
_BEFORE = "\U0010fffe\U0010ffff\U0010fffe"
#: What SentencePiece decodes an unknown token to.
_UNKNOWN_TEXT = " ⁇ "

_PREFIX = {"type": "Prepend", "prepend": SPACE}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


class LibraryTokenizer(Tokenizer):
    """`library` is the tokenizers library's object, without a post-processor.

    Ids from its vocabulary up to `size` are tokens that are not used. `model` is the SentencePiece `tokenizer.model` of
    the same pieces, if there is one: it has scores, which the library does without.
    """

    def __init__(self, library: Any, size: int, ends: Ends, model: bytes | None = None) -> None:
        self._algorithm = type(library.model).__name__
        self._moved: str | None = None  # an added token that is looked for in text that was changed
        if self._algorithm not in ("BPE", "Unigram"):
            raise TokenizerError(f"its model is {self._algorithm}, which no Llama has; choose another model")
        decoder = json.dumps(state(library.decoder), ensure_ascii=False)
        if '"ByteLevel"' in decoder:
            self.kind = "bpe"
        elif SPACE in decoder:
            self.kind, self._errors = "sentencepiece", tokenizer.register_errors()
        else:
            raise TokenizerError("its decoder is neither byte-level nor of SentencePiece's pieces")
        added = library.get_added_tokens_decoder()
        for token, entry in added.items():
            tokenizer.check_piece(token, entry.content)
        self.unknown = getattr(library.model, "unk_token", None) if self.kind == "sentencepiece" else None
        control = {e.content: token for token, e in added.items() if e.special and e.content != self.unknown}
        user = {e.content: token for token, e in added.items() if not e.special and e.content != self.unknown}
        flags = {e.content: Flags(e.lstrip, e.rstrip, e.single_word) for e in added.values()}
        changing = {text: each for text, each in flags.items() if each != Flags()}
        super().__init__(size, control, user, ends, changing)

        self._library, self._model, self._lock = library, model, Lock()
        self._size = library.get_vocab_size(with_added_tokens=True)
        self._user_ids = frozenset(user.values())
        self._added = {token: e.content for token, e in added.items()}
        if library.normalizer is not None:
            self.normalized = frozenset(e.content for e in added.values() if e.normalized and e.content in control)
            self._moved = next((e.content for e in added.values() if e.normalized and e.content in user), None)
        self._strips = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
        self._falls_back = '"ByteFallback"' in decoder
        self.pre = _known_split(library) if self.kind == "bpe" else None
        self._rules = library.normalizer, library.pre_tokenizer
        self._read_rules()
        if self._asks_for_beginning:
            from tokenizers import AddedToken

            library.add_tokens([AddedToken(_BEFORE, normalized=False)])

    def choose(self, mode: Mode) -> None:
        if mode == "auto":
            return
        self._library.normalizer, self._library.pre_tokenizer = self._rules
        if mode == "legacy":
            make_legacy(self._library)
        self._read_rules()
        self.mode = mode

    def _read_rules(self) -> None:
        """Take from the library how it puts spaces in front."""
        self._asks_for_beginning = '"first"' in json.dumps(state(self._library.pre_tokenizer))
        self.prepend_scheme = _scheme(self._library) or "never"

    def _encode_special(self, text: str) -> list[int]:
        return self._encoded(text, special=True)[0]

    def _encode(self, text: str, *, begins: bool = True) -> list[int]:
        return self._encoded(text, begins=begins)[0]

    def _encode_plain(self, text: str, begins: bool) -> list[int]:
        return self._encode(text, begins=begins)

    def encode_with_ends(self, text: str, *, begins: bool = True) -> tuple[list[int], list[int]]:
        tokenizer.refuse_surrogates(text)
        return self._encoded(text, begins=begins)

    def _encoded(self, text: str, *, begins: bool = True, special: bool = False) -> tuple[list[int], list[int]]:
        """Ids, and where each ends in `text`."""
        if _BEFORE in text:
            raise TokenizerError(
                "text: has U+10FFFE, U+10FFFF and U+10FFFE in a row, which are not characters; remove them"
            )
        before = _BEFORE if self._asks_for_beginning and not begins else ""
        with section, self._lock:
            self._library.encode_special_tokens = not special
            try:
                made = self._library.encode(before + text, add_special_tokens=False)
            except Exception as error:  # the library raises nothing narrower
                raise TokenizerError(f"text: cannot be encoded ({tokenizer.one_line(error)})") from None
        skip = 1 if before else 0
        ids, spans = made.ids[skip:], made.offsets[skip:]
        ends = [end - len(before) for _, end in spans]
        for i, piece in enumerate(made.tokens[skip:-1] if self.kind == "sentencepiece" else ()):
            if piece == SPACE and spans[i][0] == spans[i + 1][0]:  # a space that was put in front
                ends[i] = spans[i][0] - len(before)
        if not special and not self._control_ids.isdisjoint(ids):
            parts = [self._parts.get(token, (token,)) for token in ids]
            ends = [end for some, end in zip(parts, ends, strict=True) for _ in some]
            ids = [token for some in parts for token in some]
        return ids, ends

    @cached_property
    def _parts(self) -> dict[int, tuple[int, ...]]:
        """What text gives in place of a control token that merges would make: the tokens it is merged of, or bytes."""
        made: dict[str, tuple[str, str]] = {}
        for merge in self.json_file()["model"].get("merges", ()):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            made.setdefault(left + right, (left, right))

        def parts(piece: str) -> tuple[int, ...]:
            token = self._library.token_to_id(piece)
            if token is not None and token not in self._control_ids:
                return (token,)
            if piece in made:
                return tuple(part for half in made[piece] for part in parts(half))
            found = (self._library.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode())
            return tuple(token for token in found if token is not None)

        return {token: parts(text) for text, token in self.control.items()}

    def _piece(self, token: int) -> str | None:
        """The text of a token as the file writes it; None where the file names none."""
        piece: str | None = self._library.id_to_token(token) if token < self._size else None
        return piece

    def _bytes(self, token: int) -> bytes:
        piece = self._piece(token)
        if piece is None:
            return b""
        if self._added.get(token, piece) == self.unknown:
            return _UNKNOWN_TEXT.encode()
        if self.kind == "bpe":
            return piece.encode() if token in self._user_ids else tokenizer.byte_level(piece)
        value = _BYTE.fullmatch(piece) if self._falls_back else None
        return bytes.fromhex(value[1]) if value else piece.replace(SPACE, " ").encode()

    def drops_space(self, token: int) -> bool:
        return self._strips and (self._piece(token) or "").startswith(SPACE)

    def model_file(self) -> bytes | None:
        return self._model

    def json_file(self) -> dict[str, Any]:
        """What a `tokenizer.json` says of this vocabulary; a post-processor is the caller's."""
        source: dict[str, Any] = json.loads(self._library.to_str())
        source["added_tokens"] = [entry for entry in source["added_tokens"] if entry["content"] != _BEFORE]
        return source

    def vocabulary(self) -> Vocabulary:
        if self._moved is not None and self.kind == "sentencepiece":
            raise TokenizerError(
                f"its token {files.quote(self._moved)} is normalized, which only a tokenizer.json can say; choose hf"
            )
        if self._algorithm != "BPE":
            raise TokenizerError(f"its model is {self._algorithm}, which only its own files can say; choose hf")
        if self.flags:
            text, flags = next(iter(self.flags.items()))
            name = next(name for name in ("lstrip", "rstrip", "single_word") if getattr(flags, name))
            raise TokenizerError(
                f"its token {files.quote(text)} has {name}, which only a tokenizer.json can say; choose hf"
            )
        pieces, types = self._pieces()
        merges = [m if isinstance(m, str) else " ".join(m) for m in self.json_file()["model"]["merges"]]
        if self.kind == "bpe":
            if self.pre is None:
                raise TokenizerError("it splits text by rules that only its tokenizer.json can say; choose hf")
            return Vocabulary("bpe", pieces, None, types, merges, self.pre, None, "never")
        scheme = _scheme(self._library)
        if scheme is None:
            raise TokenizerError("it changes text by rules that only its tokenizer.json can say; choose hf")
        unk_id = pieces.index(self.unknown) if self.unknown in pieces else None
        return Vocabulary(
            "sentencepiece", pieces, self._scores(pieces, types, merges), types, None, None, unk_id, scheme
        )

    def _pieces(self) -> tuple[list[str], list[int]]:
        """Text and type of every token."""
        pieces, types = [], []
        for token in range(self.vocab_size):
            piece, kind = self._added.get(token, self._piece(token)), NORMAL
            if piece is None or piece == _BEFORE:
                piece, kind = f"[PAD{token}]", UNUSED
            elif piece == self.unknown:
                kind = UNKNOWN
            elif token in self._control_ids:
                kind = CONTROL
            elif token in self._user_ids:
                kind = USER_DEFINED
            elif self._falls_back and _BYTE.fullmatch(piece):
                kind = BYTE
            pieces.append(piece)
            types.append(kind)
        return pieces, types

    def _scores(self, pieces: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> list[float]:
        """Those of the tokenizer.model if it has these pieces, else some in the order of the merges."""
        own = self._of_model
        if own is not None and own.pieces == pieces[: len(own.pieces)]:
            return [*(own.scores or ()), *[0.0] * (len(pieces) - len(own.pieces))]
        return scores(pieces, types, merges)

    @cached_property
    def _of_model(self) -> Vocabulary | None:
        if self._model is None:
            return None
        try:
            return tokenizer.sentencepiece_model("tokenizer.model", self._model).vocabulary()
        except TokenizerError:
            return None


def state(part: Any) -> Any:
    """A part of the library's object as `tokenizer.json` writes it; None for one that is not there."""
    return None if part is None else json.loads(part.__getstate__())


def _scheme(library: Any) -> PrependScheme | None:
    """Which parts of a text get a space in front; None when anything else than spaces changes."""
    normalizer, words = state(library.normalizer), state(library.pre_tokenizer)
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if not words and steps in ([_PREFIX, _SPACES], [_SPACES]):
        return "always" if _PREFIX in steps else "never"
    plain = not steps and words and words["type"] == "Metaspace" and words["replacement"] == SPACE
    if plain and not words["split"] and words["prepend_scheme"] in ("first", "never"):
        scheme: PrependScheme = words["prepend_scheme"]
        return scheme
    return None


def make_legacy(library: Any) -> None:
    """Have a space put before each part of a text, as SentencePiece does it, instead of by Metaspace's rule."""
    from tokenizers import normalizers

    if (state(library.pre_tokenizer) or {}).get("type") == "Metaspace":
        library.pre_tokenizer = None
        library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def _known_split(library: Any) -> str | None:
    """Our name of how text is split into words, if there is one for these rules."""
    normalizer = state(library.normalizer)
    if normalizer and normalizer.get("normalizers") != []:
        return None
    return splits.find(state(library.pre_tokenizer), bool(getattr(library.model, "ignore_merges", False)))


def scores(pieces: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> list[float]:
    """Scores in the order of `merges`. Raises TokenizerError when no scores have that order.

    SentencePiece joins any two pieces whose text together is a piece, the best first, and of equals the leftmost. So
    every way to cut a piece into two must be among the merges, and the merges that make a piece must be neighbours.
    Llama 2's runs of spaces are all equally good; a run grows from the left where the longest left part comes first.
    """
    normal = {text for text, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    cuts = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    cuts = [(left, right) for left, right in cuts if {left, right, left + right} <= normal]  # no control tokens
    runs = [cut for cut in cuts if not "".join(cut).strip(SPACE)]
    equals = {left + right for left, right in runs} if runs == sorted(runs, key=longest_first) else set()
    ranks: dict[str, int] = {}  # of each piece that is made, all equals as a space
    last = ""
    for left, right in cuts:
        piece = SPACE if left + right in equals else left + right
        if piece != last and piece in ranks:
            raise TokenizerError(
                f"merges to {files.quote(piece)} are not neighbours, which scores cannot express; choose hf"
            )
        last = piece
        ranks.setdefault(piece, len(ranks))
    made = Counter(left + right for left, right in cuts)
    for piece in normal:
        count = sum(piece[:i] in normal and piece[i:] in normal for i in range(1, len(piece)))
        if count != made[piece]:
            raise TokenizerError(
                f"{files.quote(piece)} is not made by all {count} merges, which scores cannot express; choose hf"
            )
    places = (ranks.get(SPACE if piece in equals else piece, len(ranks)) for piece in pieces)
    return [-float(place) if kind == NORMAL else 0.0 for place, kind in zip(places, types, strict=True)]


def longest_first(cut: tuple[str, str]) -> tuple[int, int]:
    """The order of the ways to make pieces that are equally good, as transformers has it."""
    return -len(cut[0]), -len(cut[1])


def from_parts(parts: Vocabulary, added: Sequence[int] = (UNKNOWN, CONTROL, USER_DEFINED)) -> Any:
    """The tokenizers library's object of a vocabulary, without a post-processor; `added` types become added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {text: token for token, text in enumerate(parts.pieces)}
    if parts.kind == "bpe":
        pre = str(parts.pre)
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in parts.merges or ())]
        made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splits.ignores_merges(pre)))
        made.pre_tokenizer = splits.pre_tokenizer(pre)
        made.decoder = decoders.ByteLevel()
    else:
        unknown, bytes_ = parts.pieces[parts.unk_id or 0], BYTE in parts.types
        model = models.BPE(vocabulary, _merges(parts), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_)
        made = Tokenizer(model)
        spaced = parts.prepend_scheme != "never"
        if parts.prepend_scheme == "first":
            made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        else:
            prefix = [normalizers.Prepend(SPACE)] if spaced else []
            made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        made.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    made.add_tokens(
        [
            AddedToken(text, special=kind != USER_DEFINED, normalized=False)
            for text, kind in zip(parts.pieces, parts.types, strict=True)
            if kind in added
        ]
    )
    return made


def _merges(parts: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best piece first, as SentencePiece does it without a list."""
    best = dict(zip(parts.pieces, parts.scores or (), strict=True))
    normal = {text for text, kind in zip(parts.pieces, parts.types, strict=True) if kind == NORMAL}
    cuts = [(text[:i], text[i:]) for text in normal for i in range(1, len(text))]
    known = [(left, right) for left, right in cuts if left in normal and right in normal]
    return sorted(known, key=lambda cut: (-best["".join(cut)], *longest_first(cut), cut))
