"""Token ids and decoded text equal to sentencepiece's and tokenizers', also for vocabularies rebuilt from GGUF."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, pre_tokenizers

from llama2.text import tokenizer, tokenizer_folder
from llama2.text.dialog import Dialog, Message
from llama2.text.template import known
from llama2.text.tokenizer import Tokenizer, from_pieces, from_sentencepiece
from texts import strings, train_bpe, train_sentencepiece

TEXTS = strings(1500)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_sentencepiece(sentencepiece_model: bytes, rebuilt: bool, tmp_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    ours = _from_gguf_parts(library) if rebuilt else _saved(sentencepiece_model, tmp_path)
    tool = library.piece_to_id("<tool>")
    for text in TEXTS:  # what stands between added tokens is encoded alone, as llama.cpp and transformers do it
        parts = [library.encode(part) for part in text.split("<tool>")]
        assert ours.encode(text) == [token for i, ids in enumerate(parts) for token in ([tool] if i else []) + ids], (
            text
        )
    assert (ours.bos_id, ours.eos_id, set(ours.stop_ids), ours.add_bos) == (1, 2, {2}, True)
    rng = random.Random(1)
    for ids in [library.encode(text) for text in TEXTS] + [
        [rng.randrange(library.get_piece_size()) for _ in range(rng.randint(0, 12))] for _ in range(1500)
    ]:
        assert ours.decode(ids) == library.decode(ids), ids


def _saved(model: bytes, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    return from_sentencepiece(folder / "tokenizer.model")


def _from_gguf_parts(library: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    tests = (library.is_unknown, library.is_control, library.is_unused, library.is_byte)
    ids = range(library.get_piece_size())
    types = [next((t for t, test in zip((2, 3, 5, 6), tests, strict=True) if test(i)), 1) for i in ids]
    pieces = [library.id_to_piece(i) for i in ids]
    for symbol in ("<tool>", "▁▁▁"):
        types[pieces.index(symbol)] = 4
    return from_pieces([piece.encode() for piece in pieces], [library.get_score(i) for i in ids], types)


@pytest.mark.parametrize("pre", ["gpt2", "smollm", "llama-bpe"])
def test_byte_level_bpe(pre: str, tmp_path: Path) -> None:
    path = train_bpe(pre, tmp_path / "tokenizer.json")
    library, ours = Library.from_file(str(path)), tokenizer_folder.read(path.parent)
    plain = Library.from_file(str(path))
    plain.encode_special_tokens = True
    assert (ours.pre, ours.vocab_size, ours.bos_id, ours.eos_id) == (pre, library.get_vocab_size(), 0, 1)
    for text in [*TEXTS, "a<tool>b", "<tool><tool><tool>", "<|eot_id|>x<|eot_id|>"]:
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids, text
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == library.decode(ids), text
    rng = random.Random(1)
    for _ in range(1500):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randint(0, 12))]
        assert ours.decode(ids) == library.decode(ids), ids


def test_default_model_against_transformers(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    import llama2.checkpoint

    theirs = AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name)
    # transformers takes no notice of the file's pre-tokenizer; SmolLM2's own repository has this one
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.backend_tokenizer.decoder = decoders.ByteLevel()
    checkpoint = llama2.checkpoint.open(model_path)
    ours = checkpoint.tokenizer
    assert checkpoint.template is not None
    assert known(checkpoint.template) == "SmolLM2"
    _assert_same_ids(theirs, ours, checkpoint.template)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


DIALOGS = [
    Dialog([Message(role, content) for role, content in zip(roles, texts, strict=False)])
    for roles in (["user", "assistant"] * 3, ["system", *["user", "assistant"] * 3])
    for texts in ([" Hello,\n", "Hi ", "a <b> c", "\n\n日本語 😀", "12 345", "don't"][:n] for n in range(2, 7))
]
TEMPLATES = {
    "ChatML": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "a stranger's": "{{- bos_token }}\n{%- for message in messages %}\n  {%- if message.role == 'system' %}\n"
    "{{- '<<' ~ message.content.strip() ~ '>>' }}\n  {%- else %}\n"
    "    {{- '<|start_header_id|>' ~ message.role ~ ': ' }}{{ message.content | tojson }}<|eot_id|>\n  {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}<|start_header_id|>assistant: {% endif %}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_against_transformers(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = train_bpe("llama-bpe", tmp_path / "tokenizer.json")
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)  # type: ignore[no-untyped-call]
    ours = tokenizer_folder.read(path.parent)
    assert (known(TEMPLATES[name]) or "a stranger's") == name
    _assert_same_ids(theirs, ours, TEMPLATES[name])


def _assert_same_ids(theirs: Any, ours: Tokenizer, template: str) -> None:
    for dialog in DIALOGS:
        messages = [{"role": m.role, "content": m.content} for m in dialog.messages]
        asks = messages[-1]["role"] == "user"
        ids = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=asks)["input_ids"]
        assert dialog.render(ours, template)[0] == ids, messages


@pytest.mark.parametrize("pre", ["gpt2", "smollm", "llama-bpe"])
def test_long_texts_are_cut_between_words_only(pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train_bpe(pre, tmp_path / "tokenizer.json")
    plain, ours = Library.from_file(str(path)), tokenizer_folder.read(path.parent)
    plain.encode_special_tokens = True
    monkeypatch.setattr(tokenizer, "_CHUNK", 1)  # cut wherever it is allowed
    text = "".join(strings(3000, seed=3, words=1)).replace("<tool>", "")
    assert len(list(tokenizer._cuts(text))) > 10_000
    assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids
