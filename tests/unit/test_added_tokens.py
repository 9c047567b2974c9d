"""Tokens that were added to a vocabulary, and spaces in front: by the tokenizers library, llama.cpp, and by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from llama2.errors import TokenizerError
from llama2.text import files, tiktoken, tokenizer_folder
from llama2.text.tokenizer import AddedTokens, Flags, from_sentencepiece
from texts import from_parts, train_sentencepiece

SPACE = "▁"
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    SPACE,
    "a",
    "b",
    SPACE + "a",
    SPACE + "b",
]
#: Merges that no scores can say: ▁ joins a before b, but ab would stand between them.
MERGES = [(SPACE, "a"), (SPACE, "b")]
IDS = {piece: i for i, piece in enumerate(PIECES)}
A, B, SA, SB, S = (IDS[text] for text in ("a", "b", "▁a", "▁b", "▁"))
TEXTS = [
    "a<tool>b",
    "<tool>",
    " <tool> ",
    "a <tool>  b",
    "<tool><tool>",
    "ab <tool>ab",
    "a\n<tool>\nb",
    "<s>a</s> b",
    "a</s>",
]


def sentencepiece(**changes: Any) -> Any:
    """Five pieces and all bytes, and a user-defined token behind them."""
    parts: dict[str, Any] = {
        "pieces": [*PIECES, "<tool>"],
        "types": [2, 3, 3] + [6] * 256 + [1] * 5 + [4],
        "scores": [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0, 0.0],
        **{"merges": None, "pre": None, "bos_id": 1, "eos_id": 2, "unk_id": 0, "add_bos": True, "add_eos": False},
        "prepend_scheme": "always",
    }
    return from_parts("sentencepiece", **{**parts, **changes})


def test_a_space_is_put_before_each_part_between_added_tokens() -> None:
    """As transformers 4.57 and llama.cpp do it; sentencepiece itself would put none behind a user-defined piece."""
    tool = len(PIECES)
    ours = sentencepiece()
    assert ours.encode("a<tool>b") == [SA, tool, SB]
    assert ours.encode("<tool>b a<tool>") == [tool, SB, SA, tool]
    assert ours.encode("a</s>b", special=True) == [SA, 2, SB]
    assert sentencepiece(prepend_scheme="never").encode("a<tool>b") == [A, tool, B]
    assert ours.decode([SA, tool, SB]) == "a<tool> b"


def test_a_space_is_put_before_the_beginning_alone() -> None:
    """Metaspace's "first": not behind a token, and not where there is a space."""
    tool = len(PIECES)
    ours = sentencepiece(prepend_scheme="first")
    assert ours.encode("a<tool>b") == [SA, tool, B]
    assert ours.encode(" a") == [SA]
    assert ours.encode("</s>a b", special=True) == [2, A, SB]
    assert ours.encode_with_ends("b", begins=False) == ([B], [1])
    ours.choose("legacy")
    assert ours.encode("a<tool>b") == [SA, tool, SB]
    ours.choose("file")
    assert ours.encode("a<tool>b") == [SA, tool, B]


def test_runs_of_spaces_that_are_user_defined() -> None:
    """A text that spells one is cut there; a text's own spaces are merged. By the tokenizers library."""
    run = len(PIECES)
    ids = {**IDS, "▁▁": run}
    library = Library(models.BPE(ids, [(SPACE, SPACE), *MERGES], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    library.add_tokens([AddedToken("▁▁", normalized=False, special=False)])
    ours = sentencepiece(pieces=[*PIECES, "▁▁"])
    for text in ("a▁▁b", "▁▁", "▁▁ a", "a  b", "a▁b"):
        assert ours.encode(text) == library.encode(text).ids, text
    assert ours.encode("a▁▁b") == [SA, run, SB]
    assert ours.encode("a  b") == [SA, run, B]


def test_what_tokens_cover() -> None:
    """Of "é<tool>b a": a space in front that covers nothing, two bytes of a letter, the token, and two letters."""
    ids, ends = sentencepiece().encode_with_ends("é<tool>b a")
    assert ids == [S, IDS["<0xC3>"], IDS["<0xA9>"], len(PIECES), SB, SA]
    assert ends == [0, 1, 1, 7, 8, 10]


@pytest.mark.parametrize(
    "flags", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
)
def test_added_tokens_are_found_as_the_library_finds_them(flags: dict[str, bool]) -> None:
    tokens = {"<t>": 0, "<t><u>": 1, "ab": 2}
    library = Library(models.BPE({"x": 9}, [], unk_token="x"))
    library.add_tokens([AddedToken(text, normalized=False, **flags) for text in tokens])
    known = library.get_added_tokens_decoder()
    ours = AddedTokens(tokens, {text: Flags(**flags) for text in tokens if flags})
    for text in [
        "",
        "x",
        "<t>",
        "x<t>x",
        " <t>  x",
        "x  <t> ",
        "<t><u><t>",
        "xab ab abx",
        "ab",
        "x ab",
        "\n\n x",
        "x\n",
        "<t",
        "é<t>é ab",
    ]:
        found = library.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(found.ids, found.offsets, strict=True) if token in known]
        at, mine = 0, []
        for part, token in ours.split(text):
            if token is not None:
                mine.append((at, at + len(part)))
            at += len(part)
        assert at == len(text)
        assert mine == spans, text


def folder(path: Path, made: Library, **settings: Any) -> Path:
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def library(*, first: bool = False, merges: list[tuple[str, str]] = MERGES) -> Library:
    made = Library(models.BPE(IDS, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first:
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(text, normalized=False) for text in PIECES[:3]])
    return made


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_a_tokenizer_json_is_read_as_the_library_reads_it(first: bool, flags: dict[str, bool], tmp_path: Path) -> None:
    made = library(first=first)
    made.add_tokens([AddedToken("<tool>", special=False, **{"normalized": False, **flags})])
    ours = tokenizer_folder.read(folder(tmp_path, made, bos_token="<s>", eos_token="</s>"))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size, ours.kind) == (1, 2, len(PIECES) + 1, "sentencepiece")
    assert ours.prepend_scheme == ("first" if first else "always")
    for text in TEXTS:
        whole = made.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == whole.ids, text
        assert ours.decode(whole.ids) == made.decode(whole.ids), text
    made.encode_special_tokens = True
    for text in TEXTS:
        found = made.encode(text, add_special_tokens=False)
        assert ours.encode(text) == found.ids, text
        _, ends = ours.encode_with_ends(text)
        for token, (_, end), mine in zip(found.tokens, found.offsets, ends, strict=True):
            assert mine == end or token == SPACE, text  # one that stands for no character, as offsets do not say
    if not first and not any(flags.values()):
        for text in [*TEXTS, "é", " é你 b", "a▁b é", "<tool>é"]:
            assert ours.encode_with_ends(text) == sentencepiece().encode_with_ends(text), text
    assert ours.encode_with_ends("a", begins=False)[0] == ([A] if first else [SA])


def test_legacy_rules_of_a_model_that_was_tuned_with_them(tmp_path: Path) -> None:
    """transformers 5 writes Metaspace whatever there was; `legacy` still says how the model was tuned."""
    path = folder(tmp_path, library(first=True), legacy=True, bos_token="<s>")
    ours = tokenizer_folder.read(path)
    assert ours.encode("a</s>b", special=True) == [SA, 2, SB]
    assert ours.encode(" a") == [S, SA]  # as sentencepiece does it
    assert "legacy" in ours.mode
    ours.choose("file")
    assert ours.encode("a</s>b", special=True) == [SA, 2, B]


def test_tokens_that_stand_in_one_file_alone(tmp_path: Path) -> None:
    """Beside a tokenizer.model, as transformers 5 leaves it: the tokens of tokenizer.json and of the settings count."""
    made = library()
    made.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<tool>", special=False, normalized=False)])
    entry = {"content": "<more>", "special": False, "normalized": False}
    settings = {"added_tokens_decoder": {str(len(PIECES) + 2): entry}, "eos_token": "<|im_end|>"}
    (folder(tmp_path, made, **settings) / "tokenizer.model").write_bytes(train_sentencepiece())
    ours = tokenizer_folder.read(tmp_path, size=len(PIECES) + 5)
    assert ours.eos_id == len(PIECES)
    assert ours.encode("a<tool>b<more>") == [SA, len(PIECES) + 1, SB, len(PIECES) + 2]
    assert ours.token_bytes(len(PIECES) + 4) == b""  # a row that no token has


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tokenizer.model"])
def test_an_added_token_that_is_too_long(vocabulary: str, tmp_path: Path) -> None:
    """Where it stands alone: added_tokens.json or tokenizer_config.json."""
    if vocabulary == "tokenizer.json":
        folder(tmp_path, library())
    else:
        (tmp_path / vocabulary).write_bytes(train_sentencepiece())
    size = tokenizer_folder.read(tmp_path).vocab_size
    for length in (1024, 1025):
        text = "x" * length
        for name, entries in (
            ("added_tokens.json", {text: size}),
            ("tokenizer_config.json", {"added_tokens_decoder": {size: {"content": text, "special": True}}}),
        ):
            (tmp_path / name).write_text(json.dumps(entries))
            if length == 1024:
                assert tokenizer_folder.read(tmp_path).encode(text, special=True) == [size]
            else:
                with pytest.raises(TokenizerError, match=f"token {size} of the vocabulary has 1025 characters"):
                    tokenizer_folder.read(tmp_path)
            (tmp_path / name).unlink()


def test_a_vocabulary_of_200_000_pieces(tmp_path: Path) -> None:
    """Beside a tokenizer.model, and with a token that the model has no row for: not only the library reads the file."""
    path = folder(tmp_path, library()) / "tokenizer.json"
    made, size = json.loads(path.read_text()), 200_000
    made["model"]["vocab"] |= {f"🙂{i}": i for i in range(len(PIECES), size)}
    made["added_tokens"].append({**made["added_tokens"][0], "id": size, "content": "[PAD]"})
    path.write_text(json.dumps(made, ensure_ascii=False))
    path.with_name("tokenizer.model").write_bytes(train_sentencepiece())
    ours = tokenizer_folder.read(tmp_path, size=size)
    assert ours.encode("a b") == [SA, SB]
    assert ours.notes == ("token '[PAD]' is left out, since the model has no row for it",)


def test_settings_of_2_mb(tmp_path: Path) -> None:
    """Those of a model with 30,000 added tokens have 6 MB."""
    entry = {"content": "<more>", "special": False, "normalized": False}
    path = folder(tmp_path, library(), added_tokens_decoder={str(len(PIECES)): entry}, note="x" * (2 << 20))
    assert tokenizer_folder.read(path).encode("a<more>") == [SA, len(PIECES)]


def test_an_end_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, library(), eos_token="<|im_end|>")
    with pytest.raises(TokenizerError, match=r"eos_token '<\|im_end\|>' is not in the vocabulary; correct"):
        tokenizer_folder.read(path, size=len(PIECES), eos_id=2)
    assert tokenizer_folder.read(path, size=len(PIECES) + 1).eos_id == len(PIECES)  # as transformers adds it


def test_a_token_without_a_row_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = folder(tmp_path, library(), bos_token="<s>", pad_token="[PAD]")
    ours = tokenizer_folder.read(path, size=len(PIECES))
    assert "[PAD]" not in {**ours.control, **ours.user}
    assert ours.notes == ("token '[PAD]' is left out, since the model has no row for it",)


def test_merges_that_no_scores_can_say(tmp_path: Path) -> None:
    pieces = {**IDS, "ab": len(IDS), "▁ab": len(IDS) + 1}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]  # ▁ab is made of ▁ and ab, not of ▁a and b
    made = Library(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    base = library()
    made.normalizer, made.decoder = base.normalizer, base.decoder
    ours = tokenizer_folder.read(folder(tmp_path, made))
    assert ours.encode("ab") == made.encode("ab").ids == [SA, B]
    with pytest.raises(TokenizerError, match="which scores cannot express; choose hf"):
        ours.vocabulary()


def test_flags_that_no_other_format_can_say(tmp_path: Path) -> None:
    made = library()
    made.add_tokens([AddedToken("<tool>", rstrip=True, normalized=False)])
    ours = tokenizer_folder.read(folder(tmp_path, made))
    with pytest.raises(TokenizerError, match=r"'<tool>' has rstrip, which only a tokenizer\.json can say"):
        ours.vocabulary()


def test_settings_of_a_tokenizer_model_alone(tmp_path: Path) -> None:
    """By transformers' LlamaTokenizerFast: BOS unless settings refuse it; without `legacy`, a space before each."""
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    plain = from_sentencepiece(tmp_path / "tokenizer.model")
    assert "<tool>" in plain.user
    settings: dict[str, Any] = {"model_max_length": 10**30, "additional_special_tokens": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizer_folder.read(tmp_path)
    assert (ours.add_bos, ours.prepend_scheme) == (True, "always")
    assert ours.encode("a<tool>b") == [*plain.encode("a"), plain.user["<tool>"], *plain.encode("b")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False, "add_bos_token": False}))
    ours = tokenizer_folder.read(tmp_path)
    assert (ours.add_bos, ours.prepend_scheme) == (False, "first")
    assert ours.encode("a<tool>b")[:2] == plain.encode("a<tool>b")[:2]
    assert ours.encode("a<tool>b")[2:] == plain.encode("ab")[-1:] or ours.decode(ours.encode("a<tool>b")) == "a<tool>b"


def ranks(path: Path, *more: bytes) -> Path:
    """All bytes, then three merged tokens, and `more`."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b" abc", *more]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return path


def test_ranks_of_tiktoken(tmp_path: Path) -> None:
    """A whole word is a token whatever the merges say."""
    path = ranks(tmp_path / "tokenizer.model")
    ours = tiktoken.tokenizer(path, path.read_bytes(), 259 + 256)
    assert ours.encode("abc bc abc") == [256, ord("c"), ord(" "), 257, 258]
    assert (ours.bos_id, ours.control["<|eot_id|>"], ours.add_bos) == (259, 268, True)
    assert {259 + 1, 259 + 8, 259 + 9} <= ours.stop_ids
    assert ours.decode(ours.encode("é 你")) == "é 你"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TokenizerError, match="is damaged"):
        tiktoken.tokenizer(path, path.read_bytes())


def test_files_of_ranks_are_not_sentencepiece_models(tmp_path: Path) -> None:
    """As Meta has them, as a folder of Hugging Face's has them, and beside a tokenizer.json, which counts."""
    path = ranks(tmp_path / "tokenizer.model")
    for ours in (files.read(path, 259 + 256), tokenizer_folder.read(tmp_path, size=259 + 256)):
        assert ours.encode("abc bc abc") == [256, ord("c"), ord(" "), 257, 258]
        assert ours.control["<|eot_id|>"] == 268
    folder(tmp_path, library(), tokenizer_class="LlamaTokenizer", add_prefix_space=True)
    ours = tokenizer_folder.read(tmp_path)
    assert (ours.encode("a b"), ours.notes) == ([SA, SB], ())


def test_ranks_of_more_bytes_than_a_token_may_have(tmp_path: Path) -> None:
    path = ranks(tmp_path / "tokenizer.model", b"x" * 1024)
    assert tokenizer_folder.read(tmp_path).token_bytes(259) == b"x" * 1024
    ranks(path, b"x" * 1025)
    with pytest.raises(TokenizerError, match=r"is damaged \(line 260 is not the next token"):
        tokenizer_folder.read(tmp_path)


def test_a_post_processor_with_another_token(tmp_path: Path) -> None:
    made = library()
    made.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    assert tokenizer_folder.read(folder(tmp_path, made)).bos_id == 2
    with pytest.raises(TokenizerError, match="puts '</s>' around a text, which is not its bos_token"):
        tokenizer_folder.read(folder(tmp_path, made, bos_token="<s>"))


def test_a_panic_of_the_library_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A merge makes a piece that the vocabulary lacks; or an affix is longer than the pieces it stands before."""
    path = folder(tmp_path, library()) / "tokenizer.json"
    good = json.loads(path.read_text())
    for changes in ({"vocab": {k: v for k, v in IDS.items() if k != "▁a"}}, {"continuing_subword_prefix": "▁▁▁▁▁▁"}):
        path.write_text(json.dumps({**good, "model": good["model"] | changes}))
        with pytest.raises(TokenizerError) as caught:
            tokenizer_folder.read(tmp_path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_merges_make_no_control_token_of_text(tmp_path: Path) -> None:
    """Code Llama's ▁<PRE> is a control token and a piece that merges make; sentencepiece never makes it of text."""
    pieces = {**IDS, "ab": len(IDS), "▁ab": len(IDS) + 1}
    merges = [("a", "b"), ("▁", "ab")]
    made = Library(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    base = library()
    made.normalizer, made.decoder = base.normalizer, base.decoder
    made.add_special_tokens([AddedToken("▁ab", normalized=False)])
    ours = tokenizer_folder.read(folder(tmp_path, made))
    assert ours.encode("ab ab") == [S, pieces["ab"], S, pieces["ab"]]
    assert ours.encode("a▁ab", special=True) == [S, A, pieces["▁ab"]]


def test_ids_of_the_vocabulary_count(tmp_path: Path) -> None:
    """A token that tokenizer.json has keeps its id there, whatever the settings say: transformers does the same."""
    from transformers import AutoTokenizer

    made = library()
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    path = folder(
        tmp_path,
        made,
        **settings,
        added_tokens_decoder={str(S): {"content": "<tool>", "normalized": False, "special": False}},
    )
    ours = tokenizer_folder.read(path)
    expected = AutoTokenizer.from_pretrained(path).encode("a<tool>b", add_special_tokens=False)
    assert expected == [SA, made.token_to_id("<tool>"), SB]
    assert ours.encode("a<tool>b") == expected
    assert ours.notes == ("'<tool>': tokenizer_config.json gives other ids than the vocabulary, which counts",)
