"""One Tokenizer over SentencePiece models and byte-level BPE (paper 2.2, spec 2.1–2.2).

The libraries sentencepiece and tokenizers do the work, but for byte-level merges (bpe.py). A vocabulary comes from a
SentencePiece `tokenizer.model`, a GGUF file's metadata, or a `tokenizer.json` (library.py and tokenizer_folder.py).

Text is cut at added tokens first. What lies between is encoded alone, and may get a space in front (`PrependScheme`).
"""

from __future__ import annotations

import codecs
import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.ending import section
from llama2.errors import TemplateError, TokenizerError
from llama2.text import bpe, modelproto, sandbox, splits
from llama2.text.splits import PRE_TOKENIZERS
from llama2.text.worker import Worker

#: What represents a space in SentencePiece's pieces.
SPACE = "▁"

#: Token types as SentencePiece and GGUF number them.
TYPES = frozenset(range(1, 7))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Tokens that end an answer besides EOS, where a vocabulary has them as control tokens.
END_OF_TURN = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<|EOT|>", "<EOT>", "▁<EOT>", "[EOT]", "<end_of_utterance>"),
)

#: User-defined tokens of this shape mark roles and turns, so they are control tokens whatever their file says.
_ROLE = r"<[|｜][^|｜]+[|｜]>|<(start|end)_of_turn>|</?s>"

#: Byte-level BPE works on texts of about this many characters, and refuses a single word longer than the limit.
_CHUNK, _LONGEST_WORD = 1 << 16, 1 << 20
#: It remembers the tokens of so many words of up to so many bytes.
_REMEMBERED, _REMEMBERED_LENGTH = 1 << 14, 64

#: Characters of the longest token that a vocabulary may have; the longest known one has 512.
MAX_PIECE = 1024

#: A vocabulary that was checked, as arrays that a file can hold.
Arrays = Mapping[str, NDArray[np.uint8]]

#: Which parts of a text, cut at its added tokens, get a space in front. "always": each one, as SentencePiece's dummy
#: prefix does it. "first": the one that begins the text, if it has no space already, as Metaspace does it.
PrependScheme = Literal["always", "first", "never"]

#: How the space in front is chosen. "file": as the file says it. "legacy": before each part. "auto": the one that the
#: model was trained with, as far as the file says it.
Mode = Literal["auto", "file", "legacy"]


class Flags(NamedTuple):
    """What an added token takes of the text beside it, by the names of the tokenizers library."""

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokens:
    """Finds tokens in a text, from left to right, at each place the longest, as the tokenizers library does."""

    def __init__(self, tokens: Mapping[str, int], flags: Mapping[str, Flags]) -> None:
        self._tokens, self._flags = tokens, flags
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else r"(?!)")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """`text` in parts: what lies between tokens with None, and tokens, with the spaces that they take, as ids."""
        at = end = 0
        while match := self._first.search(text, at):
            start = match.start()
            found = (text[start : start + size] for size in self._lengths[match[0]])
            token = next((piece for piece in found if piece in self._tokens), None)
            if token is None:
                at = start + 1
                continue
            at = stop = start + len(token)
            flags = self._flags.get(token)
            if flags:
                if flags.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                    continue
                while flags.lstrip and start > end and _is_space(text[start - 1]):
                    start -= 1
                while flags.rstrip and stop < len(text) and _is_space(text[stop]):
                    stop += 1
                at = stop
            if start > end:
                yield text[end:start], None
            yield text[start:stop], self._tokens[token]
            end = stop
        if end < len(text):
            yield text[end:], None


def _template_failure(reason: str) -> TemplateError:
    return TemplateError(f"chat template: {reason}")


def refuse_surrogates(text: str) -> None:
    """Raise TokenizerError for half of a surrogate pair, which is not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(f"text: character {error.start} is a lone surrogate, {surrogate}; remove it") from None


def _continues(letter: str) -> bool:
    """Whether a word can continue with this character behind a letter."""
    if letter.isalpha():
        return True
    import unicodedata

    return unicodedata.category(letter)[0] == "M"


def _is_word(letter: str) -> bool:
    return re.fullmatch(r"\w", letter) is not None


def _is_space(letter: str) -> bool:
    return letter.isspace() and not "\x1c" <= letter <= "\x1f"  # which Unicode does not call white space


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens that begin and end a text, and whether a raw prompt gets them; `eot_id` ends an answer too."""

    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    eot_id: int | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer is made of besides its `Ends`: the arguments of `from_scores` and `from_merges`."""

    kind: Literal["sentencepiece", "bpe"]
    pieces: list[str]
    scores: list[float] | None
    types: list[int]
    merges: list[str] | None
    pre: str | None
    unk_id: int | None
    prepend_scheme: PrependScheme


class Tokenizer(ABC):
    """Text ⇄ token ids. Text never yields a control token unless `special=True`, which only templates use."""

    kind: Literal["sentencepiece", "bpe"]
    pre: str | None = None  # name of the byte-level pre-tokenizer
    prepend_scheme: PrependScheme = "never"
    mode = "file"  # which rule puts spaces in front, and why, for people
    normalized: frozenset[str] = frozenset()  # control tokens that are looked for in text that was changed
    notes: tuple[str, ...] = ()  # what a person should know of how the vocabulary was read
    _errors = "replace"  # how broken UTF-8 decodes, as the kind's library does it

    def __init__(
        self,
        vocab_size: int,
        control: dict[str, int],
        user: Mapping[str, int],
        ends: Ends,
        flags: Mapping[str, Flags] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.control = control  # control tokens by their text
        self.user = user  # added tokens that text yields, by their text
        self.flags = flags or {}
        self.bos_id = ends.bos_id
        self.eos_id = ends.eos_id
        self.add_bos = ends.add_bos  # whether a raw prompt starts with BOS
        self.add_eos = ends.add_eos
        stops = {ends.eos_id, ends.eot_id, *(control.get(text) for text in END_OF_TURN)}
        self.stop_ids = frozenset(token for token in stops if token is not None)  # EOS and every end-of-turn token
        self._control_ids = frozenset(control.values())
        self._known_bytes: dict[int, bytes] = {}  # of tokens that were looked up

    @cached_property
    def sandbox(self) -> Worker:
        """The process in which unknown chat templates render for this tokenizer's model. It starts when one does."""
        return Worker(sandbox.__file__, _template_failure)

    def close(self) -> None:
        """End that process, if it runs. It starts again when it is needed."""
        if "sandbox" in self.__dict__:
            self.sandbox.close()

    @cached_property
    def _control_tokens(self) -> AddedTokens:
        return AddedTokens(self.control, self.flags)

    @cached_property
    def _special_tokens(self) -> AddedTokens:
        return AddedTokens({**self.control, **self._unknown()}, self.flags)

    def _unknown(self) -> dict[str, int]:
        """The token for what has none, by its text, if there is one."""
        return {}

    @cached_property
    def _user_tokens(self) -> AddedTokens:
        return AddedTokens(self.user, self.flags)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`. With `special`, control tokens in it are recognised, and so is the unknown token. What
        is between them is encoded alone.

        Raises TokenizerError for a lone surrogate, and for BOS or EOS where the vocabulary has none.
        """
        refuse_surrogates(text)
        ids = [self._required(self.bos_id, "BOS")] if bos else []
        with section:
            ids += self._encode_special(text) if special else self._encode(text)
        if eos:
            ids.append(self._required(self.eos_id, "EOS"))
        return ids

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for part, token in self._special_tokens.split(text):
            ids += self._encode(part, begins=at == 0) if token is None else [token]
            at += len(part)
        return ids

    def _encode(self, text: str, *, begins: bool = True) -> list[int]:
        ids: list[int] = []
        at = 0
        for part, token in self._user_tokens.split(text):
            ids += self._encode_plain(part, begins and at == 0) if token is None else [token]
            at += len(part)
        return ids

    def encode_with_ends(self, text: str, *, begins: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and how many characters of it are covered up to the end of each token.

        A token that ends within a character covers it. `begins`: whether nothing is before the text. Raises
        TokenizerError as `encode` does.
        """
        refuse_surrogates(text)
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        for part, token in self._user_tokens.split(text):
            if token is None:
                with section:
                    some = self._encode_plain(part, begins and start == 0)
                spaced = part.replace(SPACE, " ") if self.kind == "sentencepiece" else part  # the same to its tokens
                limits = [*accumulate(len(letter.encode()) for letter in spaced)]  # of characters, in bytes
                sizes = [*accumulate(len(self.token_bytes(each)) for each in some)]
                covered = [size - (sizes[-1] - limits[-1]) for size in sizes]  # without the space in front
                ids += some
                ends += [start + (min(bisect_left(limits, size) + 1, len(part)) if size > 0 else 0) for size in covered]
            else:
                ids.append(token)
                ends.append(start + len(part))
            start += len(part)
        return ids, ends

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """`text` in parts: literal text with None, and control tokens with their ids."""
        return self._control_tokens.split(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens give nothing, broken UTF-8 gives U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token represents in the middle of a text; empty for a control token."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        found = self._known_bytes.get(token)
        if found is None:
            with section:
                found = self._known_bytes[token] = b"" if token in self._control_ids else self._bytes(int(token))
        return found

    def stream(self) -> TokenStream:
        """A fresh incremental detokeniser."""
        return TokenStream(self)

    def drops_space(self, token: int) -> bool:
        """Whether `token` loses its leading space as the first of a text, because encoding put that space there."""
        return False

    def model_file(self) -> bytes | None:
        """The SentencePiece `tokenizer.model` of this vocabulary; None for byte-level BPE."""
        return None

    @abstractmethod
    def choose(self, mode: Mode) -> None:
        """Put spaces in front by this rule from now on; byte-level vocabularies put none."""

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The parts of this tokenizer, for writing it. Raises TokenizerError for rules that no format but its own has.

        Roles' markers are control tokens in them, whatever the file said.
        """

    @abstractmethod
    def _encode_plain(self, text: str, begins: bool) -> list[int]:
        """Ids of text without lone surrogates, in which no added token is looked for."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """Bytes of a token that is in the vocabulary and not a control token; none for one that is not used."""

    @staticmethod
    def _required(token: int | None, name: str) -> int:
        if token is None:
            raise TokenizerError(f"this vocabulary has no {name} token")
        return token


class TokenStream:
    """Token by token to text; never emits half a character. The pieces joined equal `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        self._at_start = True

    def push(self, token: int) -> str:
        """The text that became certain with `token`. Raises TokenizerError for an id outside the vocabulary."""
        data = self._tokenizer.token_bytes(token)
        if data and self._at_start:
            self._at_start = False
            data = data[self._tokenizer.drops_space(token) :]
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end of the answer, broken bytes as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _SentencePiece(Tokenizer):
    """`model` has user-defined pieces as `_for_library` gives them; `types` are the tokens' own."""

    kind = "sentencepiece"

    def __init__(
        self, model: bytes, types: NDArray[np.uint8], ends: Ends, prepend_scheme: PrependScheme | None = None
    ) -> None:
        self._errors = register_errors()
        self._model, self._types = _processor(model), types
        self._proto = model
        size: int = self._model.get_piece_size()
        if size != len(types):
            raise TokenizerError(f"the vocabulary has {size} pieces and {len(types)} types")
        control, user = (
            {self._model.id_to_piece(token): token for token in np.flatnonzero(types == kind).tolist()}
            for kind in (CONTROL, USER_DEFINED)
        )
        super().__init__(size, control, user, ends)
        self._adds_space = self._model.normalize("a").startswith(SPACE)
        own: PrependScheme = "always" if self._adds_space else "never"
        self.prepend_scheme = self._own_scheme = own if prepend_scheme is None else prepend_scheme

    def choose(self, mode: Mode) -> None:
        if mode != "auto":
            self.prepend_scheme = "always" if mode == "legacy" else self._own_scheme
            self.mode = mode

    @cached_property
    def _bare(self) -> Any:
        """The model that puts no space in front."""
        return _processor(self._proto + modelproto.dummy_prefix(False)) if self._adds_space else self._model

    @cached_property
    def _prefixed(self) -> Any:
        """The model that puts a space in front."""
        return self._model if self._adds_space else _processor(self._proto + modelproto.dummy_prefix(True))

    def _encode_plain(self, text: str, begins: bool) -> list[int]:
        spaced = self.prepend_scheme == "always" or (
            self.prepend_scheme == "first" and begins and not text.startswith((" ", SPACE))
        )
        ids: list[int] = (self._prefixed if spaced else self._bare).encode(text)
        return ids

    def _bytes(self, token: int) -> bytes:
        piece: str = self._model.id_to_piece(token)
        if self._types[token] == BYTE:
            return bytes([int(piece[3:5], 16)])
        if self._types[token] == UNUSED:
            return b""
        if self._types[token] == UNKNOWN:
            piece = self._model.decode([token])
        return piece.replace(SPACE, " ").encode()

    def _unknown(self) -> dict[str, int]:
        return {self._model.id_to_piece(token): token for token in np.flatnonzero(self._types == UNKNOWN).tolist()}

    def has_piece(self, text: str) -> bool:
        """Whether the vocabulary has a token of this text."""
        return bool(self._model.id_to_piece(self._model.piece_to_id(text)) == text)

    def is_unknown(self, text: str) -> bool:
        """Whether this text is that of the token for what has none."""
        return self.has_piece(text) and bool(self._types[self._model.piece_to_id(text)] == UNKNOWN)

    def model_file(self) -> bytes:
        types = self._types.tolist()
        return modelproto.retype(self._proto, lambda token, *_: types[token])[0]

    def vocabulary(self) -> Vocabulary:
        try:
            model = modelproto.read(self.model_file())
        except (ValueError, KeyError, IndexError) as error:  # in parts that the library does not need
            raise TokenizerError(f"its SentencePiece model is damaged ({one_line(error)}); fetch it again") from None
        if not model.plain:
            raise TokenizerError(
                "its SentencePiece model is not BPE, or changes texts, which only a tokenizer.model can say"
            )
        pieces, scores, types = map(list, zip(*model.pieces, strict=True))
        return Vocabulary("sentencepiece", pieces, scores, types, None, None, model.unk_id, self.prepend_scheme)

    def drops_space(self, token: int) -> bool:
        return self.prepend_scheme != "never" and self._model.id_to_piece(token).startswith(SPACE)


def _processor(model: bytes) -> Any:
    """The library's object of a model. Raises TokenizerError when it takes no such model."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise TokenizerError(f"the SentencePiece vocabulary is damaged: {one_line(error)}") from None


class _ByteLevelBpe(Tokenizer):
    kind = "bpe"

    def __init__(self, arrays: Arrays, pre: str, ends: Ends) -> None:
        self._merges = bpe.Merges(arrays)
        control, user = (
            {self._merges.piece(token): token for token in np.flatnonzero(arrays["types"] == kind).tolist()}
            for kind in (CONTROL, USER_DEFINED)
        )
        super().__init__(len(self._merges), control, user, ends)
        self.pre = pre
        self._types = arrays["types"]
        self._user_ids = frozenset(user.values())
        self._split_words = splits.pre_tokenizer(pre).pre_tokenize_str
        self._remembered = lru_cache(_REMEMBERED)(self._tokens)

    def choose(self, mode: Mode) -> None:
        pass

    def vocabulary(self) -> Vocabulary:
        pieces = list(map(self._merges.piece, range(self.vocab_size)))
        return Vocabulary("bpe", pieces, None, self._types.tolist(), self._merges.texts(), self.pre, None, "never")

    def _encode_plain(self, text: str, begins: bool) -> list[int]:
        """As the tokenizers library does it, bytes that the vocabulary has no token for are left out."""
        ids: list[int] = []
        for start, end in pairwise(_cuts(text)):
            for word, _ in self._split_words(text[start:end]):
                ids += (self._remembered if len(word) <= _REMEMBERED_LENGTH else self._tokens)(word)
        return ids

    def _tokens(self, word: str) -> tuple[int, ...]:
        whole = self._merges.find(word) if splits.ignores_merges(str(self.pre)) else None
        return self._merges.merge(word) if whole is None else (whole,)

    def _bytes(self, token: int) -> bytes:
        if self._types[token] == UNUSED:
            return b""
        piece = self._merges.piece(token)
        return piece.encode() if token in self._user_ids else byte_level(piece)


def byte_level(piece: str) -> bytes:
    """The bytes that a byte-level piece represents."""
    return b"".join(bpe.BYTES.get(letter) or letter.encode() for letter in piece)


def from_sentencepiece(
    path: str | Path, added: Sequence[tuple[str, int]] = (), prepend_scheme: PrependScheme | None = None, **ends: Any
) -> Tokenizer:
    """The tokenizer of a SentencePiece `tokenizer.model`. Raises TokenizerError when it is truncated or damaged.

    `added` tokens, each a text and its type, follow those of the file. `prepend_scheme` and `ends`, fields of `Ends`,
    are given where they differ from what the file says.
    """
    return sentencepiece_model(path, read(path), added, prepend_scheme, **ends)


def is_sentencepiece(data: bytes) -> bool:
    """Whether a file begins as a SentencePiece model does: with a piece, as protobuf writes it."""
    return data[:1] == b"\x0a"


def sentencepiece_model(
    path: str | Path,
    data: bytes,
    added: Sequence[tuple[str, int]] = (),
    prepend_scheme: PrependScheme | None = None,
    **ends: Any,
) -> _SentencePiece:
    """As `from_sentencepiece`, of the bytes that were read from `path`."""
    from sentencepiece import SentencePieceProcessor

    def safe(token: int, text: str, kind: int) -> int:
        check_piece(token, text)
        return safe_type(text, kind)

    try:
        model, types = modelproto.retype(data, safe)
        kinds = [safe(len(types) + i, *token) for i, token in enumerate(added)]
        model += modelproto.pieces((text, 0.0, kind) for (text, _), kind in zip(added, kinds, strict=True))
        types += kinds
        if USER_DEFINED in types:
            model, _ = modelproto.retype(model, lambda token, text, _: _for_library(text, types[token]))
        library = SentencePieceProcessor(model_proto=model)
        library.id_to_piece([*range(len(types))])  # which raises where one is not UTF-8
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TokenizerError(f"{path}: not a whole SentencePiece model ({one_line(error)}); fetch it again") from None
    bos, eos = (token if token >= 0 else None for token in (library.bos_id(), library.eos_id()))
    own = replace(Ends(bos, eos, add_bos=bos is not None), **ends)
    return _SentencePiece(model, np.array(types, np.uint8), own, prepend_scheme)


#: Given what checks a vocabulary and makes its arrays, returns those or, from an earlier time, equals.
Memoise = Callable[[Callable[[], Arrays]], Arrays]


def from_merges(
    pieces: Sequence[str | bytes],
    types: Sequence[int],
    merges: Sequence[str],
    pre: str,
    ends: Ends,
    *,
    memoise: Memoise = lambda make: make(),
) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file's metadata. Raises TokenizerError when its parts do not fit together.

    `pre` is one of PRE_TOKENIZERS.
    """
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(f"pre-tokenizer {pre!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")

    def make() -> Arrays:
        texts, safe = _checked(pieces, types, ends)
        words = {text: i for i, text in enumerate(texts) if safe[i] in (NORMAL, BYTE)}
        return {**bpe.arrange(texts, words, merges), "types": np.array(safe, np.uint8)}

    return _ByteLevelBpe(memoise(make), PRE_TOKENIZERS[pre], ends)


def from_scores(
    pieces: Sequence[str | bytes],
    scores: Sequence[float],
    types: Sequence[int],
    ends: Ends,
    *,
    unk_id: int | None,
    prepend_scheme: PrependScheme,
    memoise: Memoise = lambda make: make(),
) -> Tokenizer:
    """The SentencePiece tokenizer of a GGUF file's metadata. Raises as `from_merges` does."""

    def make() -> Arrays:
        texts, safe = _checked(pieces, types, ends, unk_id)
        spaced = prepend_scheme != "never"
        model = _model_proto(texts, scores, safe, ends, unk_id=unk_id, add_dummy_prefix=spaced)
        return {"model": np.frombuffer(model, np.uint8), "types": np.array(safe, np.uint8)}

    arrays = memoise(make)
    return _SentencePiece(arrays["model"].tobytes(), arrays["types"], ends, prepend_scheme)


def from_pieces(pieces: Sequence[str | bytes], scores: Sequence[float], types: Sequence[int]) -> Tokenizer:
    """A SentencePiece vocabulary with Llama 2's settings. Raises as `from_scores` does.

    Its first three tokens are <unk>, BOS and EOS. A prompt begins with BOS, and a text with a space.
    """
    return from_scores(pieces, scores, types, Ends(1, 2, add_bos=True), unk_id=0, prepend_scheme="always")


def _checked(
    pieces: Sequence[str | bytes], types: Sequence[int], ends: Ends, unk_id: int | None = None
) -> tuple[list[str], list[int]]:
    """Text and safe type of each token."""
    texts = _texts(pieces)
    kinds = [UNUSED if not piece else kind for piece, kind in zip(pieces, types, strict=False)]
    _check_ids(len(texts), bos_id=ends.bos_id, eos_id=ends.eos_id, eot_id=ends.eot_id, unk_id=unk_id)
    if len(types) != len(texts) or not TYPES.issuperset(kinds):
        raise TokenizerError(f"the vocabulary of {len(texts)} tokens needs as many token types, each from 1 to 6")
    return texts, list(map(safe_type, texts, kinds))


def _model_proto(
    texts: Sequence[str],
    scores: Sequence[float],
    types: list[int],
    ends: Ends,
    *,
    unk_id: int | None,
    add_dummy_prefix: bool,
) -> bytes:
    """The SentencePiece model of a vocabulary, of whose `types` some are changed."""
    if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
        raise TokenizerError(f"a SentencePiece vocabulary of {len(texts)} tokens needs as many finite scores")
    values = {text for text, kind in zip(texts, types, strict=True) if kind == BYTE}
    if values and values != {f"<0x{value:02X}>" for value in range(256)}:
        raise TokenizerError(f"the vocabulary has {len(values)} byte tokens; they must be <0x00> to <0xFF>, or none")
    if unk_id is None and UNKNOWN not in types:
        raise TokenizerError("a SentencePiece vocabulary needs an unknown token")
    unk_id = types.index(UNKNOWN) if unk_id is None else unk_id
    for token, kind in enumerate(types):  # some converters pad with unknown tokens, or call the one a control token
        types[token] = UNKNOWN if token == unk_id else UNUSED if kind == UNKNOWN else kind
    kinds = list(map(_for_library, texts, types))
    return modelproto.build(
        texts,
        scores,
        kinds,
        unk_id=unk_id,
        bos_id=ends.bos_id,
        eos_id=ends.eos_id,
        byte_fallback=bool(values),
        add_dummy_prefix=add_dummy_prefix,
    )


def _cuts(text: str) -> Iterator[int]:
    """Offsets that cut `text` into chunks, first 0 and last its length, so that memory stays bounded.

    A cut is between a letter and something else, not a combining mark, which no word of any pre-tokenizer spans. Raises
    TokenizerError for a text without such a place.
    """
    start = 0
    yield start
    while len(text) - start > _CHUNK:
        limit = min(len(text), start + _LONGEST_WORD)
        start = next(
            (i for i in range(start + _CHUNK, limit) if text[i - 1].isalpha() and not _continues(text[i])), limit
        )
        if start == limit < len(text):
            raise TokenizerError(f"text: no end of a word within {_LONGEST_WORD} characters before character {limit}")
        if start < len(text):
            yield start
    yield len(text)


def marks_role(text: str) -> bool:
    """Whether a token that looks so marks roles or turns, and is a control token whatever its file says."""
    return re.fullmatch(_ROLE, text) is not None


def safe_type(text: str, kind: int) -> int:
    """The type of a token, with the one exception that `marks_role` says."""
    return CONTROL if kind == USER_DEFINED and marks_role(text) else kind


def _for_library(text: str, kind: int) -> int:
    """The type that the library is given: it would put no space behind user-defined pieces. Runs of spaces are its."""
    return UNUSED if kind == USER_DEFINED and SPACE not in text else kind


def check_piece(token: int, text: str) -> None:
    """Raise TokenizerError when a token is longer than any real one."""
    if len(text) > MAX_PIECE:
        raise TokenizerError(
            f"token {token} of the vocabulary has {len(text)} characters, and the limit is {MAX_PIECE}"
        )


def _texts(pieces: Sequence[str | bytes]) -> list[str]:
    """Pieces as text; a name for one without, which is not used."""
    texts: list[str] = []
    for token, piece in enumerate(pieces):
        try:
            texts.append((piece if isinstance(piece, str) else piece.decode()) or f"[PAD{token}]")
        except UnicodeDecodeError:
            raise TokenizerError(f"token {token} of the vocabulary is not UTF-8: {piece[:80]!r}") from None
        check_piece(token, texts[-1])
    if len(set(texts)) != len(texts):
        twice = max(texts, key=Counter(texts).__getitem__)
        raise TokenizerError(f"the vocabulary has token {twice!r} twice")
    return texts


def _check_ids(size: int, **ids: int | None) -> None:
    for name, token in ids.items():
        if token is not None and not 0 <= token < size:
            raise TokenizerError(f"{name} {token} is outside the vocabulary of {size} tokens")


def read(path: str | Path) -> bytes:
    """A vocabulary's file. Raises TokenizerError."""
    return files.read(Path(path), error=TokenizerError)


def register_errors() -> str:
    """The name of the rule by which SentencePiece decodes broken UTF-8: U+FFFD for each byte."""
    codecs.register_error("llama2.replace_each_byte", _replace_each_byte)
    return "llama2.replace_each_byte"


def _replace_each_byte(error: Any) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


def one_line(error: BaseException) -> str:
    """A library's reason, on one line, for a message."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
