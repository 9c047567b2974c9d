"""Vocabularies that are damaged or hostile, texts that are too long or not Unicode, and where answers end."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from llama2.errors import TokenizerError
from llama2.text import library, modelproto, splits, tokenizer_folder
from llama2.text import tokenizer as tokenizers
from llama2.text.tokenizer import Tokenizer, from_sentencepiece
from texts import from_parts, train_bpe, train_sentencepiece

# A byte-level vocabulary by hand: three control tokens, printable ASCII and space, two merges, one user-defined token.
ASCII = [chr(byte) for byte in range(0x21, 0x7F)] + ["Ġ"]
BPE: dict[str, Any] = {
    "kind": "bpe",
    "pieces": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ASCII, "ab", "Ġab", "<tool>"],
    "types": [3, 3, 3] + [1] * (len(ASCII) + 2) + [4],
    "merges": ["a b", "Ġ ab"],
    "scores": None,
    "pre": "smollm",
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 0,
    "add_bos": False,
    "add_eos": False,
    "prepend_scheme": "never",
}
AB, SPACE_AB, TOOL = len(ASCII) + 3, len(ASCII) + 4, len(ASCII) + 5
SENTENCEPIECE: dict[str, Any] = {
    **BPE,
    "kind": "sentencepiece",
    "pieces": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"],
    "types": [2, 3, 3] + [6] * 256 + [1] * 4,
    "scores": [0.0] * 259 + [-2.0, -3.0, -4.0, -1.0],
    "merges": None,
    "pre": None,
    "add_bos": True,
    "prepend_scheme": "always",
}


def build(base: dict[str, Any], **changes: Any) -> Tokenizer:
    return from_parts(**{**base, **changes})


def changed(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


def test_byte_level_vocabulary_by_hand() -> None:
    ours = build(BPE)
    assert ours.encode("ab ab") == [AB, SPACE_AB]
    assert ours.encode("a<tool>b") == [BPE["pieces"].index("a"), TOOL, BPE["pieces"].index("b")]
    assert ours.encode("<|im_end|>", special=True, bos=True, eos=True) == [1, 2, 2]
    assert 2 not in ours.encode("<|im_end|>")
    assert ours.decode([1, AB, SPACE_AB, TOOL, 2]) == "ab ab<tool>"
    assert ours.token_bytes(SPACE_AB) == b" ab"
    assert ours.token_bytes(2) == b""
    assert ours.stop_ids == {0, 2}


def test_llama3_takes_a_whole_word_before_its_merges() -> None:
    whole = {"pieces": [*BPE["pieces"], "zz"], "types": [*BPE["types"], 1]}
    z = BPE["pieces"].index("z")
    assert build(BPE, **whole, pre="llama-bpe").encode("zz zz") == [TOOL + 1, *build(BPE).encode(" zz")]
    assert build(BPE, **whole, pre="gpt2").encode("zz") == [z, z]


def test_sentencepiece_vocabulary_by_hand() -> None:
    ours = build(SENTENCEPIECE)
    assert ours.encode("ab", bos=True, eos=True) == [1, 262, 261, 2]  # ▁a b
    assert ours.encode(" ab") == [259, 262, 261]
    assert ours.encode("é") == [259, 0xC3 + 3, 0xA9 + 3]
    assert ours.decode([262, 261, 262]) == "ab a"  # the space that encoding put first is gone, others stay
    assert ours.token_bytes(262) == b" a"
    assert ours.decode([0xC3 + 3, 261]) == "\ufffdb"
    stream = ours.stream()
    assert [stream.push(0xC3 + 3), stream.push(0xA9 + 3), stream.push(0xE2 + 3), stream.flush()] == [
        *("", "é", ""),
        "\ufffd",
    ]
    assert build(SENTENCEPIECE, prepend_scheme="never").encode("ab") == [260, 261]


#: With contractions, digits, line ends, scripts, currency, and a mark without a letter before a space.
TEXT = "I'LL don't 12345\r\n  camelCase_Привет はa漢 $5`=\n/ ½ x\u0301 \n"
_MIDDLE, _LLAMA3_END = "\r\n¦ ¦ camelCase¦_Привет¦ はa漢¦ $¦5¦", "`=\n¦/¦ ¦½¦ x¦\u0301¦ \n"
_DEEPSEEK = "I¦'¦LL¦ don¦'¦t¦ ¦{}¦\r¦\n¦ ¦ camelCase¦_¦Привет¦ ¦は¦a¦漢¦ $¦5¦`=¦\n¦/¦ ¦½¦ x¦"
#: By the name of a pre-tokenizer in a GGUF file, the words of TEXT, worked out from its family's expressions by hand.
WORDS = {
    "starcoder": "I¦'¦LL¦ don¦'t¦ ¦1¦2¦3¦4¦5¦\r\n ¦ camelCase¦_¦Привет¦ はa漢¦ $¦5¦`=¦\n¦/¦ ¦½¦ x¦\u0301¦ \n",
    "gpt-2": "I¦'¦LL¦ don¦'t¦ 12345¦\r\n ¦ camelCase¦_¦Привет¦ はa漢¦ $¦5¦`=¦\n¦/¦ ½¦ x¦\u0301¦ \n",
    "pixtral": f"I¦'LL¦ don¦'t¦ ¦123¦45¦{_MIDDLE}{_LLAMA3_END}",
    "smaug-bpe": f"I¦'LL¦ don¦'t¦ ¦123¦45¦{_MIDDLE}{_LLAMA3_END}",
    "stablelm2": f"I¦'LL¦ don¦'t¦ ¦1¦2¦3¦4¦5¦{_MIDDLE}{_LLAMA3_END}",
    "tekken": "I¦'LL¦ don¦'t¦ ¦1¦2¦3¦4¦5¦\r\n¦ ¦ camel¦Case¦_Привет¦ はa漢¦ $¦5¦`=\n/¦ ¦½¦ x\u0301¦ \n",
    "deepseek-llm": _DEEPSEEK.format("12345") + "\u0301¦ ¦\n",
    "deepseek-coder": _DEEPSEEK.format("1¦2¦3¦4¦5") + "\u0301 ¦\n",
    "deepseek-v3": "I¦'LL¦ don¦'t¦ ¦123¦45¦\r\n¦ ¦ camelCase¦_¦Привет¦ ¦は¦a¦漢¦ $¦5¦`=\n¦/¦ ¦½¦ x\u0301¦ \n",
    "falcon": "I¦'¦LL¦ don¦'¦t¦ ¦123¦45¦\r\n ¦ camelCase¦_¦Привет¦ はa漢¦ ¦$¦5¦`=¦\n¦/¦ ½¦ x¦\u0301¦ \n",
    "default": "I¦'¦LL¦ don¦'¦t¦ ¦123¦45¦\r\n ¦ camelCase¦_¦Привет¦ はa漢¦ ¦$¦5¦`¦=¦\n¦/¦ ¦½¦ x¦\u0301¦ \n",
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_byte_level_vocabularies(name: str) -> None:
    rules = splits.pre_tokenizer(splits.PRE_TOKENIZERS[name])
    assert [TEXT[start:end] for _, (start, end) in rules.pre_tokenize_str(TEXT)] == WORDS[name].split("¦")


def test_every_way_to_split_text_is_known_by_its_rules() -> None:
    """As tokenizer.json writes them; some have line ends themselves in their expressions, as DeepSeek V3's."""
    assert {splits.PRE_TOKENIZERS[name] for name in WORDS} == {*splits.PRE_TOKENIZERS.values()} == {*splits.SPLITS}
    for name, (_, ignores) in splits.SPLITS.items():
        rules = library.state(splits.pre_tokenizer(name))
        assert splits.find(rules, ignores) == name
        spelt = json.dumps(rules).replace(r"\\r\\n", r"\r\n")
        assert splits.find(json.loads(spelt), ignores) == name
    for other in (None, {"type": "ByteLevel", "add_prefix_space": True}, {"type": "Whitespace"}):
        assert splits.find(other, ignores=False) is None


@pytest.mark.parametrize("text", ["<|im_start|>", "<|eot_id|>", "<｜User｜>", "<start_of_turn>", "</s>"])
@pytest.mark.parametrize("base", [BPE, SENTENCEPIECE])
def test_user_defined_role_tokens_are_control_tokens(base: dict[str, Any], text: str) -> None:
    pieces = [piece if piece != text else "<gone>" for piece in base["pieces"]]
    ours = build(
        base, pieces=[*pieces, text], types=[*base["types"], 4], scores=base["scores"] and [*base["scores"], 0.0]
    )
    assert ours.control[text] == len(pieces)
    assert len(pieces) not in ours.encode(text)
    assert ours.encode(text, special=True) == [len(pieces)]


def test_user_defined_role_tokens_of_a_model_file(tmp_path: Path) -> None:
    model = train_sentencepiece().replace(b"<tool>", b"<|ab|>")  # same length, so the bytes stay a whole message
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = from_sentencepiece(tmp_path / "tokenizer.model")
    assert ours.control == {"<s>": 1, "</s>": 2, "<|ab|>": 3}
    assert 3 not in ours.encode("<|ab|>")


def test_end_of_turn_tokens_are_stops() -> None:
    assert build(BPE, eot_id=0, eos_id=1).stop_ids == {0, 1, 2}
    assert build(BPE, types=changed(BPE["types"], 2, 1), eos_id=1).stop_ids == {0, 1}  # <|im_end|> as ordinary text
    assert build(SENTENCEPIECE, eos_id=None).stop_ids == {2}
    assert build(SENTENCEPIECE, types=changed(SENTENCEPIECE["types"], 0, 3)).control == {"<s>": 1, "</s>": 2}


@pytest.mark.parametrize(
    ("base", "changes", "reason"),
    [
        (BPE, {"types": BPE["types"][:-1]}, "needs as many token types"),
        (BPE, {"types": changed(BPE["types"], 5, 7)}, "from 1 to 6"),
        (BPE, {"pieces": changed(BPE["pieces"], 5, "ab")}, "'ab' twice"),
        (BPE, {"pieces": changed(BPE["pieces"], 5, b"\xff")}, "token 5 of the vocabulary is not UTF-8"),
        (BPE, {"pieces": changed(BPE["pieces"], 3, "zz")}, "no token for '!'"),
        (BPE, {"merges": ["a zz"]}, "merges are damaged"),
        (BPE, {"merges": ["a c"]}, "merges are damaged"),
        (BPE, {"merges": ["ab"]}, "merges are damaged"),
        (BPE, {"merges": ["a b c"]}, "merges are damaged"),
        (BPE, {"pre": "viking"}, "'viking' is not supported; known: smollm, starcoder"),
        (BPE, {"pieces": changed(BPE["pieces"], 5, "x" * 1025)}, "token 5 of the vocabulary has 1025 characters"),
        (BPE, {"pre": None}, "is not supported"),
        (BPE, {"eos_id": 999}, "eos_id 999 is outside the vocabulary of 101"),
        (BPE, {"bos_id": -1}, "bos_id -1"),
        (BPE, {"eot_id": 101}, "eot_id 101"),
        (SENTENCEPIECE, {"unk_id": 263}, "unk_id 263"),
        (SENTENCEPIECE, {"scores": None}, "finite scores"),
        (SENTENCEPIECE, {"scores": SENTENCEPIECE["scores"][1:]}, "finite scores"),
        (SENTENCEPIECE, {"scores": changed(SENTENCEPIECE["scores"], 9, float("nan"))}, "finite scores"),
        (SENTENCEPIECE, {"pieces": changed(SENTENCEPIECE["pieces"], 70, "x")}, "must be <0x00> to <0xFF>"),
        (SENTENCEPIECE, {"types": changed(SENTENCEPIECE["types"], 70, 1)}, "255 byte tokens"),
        (SENTENCEPIECE, {"types": changed(SENTENCEPIECE["types"], 0, 3), "unk_id": None}, "needs an unknown token"),
    ],
)
def test_damaged_vocabularies_are_refused_in_one_line(
    base: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TokenizerError) as caught:
        build(base, **changes)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_padding_and_pieces_without_text_are_not_used() -> None:
    types = [*SENTENCEPIECE["types"], 2, 1]
    ours = build(
        SENTENCEPIECE,
        pieces=[*SENTENCEPIECE["pieces"], "<pad>", ""],
        types=types,
        scores=[*SENTENCEPIECE["scores"], 0, 0],
    )
    assert ours.encode("ab") == [262, 261]
    assert (ours.token_bytes(263), ours.token_bytes(264)) == (b"", b"")
    assert ours.vocabulary().types[-2:] == [5, 5]


def test_truncated_model_files_are_refused(tmp_path: Path) -> None:
    model, path = train_sentencepiece(), tmp_path / "tokenizer.model"
    trainer = model.index(b"\x0a\x00", len(model) // 2) if b"\x0a\x00" in model else len(model) // 2
    for size in {*range(0, len(model) - 40, 97), *range(trainer - 40, trainer + 40), *range(1, 64)} - {0}:
        path.write_bytes(model[:size])
        with pytest.raises(TokenizerError, match=r"not a whole SentencePiece model.*fetch it again$"):
            from_sentencepiece(path)
    path.write_bytes(b"")
    with pytest.raises(TokenizerError, match="is empty"):
        from_sentencepiece(path)
    for garbage in (b"GGUF" * 99, bytes(range(256)) * 9, b"\xff" * 999, b'{"version": "1.0"}'):
        path.write_bytes(garbage)
        with pytest.raises(TokenizerError, match="not a whole SentencePiece model"):
            from_sentencepiece(path)
    with pytest.raises(TokenizerError, match="no such file"):
        from_sentencepiece(tmp_path / "missing.model")


def model_of(*more: bytes) -> bytes:
    """A SentencePiece model of 263 pieces, and `more`, each a SentencePiece as protobuf writes it."""
    parts: list[Any] = [SENTENCEPIECE[name] for name in ("pieces", "scores", "types")]
    model = modelproto.build(*parts, unk_id=0, bos_id=1, eos_id=2, byte_fallback=True, add_dummy_prefix=True)
    return model + b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in more)


@pytest.mark.parametrize("kind", [tokenizers.NORMAL, tokenizers.USER_DEFINED])
def test_pieces_that_are_too_long_for_a_model_file(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for size in (1024, 1025):
        long = "é" * size  # whose bytes are twice as many
        path.write_bytes(model_of() + modelproto.pieces([(long, -9.0, kind)]))
        whole = from_sentencepiece, path
        path.with_name("added").write_bytes(model_of())
        added = partial(from_sentencepiece, added=[(long, kind)]), path.with_name("added")
        for read, file in (whole, added):
            if size == 1024:
                assert read(file).token_bytes(263) == long.encode()
            else:
                with pytest.raises(TokenizerError, match="token 263 of the vocabulary has 1025 characters"):
                    read(file)


@pytest.mark.parametrize(
    ("kind", "type"),
    [(b"", 1), (b"\x18\x04", 4), (b"\x18\xac\x02", 1), (b"\x1a\x01\x04", 1)],
    ids=["normal", "user-defined", "type 300", "type that is text"],
)
@pytest.mark.parametrize("score", [b"\x10\x07", b"\x11" + bytes(8), b"\x12\x01x"], ids=["varint", "8 bytes", "text"])
def test_a_score_that_is_not_a_float(score: bytes, kind: bytes, type: int, tmp_path: Path) -> None:
    """It counts as one that is not there, as protobuf has it; so does a type that there is none of."""
    model = model_of(b"\x0a\x02zz" + score + kind)
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours, theirs = from_sentencepiece(tmp_path / "tokenizer.model"), SentencePieceProcessor(model_proto=model)
    made = ours.vocabulary()
    assert made.scores == [theirs.get_score(token) for token in range(264)]
    assert (made.scores[-1], made.types[-1]) == (0, type)
    assert ours.token_bytes(263) == b"zz"


def test_damage_that_the_library_passes_over(tmp_path: Path) -> None:
    """Pieces that are not UTF-8, and fields that are whole for protobuf alone: a group, or a trainer of four bytes."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_of(b"\x0a\x02z\x80"))
    with pytest.raises(TokenizerError, match=r"not a whole SentencePiece model \('utf-8' codec"):
        from_sentencepiece(path)
    for model in (model_of(b"\x0a\x02zz\x3b\x3c"), model_of() + b"\x15\0\0V\xc3"):
        path.write_bytes(model)
        ours = from_sentencepiece(path)
        assert ours.encode("ab") == SentencePieceProcessor(model_proto=model).encode("ab")
        with pytest.raises(TokenizerError, match=r"its SentencePiece model is damaged \(.*\); fetch it again"):
            ours.vocabulary()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {},
    ],
)
def test_rules_that_only_a_model_file_says(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    ours = from_sentencepiece(tmp_path / "tokenizer.model")
    if options:
        with pytest.raises(TokenizerError, match="is not BPE, or changes texts"):
            ours.vocabulary()
    else:
        assert len(ours.vocabulary().pieces) == 700


def test_damaged_tokenizer_json_is_refused(tmp_path: Path) -> None:
    path = train_bpe("gpt2", tmp_path / "tokenizer.json", vocab_size=300)
    good = json.loads(path.read_text())
    bad: list[Any] = [
        *([], {}, "x", None, {"model": {}}),
        good | {"model": good["model"] | {"type": "WordPiece"}},
        good | {"model": good["model"] | {"merges": [["x", "yz"]]}},
        good | {"model": good["model"] | {"vocab": {**good["model"]["vocab"], "far": 10**9}}},
        good | {"added_tokens": [{"id": 10**12, "content": "far", "special": True}]},
        good | {"added_tokens": [{"id": 1}]},
        good | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        good | {"added_tokens": [{**good["added_tokens"][0], "id": 303, "content": "x" * 1025}]},
    ]
    for text in [json.dumps(b) for b in bad] + ["{", "[" * 10**5, "\x00"]:
        path.write_text(text)
        with pytest.raises(TokenizerError) as caught:
            tokenizer_folder.read(path.parent)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [BPE, SENTENCEPIECE])
def test_text_that_is_not_unicode_is_refused_with_its_place(base: dict[str, Any]) -> None:
    ours = build(base)
    with pytest.raises(TokenizerError, match=r"text: character 2 is a lone surrogate, U\+D800"):
        ours.encode("ab\ud800\udc00")
    for token in (-1, ours.vocab_size, 10**20):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            ours.decode([token])
    with pytest.raises(TokenizerError, match="no EOS token"):
        build(base, eos_id=None).encode("a", eos=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("base", [BPE, SENTENCEPIECE])
def test_very_long_texts_are_bounded(base: dict[str, Any]) -> None:
    ours = build(base)
    assert len(ours.encode("a" + "\u0301" * 10**6)) >= 1  # combining marks
    assert len(ours.encode("ab " * 10**5)) >= 10**5
    if base is BPE:
        with pytest.raises(TokenizerError, match="no end of a word within 1048576 characters before character 1048576"):
            ours.encode("a" * 10**7)
    else:
        assert len(ours.encode("b" * 10**7)) == 10**7 + 1


def test_the_word_limit_is_about_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_CHUNK", 8)
    monkeypatch.setattr(tokenizers, "_LONGEST_WORD", 16)
    ours = build(BPE)
    assert ours.encode("ab" * 8) == [AB] * 8
    assert ours.encode("ab ab ab ab ab ab ab ab ab") == [AB] + [SPACE_AB] * 8
    with pytest.raises(TokenizerError, match="before character 16"):
        ours.encode("ab" * 9)
