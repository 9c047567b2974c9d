"""One Tokenizer over SentencePiece models and byte-level BPE (paper 2.2, spec 2.1–2.2).

The libraries sentencepiece and tokenizers do the work, but for byte-level merges (bpe.py). A vocabulary comes from a
SentencePiece `tokenizer.model`, a Hugging Face `tokenizer.json` (huggingface.py), or a GGUF file's metadata.
"""

from __future__ import annotations

import codecs
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2.errors import TokenizerError
from llama2.text import bpe, modelproto

#: Token types as SentencePiece and GGUF number them.
TYPES = frozenset(range(1, 7))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Tokens that end an answer besides EOS, where a vocabulary has them as control tokens.
END_OF_TURN = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")

#: User-defined tokens of this shape mark roles and turns, so they are control tokens whatever their file says.
ROLE_TOKEN = re.compile(r"<[|｜][^|｜]+[|｜]>|<(start|end)_of_turn>|</?s>")

#: Byte-level pre-tokenizers by the names that llama.cpp gives files. The names of one group mean the same expression.
PRE_TOKENIZERS = {
    "smollm": "smollm",
    **dict.fromkeys(("gpt2", "gpt-2"), "gpt2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
}

#: Llama 3's split of text into words: contractions, words, up to three digits, punctuation, line ends, spaces.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Byte-level BPE works on texts of about this many characters, and refuses a single word longer than the limit.
_CHUNK, _LONGEST_WORD = 1 << 16, 1 << 20
#: It remembers the tokens of so many words of up to so many bytes.
_REMEMBERED, _REMEMBERED_LENGTH = 1 << 14, 64

#: A vocabulary that was checked, as arrays that a file can hold.
Arrays = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer is made of: the arguments of `from_vocabulary` that a Tokenizer does not hold itself."""

    kind: Literal["sentencepiece", "bpe"]
    pieces: list[str]
    scores: list[float] | None
    types: list[int]
    merges: list[str] | None
    pre: str | None
    unk_id: int | None
    add_space_prefix: bool


class Tokenizer(ABC):
    """Text ⇄ token ids. Text never yields a control token unless `special=True`, which only templates use."""

    kind: Literal["sentencepiece", "bpe"]
    pre: str | None = None  # name of the byte-level pre-tokenizer
    _errors = "replace"  # how broken UTF-8 decodes, as the kind's library does it

    def __init__(
        self,
        vocab_size: int,
        control: dict[str, int],
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        add_eos: bool,
        eot_id: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.control = control  # control tokens by their text
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos  # whether a raw prompt starts with BOS
        self.add_eos = add_eos
        ends = {eos_id, eot_id, *(control.get(text) for text in END_OF_TURN)}
        self.stop_ids = frozenset(token for token in ends if token is not None)  # EOS and every end-of-turn token
        self._control_ids = frozenset(control.values())
        self._control_pattern = _any_of(control)
        self._known_bytes: dict[int, bytes] = {}  # of tokens that were asked for

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`; `special`: control tokens in it are recognised, and what lies between is encoded alone.

        Raises TokenizerError for a lone surrogate, and for BOS or EOS where the vocabulary has none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X}"
            raise TokenizerError(f"text: character {error.start} is a lone surrogate, {surrogate}; remove it") from None
        ids = [self._required(self.bos_id, "BOS")] if bos else []
        for part, token in self.split(text) if special else ((text, None),):
            ids += self._encode(part) if token is None else [token]
        if eos:
            ids.append(self._required(self.eos_id, "EOS"))
        return ids

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """`text` in parts: literal text with None, and control tokens with their ids."""
        return _split(text, self._control_pattern, self.control)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens give nothing, broken UTF-8 gives U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; empty for a control token."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        found = self._known_bytes.get(token)
        if found is None:
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
    def vocabulary(self) -> Vocabulary:
        """The parts of this tokenizer, for writing it. Raises TokenizerError for rules that no format but its own has.

        Roles' markers are control tokens in them, whatever the file said.
        """

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of literal text without lone surrogates."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """Bytes of a token that is in the vocabulary and not a control token."""

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
    kind = "sentencepiece"
    _errors = "llama2.replace_each_byte"

    def __init__(self, model: bytes, *, bos_id: int | None, eos_id: int | None, **options: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        codecs.register_error(self._errors, _replace_each_byte)
        try:
            self._model = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"the SentencePiece vocabulary is damaged: {one_line(error)}") from None
        size: int = self._model.get_piece_size()
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        super().__init__(size, control, bos_id=bos_id, eos_id=eos_id, **options)
        self._adds_space = self._model.normalize("a").startswith("▁")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def _bytes(self, token: int) -> bytes:
        piece: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token):
            piece = self._model.decode([token])
        return piece.replace("▁", " ").encode()

    def model_file(self) -> bytes:
        model: bytes = self._model.serialized_model_proto()
        return model

    def vocabulary(self) -> Vocabulary:
        model = modelproto.read(self.model_file())
        if not model.plain:
            raise TokenizerError(
                "its SentencePiece model is not BPE, or changes texts, which only a tokenizer.model can say"
            )
        pieces, scores, types = map(list, zip(*model.pieces, strict=True))
        return Vocabulary("sentencepiece", pieces, scores, types, None, None, model.unk_id, model.add_dummy_prefix)

    def drops_space(self, token: int) -> bool:
        return self._adds_space and self._model.id_to_piece(token).startswith("▁")


class _ByteLevelBpe(Tokenizer):
    kind = "bpe"

    def __init__(self, arrays: Arrays, pre: str, **options: Any) -> None:
        self._merges = bpe.Merges(arrays)
        control, user = (
            {self._merges.piece(token): token for token in np.flatnonzero(arrays["types"] == kind).tolist()}
            for kind in (CONTROL, USER_DEFINED)
        )
        super().__init__(len(self._merges), control, **options)
        self.pre = pre
        self._types = arrays["types"]
        self._user = user
        self._user_ids = frozenset(user.values())
        self._user_pattern = _any_of(user)
        self._split_words = pre_tokenizer(pre).pre_tokenize_str
        self._remembered = lru_cache(_REMEMBERED)(self._tokens)

    def vocabulary(self) -> Vocabulary:
        pieces = list(map(self._merges.piece, range(self.vocab_size)))
        return Vocabulary("bpe", pieces, None, self._types.tolist(), self._merges.texts(), self.pre, None, False)

    def _encode(self, text: str) -> list[int]:
        """As the tokenizers library does it, bytes that the vocabulary has no token for are left out."""
        ids: list[int] = []
        for part, token in _split(text, self._user_pattern, self._user):
            if token is not None:
                ids.append(token)
                continue
            for start, end in pairwise(_cuts(part)):
                for word, _ in self._split_words(part[start:end]):
                    ids += (self._remembered if len(word) <= _REMEMBERED_LENGTH else self._tokens)(word)
        return ids

    def _tokens(self, word: str) -> tuple[int, ...]:
        whole = self._merges.find(word) if self.pre == "llama-bpe" else None
        return self._merges.merge(word) if whole is None else (whole,)

    def _bytes(self, token: int) -> bytes:
        piece = self._merges.piece(token)
        return piece.encode() if token in self._user_ids else b"".join(bpe.BYTES.get(c) or c.encode() for c in piece)


def from_sentencepiece(path: str | Path, added: Sequence[tuple[str, int]] = (), **options: Any) -> Tokenizer:
    """The tokenizer of a SentencePiece `tokenizer.model`. Raises TokenizerError when it is truncated or damaged.

    `added` tokens, each a text and its type, follow those of the file. `options` are those of Tokenizer, where they
    differ from what the file says.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = modelproto.retype(read(path), _safe_type)
        model += modelproto.pieces((text, 0.0, _safe_type(text, kind)) for text, kind in added)
        library = SentencePieceProcessor(model_proto=model)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TokenizerError(f"{path}: not a whole SentencePiece model ({one_line(error)}); fetch it again") from None
    bos, eos = (token if token >= 0 else None for token in (library.bos_id(), library.eos_id()))
    defaults = {"bos_id": bos, "eos_id": eos, "add_bos": bos is not None, "add_eos": False}
    return _SentencePiece(model, **{**defaults, **options})


def from_vocabulary(
    kind: Literal["sentencepiece", "bpe"],
    pieces: Sequence[str | bytes],
    *,
    scores: Sequence[float] | None,
    types: Sequence[int],
    merges: Sequence[str] | None,
    pre: str | None,
    bos_id: int | None,
    eos_id: int | None,
    unk_id: int | None,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
    eot_id: int | None = None,
    keep: Callable[[Callable[[], Arrays]], Arrays] = lambda make: make(),
) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes. Raises TokenizerError when its parts do not fit together.

    `keep` is given what checks the vocabulary and makes its arrays, and returns those or, from an earlier time, equals.
    """
    if kind == "bpe" and pre not in PRE_TOKENIZERS:
        raise TokenizerError(f"pre-tokenizer {pre!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")

    def make() -> Arrays:
        texts = _texts(pieces)
        _check_ids(len(texts), bos_id=bos_id, eos_id=eos_id, eot_id=eot_id, unk_id=unk_id)
        if len(types) != len(texts) or not TYPES.issuperset(types):
            raise TokenizerError(f"the vocabulary of {len(texts)} tokens needs as many token types, each from 1 to 6")
        safe = list(map(_safe_type, texts, types))
        if kind == "bpe":
            words = {text: i for i, text in enumerate(texts) if safe[i] in (NORMAL, BYTE)}
            return {**bpe.arrange(texts, words, merges or ()), "types": np.array(safe, np.uint8)}
        model = _model_proto(
            texts, scores, safe, unk_id=unk_id, bos_id=bos_id, eos_id=eos_id, add_dummy_prefix=add_space_prefix
        )
        return {"model": np.frombuffer(model, np.uint8)}

    arrays = keep(make)
    options = {"bos_id": bos_id, "eos_id": eos_id, "eot_id": eot_id, "add_bos": add_bos, "add_eos": add_eos}
    if kind == "bpe":
        return _ByteLevelBpe(arrays, PRE_TOKENIZERS[str(pre)], **options)
    return _SentencePiece(arrays["model"].tobytes(), **options)


def from_pieces(pieces: Sequence[str | bytes], scores: Sequence[float], types: Sequence[int]) -> Tokenizer:
    """A SentencePiece vocabulary with Llama 2's settings: <unk>, BOS and EOS are its first three tokens, a prompt
    begins with BOS, and a text with a space. Raises as `from_vocabulary` does.
    """
    return from_vocabulary(
        "sentencepiece",
        pieces,
        scores=scores,
        types=types,
        merges=None,
        pre=None,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_bos=True,
        add_eos=False,
        add_space_prefix=True,
    )


def _model_proto(
    texts: Sequence[str], scores: Sequence[float] | None, types: list[int], *, unk_id: int | None, **options: Any
) -> bytes:
    """The SentencePiece model of a vocabulary, with other `options` of modelproto.build."""
    if scores is None or len(scores) != len(texts) or not all(map(math.isfinite, scores)):
        raise TokenizerError(f"a SentencePiece vocabulary of {len(texts)} tokens needs as many finite scores")
    values = {text for text, kind in zip(texts, types, strict=True) if kind == BYTE}
    if values and values != {f"<0x{value:02X}>" for value in range(256)}:
        raise TokenizerError(f"the vocabulary has {len(values)} byte tokens; they must be <0x00> to <0xFF>, or none")
    if unk_id is None and UNKNOWN not in types:
        raise TokenizerError("a SentencePiece vocabulary needs an unknown token")
    unk_id = types.index(UNKNOWN) if unk_id is None else unk_id
    types[unk_id] = UNKNOWN  # some converters call it a control token
    return modelproto.build(texts, scores, types, unk_id=unk_id, byte_fallback=bool(values), **options)


def pre_tokenizer(pre: str) -> Any:
    """The tokenizers library's object that splits text into words, by a name that is a value of PRE_TOKENIZERS."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre == "gpt2":
        return ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    words = Split(Regex(_LLAMA3_WORDS), behavior="isolated")
    return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


def _cuts(text: str) -> Iterator[int]:
    """Offsets that cut `text` into chunks, first 0 and last its length, so that memory stays bounded.

    A cut stands between a letter and something else, which no word of any pre-tokenizer spans. Raises TokenizerError
    for a text without such a place.
    """
    start = 0
    yield start
    while len(text) - start > _CHUNK:
        limit = min(len(text), start + _LONGEST_WORD)
        start = next(
            (i for i in range(start + _CHUNK, limit) if text[i - 1].isalpha() and not text[i].isalpha()), limit
        )
        if start == limit < len(text):
            raise TokenizerError(f"text: no end of a word within {_LONGEST_WORD} characters before character {limit}")
        if start < len(text):
            yield start
    yield len(text)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest first, and nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _split(text: str, pattern: re.Pattern[str], tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], None
        yield match[0], tokens[match[0]]
        end = match.end()
    if end < len(text):
        yield text[end:], None


def _safe_type(text: str, kind: int) -> int:
    return CONTROL if kind == USER_DEFINED and ROLE_TOKEN.fullmatch(text) else kind


def _texts(pieces: Sequence[str | bytes]) -> list[str]:
    texts = []
    for token, piece in enumerate(pieces):
        try:
            texts.append(piece if isinstance(piece, str) else piece.decode())
        except UnicodeDecodeError:
            raise TokenizerError(f"token {token} of the vocabulary is not UTF-8: {piece!r}") from None
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
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror or error}") from None


def _replace_each_byte(error: Any) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


def one_line(error: BaseException) -> str:
    """A library's reason as it may stand in a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
