"""The parity receipt: evidence that a model that was written is the one that was read, or how close to it.

Each part returns what goes into the receipt, and raises ParityError at the first thing that is out of bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.quantization import dequantize
from llama2.config import ModelConfig
from llama2.convert import layouts, samples
from llama2.convert.bounds import BOUNDS, Bound, groups
from llama2.convert.layouts import Bytes, Floats, Stored
from llama2.errors import DialogError, ParityError, TemplateError, TokenizerError
from llama2.formats import FORMATS, nbytes
from llama2.hub import store
from llama2.hub.progress import Progress
from llama2.text.dialog import Dialog, Message
from llama2.text.tokenizer import NORMAL, UNUSED, Tokenizer, Vocabulary
from llama2.version import package_version

_CHUNK = 1 << 16  # numbers compared at a time, so that temporary arrays stay in the cache


def take(
    source: Checkpoint,
    output: Checkpoint,
    *,
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    run: bool,
    report: Progress,
) -> dict[str, Any]:
    """The receipt of `output`, which was made of `source`; `inputs` and `outputs` are their files.

    With `run`, both models also run, one after the other. Raises ParityError that says what differs and where.
    """
    with ThreadPoolExecutor(1) as pool:  # hashes while tensors are compared
        digests = {path: pool.submit(store.digest, path, "sha256", _silent) for path in (*inputs, *outputs)}
        try:
            facts: dict[str, Any] = {
                "tool": {"name": "llama2", "version": package_version()},
                "configuration": configuration(source, output),
                "tokenizer": tokenizer(source.tokenizer, output.tokenizer),
                "chat_template": chat_template(source, output),
                "tensors": tensors(source, output, report),
            }
            if output.format == "huggingface":
                facts["tokenizer"] |= library(output.path, source.tokenizer)
            if run:
                from llama2.convert import answers

                lossy = {each["rounded_to"] for each in facts["tensors"]["each"].values() if "rounded_to" in each}
                facts["answers"] = answers.compare(source, output, lossy, report)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if source.tokenizer_mode != "auto":
            facts["tokenizer"]["mode"] = source.tokenizer_mode
        if source.adapters:
            facts["adapters"] = [{**adapter.summary(), "path": adapter.path.name} for adapter in source.adapters]
        for name, model, paths in (("source", source, inputs), ("output", output, outputs)):
            files = [{"name": p.name, "bytes": p.stat().st_size, "sha256": digests[p].result()} for p in paths]
            facts[name] = {"name": model.path.name, "format": model.format, "files": files}
    return facts


def _silent(*_: object) -> None:
    pass


def configuration(source: Checkpoint, output: Checkpoint) -> dict[str, Any]:
    """What differs, with both values: only what the output's format cannot hold. Numbers count as float32 has them."""
    differences = {}
    for name in (field.name for field in fields(ModelConfig)):
        before, after = getattr(source.config, name), getattr(output.config, name)
        if before == after:
            continue
        if name == "rope_scaling":
            configs = (source.config, output.config)
            numbers = [np.array([*c.inverse_frequencies(), c.attention_factor()]) for c in configs]
            same = np.allclose(numbers[0], numbers[1], rtol=1e-6, atol=0)
            same = same and configs[0].dynamic_growth() == configs[1].dynamic_growth()
        elif name in ("norm_eps", "rope_theta"):
            same = np.float32(before) == np.float32(after)
        else:
            allowed = name == "context_length" or (name == "tied_embeddings" and before)
            same = output.format == "meta" and allowed
            differences[name] = {"source": before, "output": after}
        if not same:
            raise ParityError(f"{name} was {before} and is {after}")
    if output.format == "huggingface" and output.metadata["tie_word_embeddings"] != output.config.tied_embeddings:
        raise ParityError("config.json and its tensors disagree on whether the output head is tied")
    return {"differences": differences}


def tensors(source: Checkpoint, output: Checkpoint, report: Progress) -> dict[str, Any]:
    """Compare every number of the files, by `layouts`.

    Numbers must have the same bits where the output's format holds all values of the source's. Else `bounds` has
    bounds.
    """
    before, after = layouts.tensors(source), layouts.tensors(output)
    if source.extras.keys() != output.extras.keys():
        raise ParityError(f"the extra tensors {_change([*source.extras], [*output.extras])}")
    names = (*output.config.tensor_shapes(), *source.extras)
    sizes = {name: nbytes(before[name].format, before[name].shape) for name in names}
    done, each = 0, {}
    for name, size in sizes.items():
        each[name] = _tensor(name, before[name], after[name])
        for file in {*before[name].mapped, *after[name].mapped}:
            file.release_pages()
        done += size
        report("comparing", done, sum(sizes.values()))
    equal = sum("rounded_to" not in facts for facts in each.values())
    numbers = sum(math.prod(before[name].shape) for name in each)
    return {"count": len(each), "bitwise_equal": equal, "numbers": numbers, "each": each}


def _tensor(name: str, before: Stored, after: Stored) -> dict[str, Any]:
    exact = not after.group and after.format in (before.format, "F32")
    squares = errors = worst = 0.0
    for rows in _pieces(before):
        a, b = before.rows(rows), after.rows(rows)
        if before.sum is not None:
            _check_merged(name, before, a, before.sum(rows))
        if before.format == after.format and np.array_equal(a, b):
            continue
        shape = (rows.stop - rows.start, before.shape[1])
        x, y = dequantize(a.reshape(-1), before.format, shape), dequantize(b.reshape(-1), after.format, shape)
        if exact:
            wrong, allowed = x.view(np.uint32) != y.view(np.uint32), "the same number"
        else:
            x64, y64 = x.astype(np.float64), y.astype(np.float64)
            block = after.group or FORMATS[after.format].block
            rule = groups if after.group else _rule(name, after.format)
            with np.errstate(invalid="ignore"):
                error = np.abs(x64 - y64)
            bound = np.broadcast_to(rule(x64.reshape(-1, block)), (x.size // block, block)).reshape(shape)
            wrong, allowed = ~(error <= bound), f"as {after.format} rounds it"
            squares, errors = squares + float((x64**2).sum()), errors + float((error**2).sum())
            worst = max(worst, float(error.max()))
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise ParityError(
                f"{name} has {int(wrong.sum())} of {wrong.size} numbers wrong, first at row {rows.start + row}, column "
                f"{column}: {x[row, column]:.9g} became {y[row, column]:.9g}, which is not {allowed}"
            )
    facts: dict[str, Any] = {"source": before.format, "output": after.format}
    if before.sum is not None:
        facts["merged"] = True
    if not exact:
        rms = math.sqrt(errors / squares) if squares else 0.0
        facts |= {"rounded_to": "Q8_0" if after.group else after.format, "relative_rms": rms, "largest_error": worst}
    return facts


def _check_merged(name: str, stored: Stored, data: Bytes, expected: Floats) -> None:
    """Raise ParityError unless a merged matrix is what base and adapters give, as far as float32 and its format go."""
    x = dequantize(data.reshape(-1), stored.format, expected.shape)
    block = FORMATS[stored.format].block
    bound = 2.0**-20 * np.abs(expected).max(axis=1, keepdims=True)
    if stored.format in BOUNDS:
        blocks = expected.reshape(-1, block)
        rounded = np.broadcast_to(BOUNDS[stored.format](blocks), blocks.shape).reshape(expected.shape)
        bound = bound + rounded
    wrong = ~(np.abs(x - expected) <= bound)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ParityError(
            f"{name} has {int(wrong.sum())} of {wrong.size} numbers that are not the base's with its adapters: "
            f"{expected[row, column]:.9g} became {x[row, column]:.9g}"
        )


def _rule(name: str, format: str) -> Bound:
    if format not in BOUNDS:
        raise ParityError(f"{name} became {format}, whose scales are searched for: no bound on its numbers is known")
    return BOUNDS[format]


def _pieces(tensor: Stored) -> Iterator[slice]:
    rows, columns = tensor.shape
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def tokenizer(source: Tokenizer, output: Tokenizer) -> dict[str, Any]:
    """Both vocabularies token by token; the ids that both give `samples.strings` and texts around each added token, and
    the text that the ids give.
    """
    for name in ("kind", "pre", "vocab_size", "bos_id", "eos_id", "stop_ids", "add_bos", "add_eos", "control"):
        before, after = getattr(source, name), getattr(output, name)
        if before != after:
            raise ParityError(f"the tokenizer's {name} {_change(before, after)}")
    unused = _vocabularies(source, output)
    count = 0
    added = [f"a{text}b {text} c" for text in (*source.user, *source.control) if text not in source.normalized]
    asked = [
        *((text, False) for text in (*samples.strings(), *unused.values(), *added)),
        *((text, True) for text in added),
    ]
    for text, special in asked:
        before, after = (_attempt(partial(each.encode, special=special), text) for each in (source, output))
        if before != after:
            raise ParityError(f"the text {_short(text)} has other tokens: {_change(before, after)}")
        if isinstance(before, list):
            count += len(before)
            reverse = before[::-1]  # whole characters become broken ones
            if (source.decode(before), source.decode(reverse)) != (output.decode(before), output.decode(reverse)):
                raise ParityError(f"the tokens {_short(before)} stand for other text")
    for token in range(source.vocab_size):
        data = source.token_bytes(token)
        if output.token_bytes(token) != data and token not in unused:
            raise ParityError(f"token {token} was {data!r} and is {output.token_bytes(token)!r}")
    return {"strings": samples.STRINGS, "tokens": count, "vocabulary": source.vocab_size}


def _vocabularies(source: Tokenizer, output: Tokenizer) -> dict[int, str]:
    """Compare all parts, and return the tokens that are unused in one vocabulary and not in the other.

    Not every format distinguishes them. It makes no difference if no text yields them, not even their own.
    """
    before, after = _attempt(source.vocabulary), _attempt(output.vocabulary)
    if not (isinstance(before, Vocabulary) and isinstance(after, Vocabulary)):
        if source.model_file() != output.model_file():  # a SentencePiece model with rules of its own
            raise ParityError("its tokenizer.model is another")
        return {}
    for name in (field.name for field in fields(Vocabulary)):
        old, new = getattr(before, name), getattr(after, name)
        if name == "types":
            old, new = ([NORMAL if kind == UNUSED else kind for kind in kinds] for kinds in (old, new))
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            i = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
            raise ParityError(f"the vocabulary's {name}: number {i} {_change(old[i], new[i])}")
        if isinstance(old, list) and isinstance(new, list):
            raise ParityError(f"the vocabulary's {name}: there were {len(old)} and are {len(new)}")
        raise ParityError(f"the vocabulary's {name} {_change(old, new)}")
    rows = enumerate(zip(before.pieces, before.types, after.types, strict=True))
    return {token: piece for token, (piece, old, new) in rows if old != new}


def library(folder: Path, source: Tokenizer) -> dict[str, Any]:
    """Compare what transformers reads beside `tokenizer.model`: which tokens begin and end a text, `tokenizer.json`.

    The tokenizers library must give the same tokens for the same texts, and for every token's own.
    Texts with a control token are left out: there, it is one, and here it is text.
    """
    from tokenizers import Tokenizer as Library

    theirs = Library.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    for name, token in (("bos_token", source.bos_id), ("eos_token", source.eos_id)):
        if settings.get(name) != (wanted := None if token is None else theirs.id_to_token(token)):
            raise ParityError(f"tokenizer_config.json: {name} {_change(wanted, settings.get(name))}")
    marks = [*source.control, *([unknown] if (unknown := settings.get("unk_token")) else [])]
    own = (source.token_bytes(token).decode(errors="ignore") for token in range(source.vocab_size))
    count = 0
    for text in (*samples.strings(), *own):
        ids = _attempt(source.encode, text)
        if isinstance(ids, str) or any(mark in text for mark in marks):
            continue
        found = theirs.encode(text, add_special_tokens=False).ids
        if found != ids:
            raise ParityError(f"tokenizer.json: the text {_short(text)} has other tokens: {_change(ids, found)}")
        count += 1
    return {"texts_in_tokenizer_json": count}


def chat_template(source: Checkpoint, output: Checkpoint) -> dict[str, Any]:
    """The templates' texts, and what both make of `samples.dialogs`; nothing where the format has no place for them."""
    lost = bool(source.templates) and output.format in ("meta", "llama2c")
    if source.templates != output.templates and not lost:
        raise ParityError(f"the chat template {_change(source.template, output.template)}")
    refused = tokens = 0
    for i, messages in enumerate(samples.dialogs()):
        before, after = (_attempt(_rendered, messages, model) for model in (source, output))
        if before != after:
            if lost:
                return {"kept": False}
            raise ParityError(f"the chat template makes other tokens of dialog {i}: {_change(before, after)}")
        refused += isinstance(before, str)
        tokens += 0 if isinstance(before, str) else len(before[0])
    return {"kept": True, "dialogs": samples.DIALOGS, "tokens": tokens, "refused": refused}


def _rendered(messages: Sequence[Message], model: Checkpoint) -> tuple[list[int], list[bool]]:
    return Dialog(messages).render(model.tokenizer, model.template, neutralise=True)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or why it refuses."""
    try:
        return function(*arguments)
    except (TokenizerError, DialogError, TemplateError) as error:
        return str(error)


def _change(before: object, after: object) -> str:
    return f"was {_short(before)} and is {_short(after)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def lost(facts: Mapping[str, Any]) -> list[str]:
    """What the output's format has no place for, in words."""
    changed = facts["configuration"]["differences"].get("context_length")
    words = []
    if changed:
        words.append(f"the context of {changed['source']:,} tokens, which will be taken to be {changed['output']:,}")
    if not facts["chat_template"]["kept"]:
        words.append("the chat template, so that chats will be rendered in Llama 2's own format")
    return words
