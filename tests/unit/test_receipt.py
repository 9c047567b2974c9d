"""Mistakes put into the conversion's code, or into what it wrote. The receipt must notice each, and nothing be left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversions import Sources
from llama2 import checkpoint
from llama2.checkpoint import Checkpoint, gguf, gguf_writer, hf_folder, llama2c, meta
from llama2.convert import answers, convert, receipt
from llama2.errors import EngineError, ParityError
from llama2.text import tokenizer as tokenizers
from meta_bytes import CONFIG
from texts import from_parts

Patch = pytest.MonkeyPatch

LAST = CONFIG.vocab_size - 1
WRITERS = {"meta": meta, "hf": hf_folder, "gguf": gguf_writer, "llama2c": llama2c}


def swapped(module: Any, table: str, *names: str) -> Callable[[Patch], None]:
    """Two entries of a table that reader and writer share change places."""

    def apply(patch: Patch) -> None:
        values = getattr(module, table)
        other = dict(zip(names, reversed(names), strict=True))
        patch.setattr(
            module,
            table,
            {name: values[other.get(name, name)] for name in values}
            if isinstance(values, dict)
            else tuple(other.get(name, name) for name in values),
        )

    return apply


def damaged(to: str, change: Callable[[Checkpoint], Checkpoint]) -> Callable[[Patch], None]:
    """The writer is given another model."""
    write = WRITERS[to].write
    return lambda patch: patch.setattr(WRITERS[to], "write", lambda model, *a, **k: write(change(model), *a, **k))


def rewritten(file: str, change: Callable[[Any], object]) -> Callable[[Patch], None]:
    """A JSON file of Hugging Face's is changed after it was written."""
    write = hf_folder.write

    def written(model: Checkpoint, folder: Path) -> None:
        write(model, folder)
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return lambda patch: patch.setattr(hf_folder, "write", written)


def config(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda model: replace(model, config=replace(model.config, **changes))


def moved(**instead: str) -> Callable[[Checkpoint], Checkpoint]:
    """Tensors of each layer hold what others do."""

    def change(model: Checkpoint) -> Checkpoint:
        tensors = dict(model.tensors)
        for name in tensors:
            kind = name.split(".")[-2]
            if kind in instead:
                tensors[name] = replace(model.tensors[name.replace(kind, instead[kind])], name=name)
        return replace(model, tensors=tensors)

    return change


def flipped(name: str, row: int) -> Callable[[Checkpoint], Checkpoint]:
    """One bit of a row's first number."""

    def change(model: Checkpoint) -> Checkpoint:
        tensor = model.tensors[name]
        data = tensor.data.copy()
        data.reshape(tensor.shape[0], -1)[row, 0] ^= 1
        return replace(model, tensors={**model.tensors, name: replace(tensor, source=data)})

    return change


def vocabulary(**changes: Callable[[Any], Any]) -> Callable[[Checkpoint], Checkpoint]:
    """Parts of the tokenizer become what these functions make of them."""

    def change(model: Checkpoint) -> Checkpoint:
        tokenizer = model.tokenizer
        made = tokenizer.vocabulary()
        parts = {name: getattr(made, name) for name in made.__slots__}
        parts |= {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "add_bos", "add_eos")}
        parts |= {name: make(parts[name]) for name, make in changes.items()}
        return replace(model, tokenizer_source=lambda: from_parts(**parts))

    return change


def changed(index: int, value: object) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:index], value, *values[index + 1 :]]


def backwards(pieces: Callable[..., Any], *arguments: Any) -> list[Any]:
    return list(pieces(*arguments))[::-1]


def unpermuted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hf_folder, "heads_of", lambda *_: None)


WQ = r"layers\.0\.attention\.wq\.weight has \d+ of \d+ numbers wrong"
Mistake = tuple[str, str, Callable[[Patch], None], str]  # source, to, what, message

#: In tables and rules that reader and writer of a format share, so that what one does the other undoes.
SHARED: dict[str, Mistake] = {
    "hf, wq and wk swapped": (
        *("gguf", "hf"),
        swapped(hf_folder, "_LAYER_NAMES", "attention.wq", "attention.wk"),
        WQ,
    ),
    "from hf, wq and wk swapped": (
        *("hf", "gguf"),
        swapped(hf_folder, "_LAYER_NAMES", "attention.wq", "attention.wk"),
        WQ,
    ),
    "gguf, wq and wk swapped": ("hf", "gguf", swapped(gguf, "_LAYER_NAMES", "attn_q", "attn_k"), WQ),
    "llama2c, wq and wk swapped": (
        *("hf", "llama2c"),
        swapped(llama2c, "_LEGACY_ORDER", "attention.wq", "attention.wk"),
        WQ,
    ),
    "hf, no permutation": ("gguf", "hf", lambda patch: patch.setattr(hf_folder, "heads_of", lambda *_: None), WQ),
    "from hf, no permutation": (
        "hf",
        "gguf",
        lambda patch: patch.setattr(hf_folder, "heads_of", lambda *_: None),
        WQ,
    ),
    "meta, wo cut along its rows": (
        *("gguf", "meta"),
        lambda patch: patch.setattr(
            meta, "_axis", lambda name, shape: None if len(shape) == 1 else int("tok_" in name)
        ),
        r"layers\.0\.attention\.wo\.weight has shape \(16, 256\), must be \(64, 64\)",
    ),
    "meta, embeddings cut along their rows": (
        *("gguf", "meta"),
        lambda patch: patch.setattr(
            meta, "_axis", lambda name, shape: None if len(shape) == 1 else int("w" in name[-9:-7])
        ),
        r"tok_embeddings\.weight has shape",
    ),
}

#: In a writer alone.
WRITTEN: dict[str, Mistake] = {
    "hf, no permutation when written": (
        *("gguf", "hf"),
        lambda patch: patch.setattr(hf_folder, "in_halves", lambda tensor, heads: tensor),
        WQ,
    ),
    "meta, shards in another order": (
        *("gguf", "meta"),
        lambda patch: patch.setattr(meta, "_pieces", partial(backwards, meta._pieces)),
        r"tok_embeddings\.weight has \d+ of",
    ),
    "hf, EOS in config.json": (
        *("gguf", "hf"),
        rewritten("config.json", lambda values: values.update(eos_token_id=5)),
        "stop_ids was .*2.* and is .*5",
    ),
    "hf, EOS in generation_config.json": (
        *("gguf", "hf"),
        rewritten("generation_config.json", lambda values: values.update(eos_token_id=5)),
        "stop_ids was .*2.* and is .*5",
    ),
    "hf, EOS in tokenizer_config.json": (
        *("gguf", "hf"),
        rewritten("tokenizer_config.json", lambda values: values.update(eos_token="<unk>")),
        "eos_id was 2 and is 0",
    ),
    "hf, a merge less in tokenizer.json": (
        *("gguf", "hf"),
        rewritten("tokenizer.json", lambda values: values["model"]["merges"].pop(100)),
        r"the text .* has other tokens",
    ),
    "hf, a merge less, byte-level": (
        *("bpe", "hf"),
        rewritten("tokenizer.json", lambda values: values["model"]["merges"].pop(10)),
        "merges: there were 23 and are 22",
    ),
    "gguf, a merge less, byte-level": (
        *("bpe", "gguf"),
        damaged("gguf", vocabulary(merges=lambda merges: merges[:-1])),
        "merges: there were 23 and are 22",
    ),
    "hf, the flag for a tied head": (
        *("gguf", "hf"),
        rewritten("config.json", lambda values: values.update(tie_word_embeddings=True)),
        "whether the output head is tied",
    ),
    "hf, another template": (
        *("bpe", "hf"),
        rewritten("tokenizer_config.json", lambda values: values.update(chat_template=values["chat_template"] + " ")),
        "the chat template was",
    ),
    "gguf, another template": (
        *("bpe", "gguf"),
        damaged("gguf", lambda model: replace(model, template=None)),
        "the chat template was .* and is None",
    ),
    "meta, another EOS": ("gguf", "meta", damaged("meta", vocabulary(eos_id=lambda _: 1)), "eos_id was 2 and is 1"),
    "gguf, another EOS": ("hf", "gguf", damaged("gguf", vocabulary(eos_id=lambda _: 1)), "eos_id was 2 and is 1"),
    "gguf, no BOS in front": ("hf", "gguf", damaged("gguf", vocabulary(add_bos=lambda _: False)), "add_bos was True"),
    "gguf, no space in front": (
        *("hf", "gguf"),
        damaged("gguf", vocabulary(prepend_scheme=lambda _: "never")),
        "prepend_scheme was 'always' and is 'never'|other tokens",
    ),
    "gguf, a control token": (
        *("hf", "gguf"),
        damaged("gguf", vocabulary(types=changed(2, 1))),
        "control was",
    ),
    "llama2c, another context": (
        "hf",
        "llama2c",
        damaged("llama2c", config(context_length=64)),
        "context_length was 4096",
    ),
}
for to, source in (("meta", "gguf"), ("hf", "gguf"), ("gguf", "hf"), ("llama2c", "hf")):
    WRITTEN |= {
        f"{to}, {what}": (source, to, damaged(to, change), message)
        for what, change, message in (
            ("wq and wk swapped when written", moved(wq="wk", wk="wq"), WQ),
            ("w1 for w3", moved(w3="w1"), r"w3\.weight has"),
            ("a layer's norm for the other's", moved(ffn_norm="attention_norm"), r"ffn_norm\.weight has"),
            (
                "a bit of the last embedding",
                flipped("tok_embeddings.weight", LAST),
                rf"tok_embeddings\.weight has 1 of \d+ numbers wrong, first at row {LAST}, column 0",
            ),
            ("a token's score", vocabulary(scores=changed(LAST, 0.5)), f"scores: number {LAST} was"),
            ("a token's text", vocabulary(pieces=changed(300, "never")), "pieces: number 300 was"),
        )
    }
    if to != "llama2c":
        WRITTEN |= {
            f"{to}, norm_eps": (source, to, damaged(to, config(norm_eps=2e-5)), "norm_eps was .* and is"),
            f"{to}, rotary base": (source, to, damaged(to, config(rope_theta=10001.0)), "rope_theta was .* and is"),
        }


@pytest.mark.parametrize("name", [*SHARED, *WRITTEN])
def test_mistakes_are_noticed(name: str, sources: Sources, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, to, mistake, message = (SHARED | WRITTEN)[name]
    mistake(monkeypatch)
    with pytest.raises(ParityError, match=message) as caught:
        convert(sources[source], out / "model", to, shards=4 if to == "meta" else 1, run=False)
    assert not list(out.iterdir())
    assert str(caught.value).startswith(f"{out / 'model'}: would not be the same model as {sources[source]}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["hf, no permutation", "gguf, wq and wk swapped", "meta, embeddings cut along their rows"]
)
def test_our_own_reader_sees_none_of_the_shared_mistakes(
    name: str, sources: Sources, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is why the receipt compares files by definitions of its own (layouts.py)."""
    source, to, mistake, _ = SHARED[name]
    before = checkpoint.open(sources[source])
    mistake(monkeypatch)
    WRITERS[to].write(before, out / "model", **({"shards": 4} if to == "meta" else {}))
    after = checkpoint.open(out / "model")
    assert all(after.tensors[name].data.tobytes() == tensor.data.tobytes() for name, tensor in before.tensors.items())


def test_answers_notice_what_numbers_do_not_show(sources: Sources, out: Path) -> None:
    source = checkpoint.open(sources["gguf"])
    same = answers.compare(source, source, (), silent)
    assert (same["bitwise_equal"], same["same_tokens"], same["largest_divergence"]) == (True, 200, 0)
    other = config(norm_eps=2e-5)(source)
    with pytest.raises(ParityError, match=r"logits differ by up to .*, from token 0 of an answer on"):
        answers.compare(source, other, (), silent)
    rounded = answers.compare(source, config(norm_eps=1.01e-5)(source), ("F16",), silent)
    assert 0 < rounded["mean_divergence"] < 0.01 == rounded["divergence_limit"]
    with pytest.raises(ParityError, match=r"diverge by .* nats on average; the limit is 0\.01"):
        answers.compare(source, moved(wq="wk", wk="wq", wv="wo")(source), ("F16",), silent)
    numbers = source.tensors["norm.weight"].dequantize() * float("nan")
    broken = replace(source.tensors["norm.weight"], source=numbers.view("u1"))
    with pytest.raises(EngineError, match=r"model\.gguf: .*not a number"):
        answers.compare(replace(source, tensors={**source.tensors, "norm.weight": broken}), source, (), silent)


def test_divergence_by_hand() -> None:
    """P = (1/2, 1/4, 1/4), Q = (1/4, 1/4, 1/2): ½ ln 2 + ¼ ln 1 + ¼ ln ½ = ¼ ln 2."""
    p, q = (np.log(np.array(values, np.float32)) + 3 for values in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5)))
    assert answers._divergence(p, q) == pytest.approx(math.log(2) / 4, rel=1e-6)


def silent(*_: object) -> None:
    pass


def test_an_unused_token_that_a_text_yields() -> None:
    """In one vocabulary "zq" is not used; in the other no text of the samples has it, but its own."""
    pieces, scores = ["<unk>", "<s>", "</s>", "▁", "z", "q", "zq"], [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -0.5]
    before, after = (tokenizers.from_pieces(pieces, scores, [2, 3, 3, 1, 1, 1, last]) for last in (5, 1))
    with pytest.raises(ParityError, match="the text 'zq' has other tokens"):
        receipt.tokenizer(before, after)


@pytest.mark.parametrize(("kind", "token"), [(tokenizers.USER_DEFINED, "<tool>"), (tokenizers.NORMAL, "<s>")])
def test_a_space_less_behind_an_added_token(kind: int, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabularies are the same; of <tool> text yields the token, of <s> a template alone."""
    pieces, scores = (
        ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "<tool>"],
        [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, 0.0],
    )
    before, after = (tokenizers.from_pieces(pieces, scores, [2, 3, 3, 1, 1, 1, 1, kind]) for _ in range(2))
    assert receipt.tokenizer(before, after)["vocabulary"] == 8
    spaced = after._encode_plain
    monkeypatch.setattr(after, "_encode_plain", lambda text, begins: spaced(text, begins)[0 if begins else 1 :])
    with pytest.raises(ParityError, match=f"the text 'a{token}b {token} c' has other tokens"):
        receipt.tokenizer(before, after)
