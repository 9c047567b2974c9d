"""Damaged and hostile files of llama2.c's: a one-line reason, quickly, in little memory."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2 import checkpoint
from llama2.errors import CheckpointError, TokenizerError
from llama2c_bytes import GROUP, header, random_weights, tokenizer_bin, version_0, version_1, version_2
from models import tiny_config
from refusals import assert_refused_cheaply, refusal

CONFIG = tiny_config(n_layers=1, vocab_size=8, hidden_dim=96, context_length=4, norm_eps=1e-5)
WEIGHTS = random_weights(CONFIG)
GROUPS = {
    name: (np.ones(weight.size, np.int8), np.ones(weight.size // GROUP, np.float32))
    for name, weight in WEIGHTS.items()
    if weight.ndim == 2
}
FILES = [version_0(CONFIG, WEIGHTS), version_1(CONFIG, WEIGHTS), version_2(CONFIG, WEIGHTS, GROUPS)]

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = range(7)
TOKENS = [
    (0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n"), (-1.0, b" a"), (-2.0, b"ab"), (-3.0, b" "), (-4.0, b"a"),
    (-5.0, b"b"),
]  # fmt: skip


def with_size(version: int, field: int, value: int) -> bytes:
    return patched(version, 4 * field + (8 if version else 0), "<i", value)


def patched(version: int, at: int, code: str, value: int) -> bytes:
    data = bytearray(FILES[version])
    struct.pack_into(code, data, at, value)
    return bytes(data)


FAULTS: dict[str, tuple[bytes, str]] = {
    # what version 0 is told by, its sizes, must be possible
    "no layers, version 0": (with_size(0, LAYERS, 0), "is not a GGUF file, for it begins with"),
    "no vocabulary, version 0": (with_size(0, VOCAB, 0), "is not a GGUF file"),
    "a negative width, version 0": (with_size(0, DIM, -64), "is not a GGUF file"),
    "seven sizes alone": (FILES[0][:28], "has 28 bytes, and its header makes"),
    "six sizes alone": (FILES[0][:24], "is not a GGUF file"),
    "tied instead of not": (with_size(0, VOCAB, 8), "and its header makes"),
    "2^30 positions": (with_size(0, CONTEXT, 1 << 30), "and its header makes 687"),  # 2^30 * 16 * 4 = 68.7e9
    "the largest sizes": (
        struct.pack("<7i", 1 << 20, 1 << 22, 1 << 12, 1 << 14, 1 << 14, 1 << 26, 1 << 30) + bytes(999),
        r"its header makes 2885\d{14};",
    ),
    # versions 1 and 2
    "version 0 with a magic": (patched(1, 4, "<i", 0), "version 0 of llama2.c's files is not known"),
    "version 3": (patched(1, 4, "<i", 3), "version 3 of llama2.c's files is not known; 0, 1 and 2 are"),
    "version -1": (patched(1, 4, "<i", -1), "version -1 of llama2.c's files is not known"),
    "the magic alone": (FILES[1][:4], "ends within its header"),
    "half a header": (FILES[1][:40], "ends within its header"),
    "a header alone": (FILES[1][:256], "has 256 bytes, and its header makes"),
    "a negative vocabulary": (with_size(1, VOCAB, -8), "vocab_size=-8 must be between"),
    "no heads": (with_size(1, HEADS, 0), "dim=64 must be a multiple of n_heads=0"),
    "heads that do not divide": (with_size(1, HEADS, 5), "dim=64 must be a multiple of n_heads=5"),
    "key heads that do not divide": (with_size(2, KV_HEADS, 3), "n_heads=4 must be a multiple of n_kv_heads=3"),
    "no key heads": (with_size(2, KV_HEADS, 0), "n_kv_heads=0 must be between"),
    "odd heads": (with_size(1, HEADS, 64), "head_dim=1 must be even"),
    "no context": (with_size(1, CONTEXT, 0), "context_length=0 must be between"),
    "2^31 - 1 layers": (with_size(1, LAYERS, 2**31 - 1), "n_layers=2147483647 must be between"),
    "one layer more": (with_size(1, LAYERS, 2), "and its header makes"),
    "a flag of 7": (patched(1, 36, "<B", 7), "a flag is 7, must be 0 or 1"),
    "tied after all": (patched(1, 36, "<B", 1), "and its header makes"),
    "groups of 0": (patched(2, 37, "<i", 0), "groups of 0 must divide dim=64 and hidden_dim=96"),
    "groups of -32": (patched(2, 37, "<i", -32), "groups of -32 must divide"),
    "groups of 64": (patched(2, 37, "<i", 64), "groups of 64 must divide dim=64 and hidden_dim=96"),
    "groups of 16": (patched(2, 37, "<i", 16), "and its header makes"),
    **{f"a byte too many, version {i}": (file + b"\0", "and its header makes") for i, file in enumerate(FILES)},
    **{f"a byte too few, version {i}": (file[:-1], "and its header makes") for i, file in enumerate(FILES)},
}


@pytest.mark.parametrize("version", [0, 1, 2])
def test_the_unchanged_file_is_valid(version: int, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(FILES[version])
    model = checkpoint.open(tmp_path / "a.bin")
    assert model.config == CONFIG
    model.check_finite()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(FAULTS[fault][0])
    assert re.search(FAULTS[fault][1], refusal(path))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_cut_short(version: int, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(FILES[version])
    for size in [len(FILES[version]) - 1, 999, *reversed(range(260))]:
        os.truncate(path, size)
        refusal(path)


@pytest.mark.parametrize(("version", "name", "at"), [(1, "norm.weight", 256 + 4 * 2 * 64), (2, "output.weight", -4)])
def test_weights_that_are_not_numbers(version: int, name: str, at: int, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(patched(version, at % len(FILES[version]), "<f", np.nan))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"'{re.escape(name)}' holds weights that are not finite numbers"):
        checkpoint.open(path).check_finite()


@pytest.mark.parametrize("options", [[], ["-O"]])
def test_time_and_memory(options: list[str], tmp_path: Path) -> None:
    """A second and 64 MB beyond the file, for everything above; also where `assert` does nothing."""
    paths = [tmp_path / str(i) for i, _ in enumerate(FAULTS)]
    for path, (data, _) in zip(paths, FAULTS.values(), strict=True):
        path.write_bytes(data)
    large = replace(CONFIG, dim=1 << 20, n_layers=1 << 12, n_heads=1, n_kv_heads=1, vocab_size=1 << 26)
    for i in range(10):  # headers that are possible, and need the longest sums
        paths.append(tmp_path / f"large {i}")
        paths[-1].write_bytes(header(replace(large, head_dim=2, vocab_size=1 + i), 1).ljust(1 << 20, b"\0"))
    assert_refused_cheaply(paths, options)


def edited(token: int, score: float | None = None, text: bytes | None = None) -> list[Any]:
    tokens = list(TOKENS)
    tokens[token] = (tokens[token][0] if score is None else score, tokens[token][1] if text is None else text)
    return tokens


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tokenizer_bin(TOKENS)[:-1], "token 7 needs bytes .* and the file ends at"),
        (tokenizer_bin(TOKENS)[:9], "token 0 needs bytes 4 to 12, and the file ends at 9"),
        (tokenizer_bin(TOKENS)[:4], "token 0 needs bytes 4 to 12, and the file ends at 4"),
        (tokenizer_bin(TOKENS[:-1]), "token 7 needs bytes"),
        (tokenizer_bin(TOKENS) + b"\0", "has more than the model's 8 tokens; give the model's own tokenizer"),
        (tokenizer_bin(TOKENS).replace(b"\2\0\0\0ab", b"\xff\xff\xff\xffab"), "token 4 needs bytes .* to 42949"),
        (tokenizer_bin(edited(1, text=b"<s>")), "its token 1 is not <s>"),
        (tokenizer_bin(edited(2, text=b" a")), "its token 2 is not </s>"),
        (tokenizer_bin(edited(0, text=b"a")), "its token 0 is not <unk>"),
        (tokenizer_bin(edited(5, text=b"\xff")), r"token 5 of the vocabulary is not UTF-8: b'\\xff'"),
        (tokenizer_bin(edited(6, text=b"ab")), "has token 'ab' twice"),
        (tokenizer_bin(edited(6, score=float("nan"))), "needs as many finite scores"),
        (tokenizer_bin(edited(6, text=b"<0x41>")), "has 1 byte tokens; they must be <0x00> to <0xFF>, or none"),
        (b"", "is empty"),
        (b"{}", "not a whole SentencePiece model"),
    ],
)
def test_tokenizer(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(FILES[1])
    (tmp_path / "tokenizer.bin").write_bytes(data)
    with pytest.raises((TokenizerError, CheckpointError), match=reason) as caught:
        checkpoint.open(tmp_path / "a.bin").tokenizer  # noqa: B018
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_unchanged_tokenizer_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(FILES[1])
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer_bin(TOKENS))
    tokenizer = checkpoint.open(tmp_path / "a.bin").tokenizer
    assert tokenizer.encode("ab a") == [3, 7, 3]
    assert tokenizer.decode([1, 3, 7, 3, 2]) == "ab a"
