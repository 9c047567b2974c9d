"""Hugging Face's tokenizer files ⇄ Tokenizer, with the ids that transformers 4.57 gives.

`tokenizer.json` is what the tokenizers library reads, `tokenizer.model` a SentencePiece model or Llama 3's tiktoken
ranks. `tokenizer_config.json` beside them says which tokens begin and end a text, and which were added after training.
How the files are weighed against each other is in docs/decisions/0017-the-tokenizer-is-the-files.md.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.errors import TokenizerError
from llama2.text import library, tokenizer
from llama2.text.library import LibraryTokenizer
from llama2.text.tokenizer import CONTROL, SPACE, UNUSED, USER_DEFINED, Ends, PrependScheme, Tokenizer

_MAX_ID = 1 << 26
_MAX_ADDED = 1 << 16  # rows of embeddings beyond a vocabulary
_MAX_MEMORY = 1 << 29  # bytes that a tokenizer.json may need: with 256,000 pieces and 510,000 merges some 470 MB
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_AFFIX = re.compile(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')
#: Classes of transformers that put BOS in front unless the settings say otherwise, whatever tokenizer.json says.
_LLAMA_CLASSES = frozenset(
    name + fast for name in ("LlamaTokenizer", "CodeLlamaTokenizer", "LLaMATokenizer") for fast in ("", "Fast")
)


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that was added after training, with the flags of the tokenizers library."""

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @classmethod
    def parse(cls, entry: Any, *, special: bool | None = None) -> _Added:
        """A token as a text, or as an object of a JSON file; `special` counts where that does not say it."""
        if isinstance(entry, str):
            return cls(entry, True if special is None else special)
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(f"an added token is {json.dumps(entry)[:80]}, not text or an object with its content")
        is_special = bool(entry.get("special", bool(special)))
        flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        return cls(entry["content"], is_special, bool(entry.get("normalized", not is_special)), **flags)

    def plain(self) -> bool:
        """Whether it takes nothing of the text beside it, and is looked for in the text as it is."""
        return not (self.normalized or self.lstrip or self.rstrip or self.single_word)


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is beside a vocabulary: settings, added tokens by their ids, and the size of the model's embeddings."""

    path: Path
    settings: Mapping[str, Any]
    added: Mapping[int, _Added]
    size: int | None
    bos_id: int | None
    eos_id: int | None

    @property
    def is_llama(self) -> bool:
        """Whether transformers takes its class for Llama's SentencePiece vocabularies."""
        return self.settings.get("tokenizer_class") in _LLAMA_CLASSES

    def named(self) -> list[_Added]:
        """Tokens that the settings name by their part, such as BOS."""
        given = [_Added.parse(entry, special=True) for entry in _named(self.settings) if entry]
        return [token for token in given if token.content]

    def adds(self, role: str, default: bool) -> bool:
        """Whether a text gets this token, `bos` or `eos`: as the settings say, else by `default`."""
        given = self.settings.get(f"add_{role}_token")
        return bool(default if given is None else given)

    def ends(self, ids: Mapping[str, int], own_bos: int | None, own_eos: int | None) -> dict[str, int | None]:
        """BOS and EOS: by the settings' names, else the vocabulary's own, else the model's."""
        found: dict[str, int | None] = {}
        for role, own, models in (("bos", own_bos, self.bos_id), ("eos", own_eos, self.eos_id)):
            entry = self.settings.get(f"{role}_token")
            text = _Added.parse(entry).content if entry else ""
            if text and text not in ids:
                raise TokenizerError(
                    f"{self.path}: its {role}_token {files.quote(text)} is not in the vocabulary; correct "
                    "tokenizer_config.json, or fetch the tokenizer's files again"
                )
            found[f"{role}_id"] = ids[text] if text else models if own is None else own
        return found


def read(folder: Path, *, size: int | None = None, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer of a folder: of its `tokenizer.json`, else of its `tokenizer.model`. Raises TokenizerError.

    A model with `size` rows of embeddings has no added tokens beyond them, and rows beyond the vocabulary are tokens
    that are not used. `bos_id` and `eos_id` count where the folder's tokenizer files name none.
    """
    source = next(
        (folder / name for name in ("tokenizer.json", "tokenizer.model") if files.exists(folder / name)), None
    )
    if source is None:
        raise TokenizerError(f"{folder}: {_absent(folder)}")
    try:
        return _read(folder, size, bos_id, eos_id)
    except TokenizerError as error:
        text = str(error)
        raise TokenizerError(text if text.startswith(str(folder)) else f"{source}: {text}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError, OverflowError) as error:
        raise TokenizerError(f"{source}: it, or a file beside it, is malformed: {tokenizer.one_line(error)}") from None


def _absent(folder: Path) -> str:
    """What is wrong with a folder that has neither file."""
    if files.exists(folder / "tekken.json"):
        return "has a tokenizer in tekken.json alone, which is not supported; fetch the model's tokenizer.json"
    if files.exists(folder / "vocab.json"):
        return "has a tokenizer in vocab.json alone; save it again with transformers, which writes tokenizer.json"
    return "has no tokenizer.json and no tokenizer.model; fetch the model's tokenizer, or give a file with --tokenizer"


def _read(folder: Path, size: int | None, bos_id: int | None, eos_id: int | None) -> Tokenizer:
    settings = _settings(folder)
    around = _Folder(folder, settings, _added(folder, settings), size, bos_id, eos_id)
    model, text = (
        folder / name if files.exists(folder / name) else None for name in ("tokenizer.model", "tokenizer.json")
    )
    data = b""
    unread: tuple[str, ...] = ()
    if model is not None:
        try:
            data = tokenizer.read(model)
        except TokenizerError as error:
            if text is None:
                raise
            unread = (f"tokenizer.model is not used, since it {str(error).partition(': ')[2]}",)
    if text is not None and (model is None or not _from_slow(around, data)):
        opened = _from_json(text, around, data or None)
        opened.notes += unread
        return opened
    from llama2.text import tiktoken

    model = folder / "tokenizer.model"
    if tiktoken.matches(data):
        return tiktoken.tokenizer(model, data, size)
    return _from_model(model, data, around)


def _from_slow(around: _Folder, data: bytes) -> bool:
    """Whether transformers makes the tokenizer of the tokenizer.model, although there is a tokenizer.json."""
    named = around.is_llama and around.settings.get("add_prefix_space") is not None
    return named and bool(data) and tokenizer.is_sentencepiece(data)


def _from_json(path: Path, around: _Folder, model: bytes | None) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import pre_tokenizers

    text = tokenizer.read(path)
    files.refuse_memory(path, text, memory=_MAX_MEMORY, error=TokenizerError)
    if found := _AFFIX.search(text):  # with which the library panics on some vocabularies
        raise TokenizerError(f"{path}: sets {found[1].decode()}, which no Llama has; choose another model")
    made = _guarded(path, lambda: Library.from_str(text.decode()))
    dropped: list[str] = []
    if around.size is not None and any(token >= around.size for token in made.get_added_tokens_decoder()):
        source = files.parse_json(path, text, memory=_MAX_MEMORY, error=TokenizerError)
        dropped = [entry["content"] for entry in source["added_tokens"] if entry["id"] >= around.size]
        source["added_tokens"] = [entry for entry in source["added_tokens"] if entry["id"] < around.size]
        made = _guarded(path, lambda: Library.from_str(json.dumps(source)))
    state = library.state(made.pre_tokenizer) or {}
    spaced = bool(around.settings.get("add_prefix_space", False))
    if state.get("type") == "ByteLevel" and state["add_prefix_space"] != spaced:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=state["use_regex"])
    return _finish(path, made, around, model, _ends_of(library.state(made.post_processor) or {}), dropped)


def _ends_of(whole: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that a post-processor puts before and behind a text."""
    ends: list[str | None] = []
    for place in (slice(1), slice(-1, None)):
        parts = [part for step in whole.get("processors", [whole]) for part in step.get("single", ())[place]]
        names = [part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part]
        ends.append(names[0] if names else None)
    return ends[0], ends[1]


def _finish(
    path: Path,
    made: Any,
    around: _Folder,
    model: bytes | None,
    ends: tuple[str | None, str | None],
    dropped: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of the library's object `made`, with what the settings add to it; `dropped` tokens are missing."""
    moved = [t.content for i, t in around.added.items() if made.token_to_id(t.content) not in (i, None)]
    notes = _left_out([*dict.fromkeys([*dropped, *_extend(made, around, moved)])]) + _moved(moved)
    own = made.get_vocab_size(with_added_tokens=True)
    size = own if around.size is None else around.size
    if not 0 <= size - own <= _MAX_ADDED:
        raise TokenizerError(f"{path}: has {own} tokens, and the model {size} rows of embeddings")
    vocabulary = made.get_vocab(with_added_tokens=True)
    if len(vocabulary) != own or max(vocabulary.values(), default=-1) >= own:
        raise TokenizerError(f"{path}: the ids of its {own} tokens are not 0 to {own - 1}")
    for text, token in vocabulary.items():
        tokenizer.check_piece(token, text)
    of_ends = [vocabulary.get(text) if text else None for text in ends]
    ids = around.ends(vocabulary, *of_ends)
    adds = {}
    for role, text in zip(("bos", "eos"), ends, strict=True):
        token, default = ids[f"{role}_id"], role == "bos" if around.is_llama else text is not None
        added = adds[f"add_{role}"] = token is not None and around.adds(role, default)
        if added and not around.is_llama and text is not None and vocabulary.get(text) != token:
            raise TokenizerError(
                f"{path}: puts {files.quote(text)} around a text, which is not its {role}_token; correct either"
            )
    scores = model if model and tokenizer.is_sentencepiece(model) else None
    opened = LibraryTokenizer(made, size, Ends(ids["bos_id"], ids["eos_id"], adds["add_bos"], adds["add_eos"]), scores)
    opened.notes = notes
    if (library.state(made.pre_tokenizer) or {}).get("type") == "Metaspace" and around.settings.get("legacy") is True:
        opened.choose("legacy")
        opened.mode = "legacy, as tokenizer_config.json says"
    return opened


def _extend(made: Any, around: _Folder, moved: Sequence[str]) -> list[str]:
    """Add the settings' tokens to the library's object as transformers does. Returns those without a row.

    Raises TokenizerError where one gets another id than the settings say, but for the `moved`, which had one before.
    """
    from tokenizers import AddedToken

    size = around.size
    left_out = [token.content for i, token in around.added.items() if size is not None and i >= size]
    listed = [token for i, token in sorted(around.added.items()) if size is None or i < size]
    known = {token.content for token in (*listed, *made.get_added_tokens_decoder().values())}
    known |= {*left_out}
    tokens = listed + [token for token in around.named() if token.content not in known]
    kept: list[_Added] = []
    room = None if size is None else size - made.get_vocab_size(with_added_tokens=True)
    for token in {token.content: token for token in tokens if token.content}.values():
        if made.token_to_id(token.content) is None:
            if room == 0:
                left_out.append(token.content)
                continue
            room = None if room is None else room - 1
        kept.append(token)

    def of_library(token: Any, special: bool) -> Any:
        flags = {name: getattr(token, name) for name in ("normalized", "lstrip", "rstrip", "single_word")}
        return AddedToken(token.content, special=special, **flags)

    made.add_tokens([of_library(token, token.special) for token in kept])
    for i, token in around.added.items():
        found = made.token_to_id(token.content)
        if found not in (i, None) and token.content not in moved and (size is None or i < size):
            raise TokenizerError(
                f"token {files.quote(token.content)} has the id {i} in its settings, and {found} in the vocabulary"
            )
    roles = [t for t in made.get_added_tokens_decoder().values() if not t.special and tokenizer.marks_role(t.content)]
    made.add_tokens([of_library(token, True) for token in roles])
    return left_out


def _from_model(path: Path, data: bytes, around: _Folder) -> Tokenizer:
    """The tokenizer of a SentencePiece model: sentencepiece's own, unless added tokens have rules of their own."""
    settings, size = around.settings, around.size
    legacy = settings.get("legacy") is not False
    scheme: PrependScheme = "never" if settings.get("add_prefix_space") is False else "always" if legacy else "first"
    plain = tokenizer.sentencepiece_model(path, data, (), scheme)
    known = {**plain.control, **plain.user}
    listed = [token for i, token in sorted(around.added.items()) if size is None or i < size]
    more = [token for token in (*listed, *around.named()) if token.content and token.content not in known]
    beyond = {token.content: token for token in more if not plain.is_unknown(token.content)}
    if any(plain.has_piece(text) for text in beyond) or not all(token.plain() for token in (*listed, *more)):
        made = library.from_parts(plain.vocabulary(), (CONTROL, USER_DEFINED))  # as transformers does it
        bos = next((text for text, token in plain.control.items() if token == plain.bos_id), None)
        return _finish(path, made, around, data, (bos, None))
    by_id = {i: token for i, token in around.added.items() if token.content in beyond and i >= plain.vocab_size}
    texts = {token.content for token in by_id.values()}
    named = [token for text, token in beyond.items() if text not in texts]  # which take the rows that are free
    size = max([plain.vocab_size, *(i + 1 for i in by_id)]) + len(named) if size is None else size
    if not 0 <= size - plain.vocab_size <= _MAX_ADDED:
        raise TokenizerError(f"{path}: has {plain.vocab_size} tokens, and the model {size} rows of embeddings")
    rows, ids = [], dict(known)
    for i in range(plain.vocab_size, size):
        token = by_id.get(i) or (named.pop(0) if named else None)
        rows.append((token.content, CONTROL if token.special else USER_DEFINED) if token else (f"[PAD{i}]", UNUSED))
        if token:
            ids[token.content] = i
    if unknown := _text_of(settings.get("unk_token")):
        ids.setdefault(unknown, 0)
    ends: dict[str, Any] = dict(around.ends(ids, plain.bos_id, plain.eos_id))
    for role, default in (("bos", True), ("eos", False)):
        ends[f"add_{role}"] = ends[f"{role}_id"] is not None and around.adds(role, default)
    opened = tokenizer.sentencepiece_model(path, data, rows, scheme, **ends)
    opened.mode = "legacy" if scheme == "always" else "file"
    opened.notes = _left_out([text for text in beyond if text not in ids])
    return opened


def _moved(texts: Sequence[str]) -> tuple[str, ...]:
    """What a person should know of tokens whose id in the settings is another than in the vocabulary."""
    if not texts:
        return ()
    more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
    return (f"{files.quote(texts[0])}{more}: tokenizer_config.json gives other ids than the vocabulary, which counts",)


def _left_out(texts: Sequence[str]) -> tuple[str, ...]:
    """What a person should know of tokens that the model has no rows for."""
    if len(texts) > 1:
        some = f"tokens {files.quote(texts[0])} and {len(texts) - 1} more"
        return (f"{some} are left out, since the model has no rows for them",)
    return tuple(f"token {files.quote(text)} is left out, since the model has no row for it" for text in texts)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; if it lists no added tokens, with what special_tokens_map.json names."""
    settings = _object(folder / "tokenizer_config.json")
    if not settings.get("added_tokens_decoder"):
        named = _object(folder / "special_tokens_map.json")
        settings |= {role: named[role] for role in (*_ROLES, "additional_special_tokens") if named.get(role)}
    return settings


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, _Added]:
    """Tokens that were added after training, by `tokenizer_config.json`, or the older `added_tokens.json`."""
    if listed := settings.get("added_tokens_decoder"):
        return {_id(token): _Added.parse(entry) for token, entry in listed.items()}
    if files.exists(folder / "tokenizer.model") and files.exists(folder / "tokenizer.json"):
        entries = _object(folder / "tokenizer.json", memory=_MAX_MEMORY).get("added_tokens") or ()
        return {_id(entry["id"]): _Added.parse(entry) for entry in entries}
    special = set(map(_text_of, _named(settings)))
    texts = _object(folder / "added_tokens.json")
    return {_id(token): _Added(text, text in special, text not in special) for text, token in texts.items()}


def _named(settings: Mapping[str, Any]) -> list[Any]:
    """What the settings name by its part, such as BOS, as they write it."""
    more = settings.get("additional_special_tokens")
    return [*(settings.get(role) for role in _ROLES), *(more if isinstance(more, list) else ())]


def _id(value: Any) -> int:
    """The id of an added token, which a JSON file has as a number or as a text."""
    token = int(value)
    if not 0 <= token < _MAX_ID:
        raise ValueError(f"an added token's id must be from 0 to {_MAX_ID - 1}")
    return token


def _text_of(token: Any) -> str | None:
    """The text of a token that a settings file names, as a text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def written(source: Tokenizer, templates: Mapping[str, str]) -> dict[str, bytes]:
    """Files with which transformers has the same tokens and chat templates, by name.

    Raises TokenizerError as `vocabulary` does, and for a user-defined piece with a space, which they cannot express.
    Raises TemplateError for a template that is not text.
    """
    from llama2.text.template import check

    if isinstance(source, LibraryTokenizer):
        made, unknown = source.json_file(), source.unknown
    else:
        parts = source.vocabulary()
        for text, kind in zip(parts.pieces, parts.types, strict=True):
            if kind == USER_DEFINED and SPACE in text and parts.kind == "sentencepiece":
                raise TokenizerError(
                    f"the user-defined token {text!r} has a space, and transformers finds none with one"
                )
        made = json.loads(library.from_parts(parts).to_str())
        unknown = None if parts.unk_id is None else parts.pieces[parts.unk_id]
    texts = {token: text for text, token in made["model"]["vocab"].items()}
    texts |= {entry["id"]: entry["content"] for entry in made["added_tokens"]}
    made["post_processor"] = _template_processing(source, texts)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as tokenizer.json says, with no rules of its own
        "clean_up_tokenization_spaces": False,
        "add_bos_token": source.add_bos,
        "add_eos_token": source.add_eos,
    }
    ends = {"bos_token": source.bos_id, "eos_token": source.eos_id}
    settings |= {name: texts[token] for name, token in ends.items() if token is not None}
    if unknown is not None:
        settings["unk_token"] = unknown
    named = [{"name": name, "template": text} for name, text in templates.items()]
    for entry in named:
        check(entry["template"])
    if named:
        settings["chat_template"] = named[0]["template"] if templates.keys() == {"default"} else named
    made_files = {
        "tokenizer.json": json.dumps(made, indent=2, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    model = source.model_file()
    return made_files if model is None else {"tokenizer.model": model, **made_files}


def _template_processing(source: Tokenizer, texts: Mapping[int, str]) -> dict[str, Any] | None:
    """The post-processor that puts BOS and EOS around one text, and around each of two."""
    begin = [source.bos_id] if source.add_bos and source.bos_id is not None else []
    end = [source.eos_id] if source.add_eos and source.eos_id is not None else []
    if not begin and not end:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": texts[t], "type_id": number}} for t in some] for some in (begin, end))
        return [*before, {"Sequence": {"id": name, "type_id": number}}, *after]

    tokens = {texts[token]: {"id": texts[token], "ids": [token], "tokens": [texts[token]]} for token in (*begin, *end)}
    one = around("A", 0)
    return {"type": "TemplateProcessing", "single": one, "pair": [*one, *around("B", 1)], "special_tokens": tokens}


def _object(path: Path, *, memory: int = files.MAX_VALUES) -> dict[str, Any]:
    """The JSON object in a file; an empty one without a file."""
    return files.load_json(path, memory=memory, error=TokenizerError) if files.exists(path) else {}


def _guarded(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` makes of a file by the library. Raises TokenizerError, also where the library panics."""
    try:
        with _without_panics():
            return make()
    except BaseException as error:  # the library raises nothing narrower, and its panics are not Exceptions
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{path}: is malformed ({tokenizer.one_line(error)})") from None
        raise


@contextmanager
def _without_panics() -> Iterator[None]:
    """Hold back what is written to standard error meanwhile, and leave out what the library writes when it panics."""
    try:
        own = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            held.seek(0)
            written = held.read()
            if b" panicked at " not in written:
                os.write(2, written)
