"""Damaged and hostile GGUF files: a one-line reason, quickly, in little memory; never another exception."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from gguf_bytes import ARRAY, BOOL, F32, I16, I32, STRING, U32, GGUFBytes, TensorBytes, array, scalar, string
from llama2 import checkpoint
from llama2.errors import CheckpointError, TokenizerError
from models import write_tiny_gguf
from refusals import MB, assert_refused_cheaply, refusal

Edit = Callable[[GGUFBytes], object]


def key(name: str, value: bytes | None) -> Edit:
    return keys({name: value})


def keys(values: dict[str, bytes | None]) -> Edit:
    return lambda file: [file.set(name, value) for name, value in values.items()]


def bpe(pre: str) -> Edit:
    return keys({"tokenizer.ggml.model": scalar(STRING, "gpt2"), "tokenizer.ggml.pre": scalar(STRING, pre)})


def field(**values: object) -> Edit:
    def edit(file: GGUFBytes) -> None:
        for name, value in values.items():
            setattr(file, name, value)

    return edit


def tensor(name: str, **values: object) -> Edit:
    def edit(file: GGUFBytes) -> None:
        for attribute, value in values.items():
            setattr(file[name], attribute, value)

    return edit


def without(name: str) -> Edit:
    return lambda file: file.tensors.remove(file[name])


def extra(name: str | bytes, **values: object) -> Edit:
    return lambda file: file.tensors.append(TensorBytes(name, [8], bytes(32), **values))  # type: ignore[arg-type]


def nested(depth: int) -> bytes:
    return struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)


FAULTS: dict[str, tuple[Edit, str]] = {
    # structure
    "wrong magic": (field(magic=b"GGML"), r"is not a GGUF file, for it begins with b'GGML'"),
    **{
        f"version {version}": (field(version=version), f"has GGUF version {version}, and 2 and 3 are supported")
        for version in (0, 1, 4, 2**32 - 1)
    },
    "big-endian": (field(order=">"), "is big-endian"),
    "2^64 - 1 tensors": (field(n_tensors=2**64 - 1), "claims 18446744073709551615 tensors"),
    "2^64 - 1 keys": (field(n_keys=2**64 - 1), "claims 18446744073709551615 metadata keys"),
    "more tensors than there are": (field(n_tensors=5000), "cannot name a tensor|claims|ends at|dimensions"),
    "more keys than there are": (field(n_keys=4000), "cannot name a metadata key|unknown type|ends at|claims"),
    "2^63 bytes of text": (key("general.name", struct.pack("<IQ", STRING, 2**63)), "claims 9223372036854775808 bytes"),
    "10 MB of text": (
        keys({"general.name": scalar(STRING, "a" * 5 * MB), "general.license": scalar(STRING, "b" * 5 * MB)}),
        r"claims 5242880 bytes in metadata 'general\.license', and the limit is 314\d{4};",
    ),
    "2^63 bytes of token": (
        key("tokenizer.ggml.tokens", struct.pack("<IIQQ", ARRAY, STRING, 2, 2**63)),
        "'tokenizer.ggml.tokens' needs bytes",
    ),
    "2^64 - 9 bytes of token": (
        key("tokenizer.ggml.tokens", struct.pack("<IIQQ", ARRAY, STRING, 2, 2**64 - 9)),
        "'tokenizer.ggml.tokens' needs bytes",
    ),
    "array of arrays, 10^5 deep": (key("x", nested(10**5)), "'x' is an array of arrays"),
    "2^60 numbers": (key("x", array(0, [], count=2**60)), "'x' needs bytes"),
    "2^60 strings": (key("x", array(STRING, [], count=2**60)), "'x' has 1152921504606846976 strings"),
    "2^64 - 1 doubles": (key("x", array(12, [], count=2**64 - 1)), "'x' needs bytes"),
    "value of unknown type": (key("x", struct.pack("<I", 13)), "'x' has unknown type 13"),
    "array of unknown type": (key("x", array(99, [])), "'x' is an array of unknown type 99"),
    "bool that is 7": (key("x", scalar(BOOL, 7)), "'x' is neither true nor false"),
    "array with a bool that is 7": (key("x", array(BOOL, [0, 1, 7])), "'x' is neither true nor false"),
    "key that is not UTF-8": (lambda file: file.keys.append((b"\xff\xfe", scalar(U32, 1))), "is not UTF-8"),
    "text that is not UTF-8": (key("general.name", struct.pack("<IQ", STRING, 1) + b"\xc3"), "is not UTF-8"),
    "NUL in a key": (key("a\0b", scalar(U32, 1)), r"'a\\x00b' cannot name a metadata key"),
    "empty key": (key("", scalar(U32, 1)), "'' cannot name a metadata key"),
    "line break in a tensor's name": (extra("a\nb"), r"'a\\nb' cannot name a tensor"),
    "tensor name of 65 bytes": (extra("a" * 65), "claims 65 bytes in the name of a tensor, and the limit is 64"),
    "key twice": (
        lambda file: file.keys.append(("llama.block_count", scalar(U32, 9))),
        "has metadata key 'llama.block_count' twice",
    ),
    "tensor twice": (extra("output_norm.weight"), "has tensor 'output_norm.weight' twice"),
    # tensors
    **{f"{n} dimensions": (tensor("blk.0.attn_q.weight", n_dims=n), f"has {n} dimensions") for n in (0, 5, 0xFFFFFFFF)},
    "dimensions whose product is 2^64": (tensor("blk.0.attn_q.weight", dims=[2**32, 2**32]), "needs bytes"),
    "dimensions whose product is 2^64 + 256": (
        tensor("blk.0.attn_q.weight", dims=[2**56 + 1, 256]),
        r"needs bytes \d+ to 7378697629483820\d{4}, and",  # 2^66 + 1024 and where it starts
    ),
    "dimension of 0": (tensor("blk.0.attn_q.weight", dims=[8, 0]), "has a dimension of size 0"),
    "dimension of -1": (tensor("blk.0.attn_q.weight", dims=[8, 2**64 - 1]), "needs bytes"),
    "rows that are not whole blocks": (tensor("blk.0.attn_q.weight", kind=2), "which are not whole blocks of Q4_0"),
    "data beyond the end": (tensor("output_norm.weight", offset=1 << 20), "needs bytes .* and the file ends at"),
    "data one block beyond the end": (lambda f: f.tensors.append(TensorBytes("x", [8], b"")), "needs bytes"),
    "offset of 2^64 - 32": (tensor("output_norm.weight", offset=2**64 - 32), "needs bytes"),
    "offset that is not aligned": (tensor("output_norm.weight", offset=36), "is not aligned to 32 bytes"),
    "overlapping tensors": (tensor("output_norm.weight", offset=32), "'token_embd.weight' and .* overlap"),
    **{
        f"alignment {alignment}": (
            key("general.alignment", scalar(U32, alignment)),
            f"general.alignment={alignment} must be a power of two from 8 to 65536",
        )
        for alignment in (0, 3, 48, 2**31)
    },
    "format IQ4_XS": (tensor("blk.0.attn_q.weight", kind=23), "has format IQ4_XS; supported are F32, F16"),
    "unknown format": (tensor("blk.0.attn_q.weight", kind=777), "has format number 777; supported are F32, F16"),
    "tensor missing": (without("blk.0.ffn_up.weight"), "lacks tensor 'blk.0.ffn_up.weight'"),
    "embeddings missing": (without("token_embd.weight"), "lacks tensor 'token_embd.weight'"),
    "bias of a norm": (extra("blk.0.attn_norm.bias"), "has tensor 'blk.0.attn_norm.bias', which no Llama has"),
    "bias of the second layer alone": (extra("blk.1.attn_q.bias"), "has tensor 'blk.1.attn_q.bias', which no Llama"),
    "other shape": (tensor("blk.0.attn_k.weight", dims=[4, 8]), r"has shape \(8, 4\), not \(4, 8\)"),
    # hyperparameters
    "other architecture": (
        key("general.architecture", scalar(STRING, "qwen3")),
        "has architecture 'qwen3', and only llama and mistral3 are supported",
    ),
    "no architecture": (key("general.architecture", None), "lacks general.architecture"),
    "long name of an architecture": (key("general.architecture", scalar(STRING, "x\n" * 9999)), r"'x\\nx.*…', and"),
    "no layers": (key("llama.block_count", scalar(U32, 0)), "n_layers=0 must be between"),
    "10^9 layers": (key("llama.block_count", scalar(U32, 10**9)), "n_layers=1000000000 must be between"),
    "no heads": (key("llama.attention.head_count", scalar(U32, 0)), "n_heads=0 must be between"),
    "negative width": (key("llama.embedding_length", scalar(I32, -8)), "dim=-8 must be between"),
    "heads not a multiple of key heads": (
        keys({"llama.attention.head_count": scalar(U32, 4), "llama.attention.head_count_kv": scalar(U32, 3)}),
        "n_heads=4 must be a multiple of n_kv_heads=3",
    ),
    "key heads per layer": (
        key("llama.attention.head_count_kv", array(U32, [1])),
        "llama.attention.head_count_kv must be a whole number",
    ),
    "epsilon is text": (
        key("llama.attention.layer_norm_rms_epsilon", scalar(STRING, "1e-5")),
        "llama.attention.layer_norm_rms_epsilon must be a number",
    ),
    "epsilon is not a number": (
        key("llama.attention.layer_norm_rms_epsilon", scalar(F32, float("nan"))),
        "norm_eps=nan must be a positive number",
    ),
    "part of a head rotated": (key("llama.rope.dimension_count", scalar(U32, 2)), "has shape"),
    "part of a long head rotated": (
        keys({"llama.attention.key_length": scalar(U32, 4), "llama.rope.dimension_count": scalar(U32, 2)}),
        "llama.rope.dimension_count=2 must be the head size 4",
    ),
    "values of another size": (
        key("llama.attention.value_length", scalar(U32, 8)),
        "value_length=8 must be the",
    ),
    "rope scaling longrope": (
        key("llama.rope.scaling.type", scalar(STRING, "longrope")),
        "'longrope' is not supported",
    ),
    "yarn of another kind": (
        keys(
            {"llama.rope.scaling.type": scalar(STRING, "yarn"), "llama.rope.scaling.yarn_ext_factor": scalar(F32, 0.5)}
        ),
        "sets llama.rope.scaling.yarn_ext_factor=0.5, which must be 1",
    ),
    "yarn without frequencies": (
        keys({"llama.rope.scaling.type": scalar(STRING, "yarn"), "llama.rope.freq_base": scalar(F32, 1.0)}),
        "rope_theta=1.0 must be larger than 1 for yarn",
    ),
    "negative window": (key("llama.attention.sliding_window", scalar(I32, -1)), "sliding_window=-1 must be at least 1"),
    "a window in some layers": (
        key("llama.attention.sliding_window", array(U32, [4])),
        "sliding_window must be a whole number",
    ),
    "scores by position": (
        key("llama.attention.temperature_scale", scalar(F32, 0.1)),
        "sets llama.attention.temperature_scale",
    ),
    "reads ahead": (key("llama.attention.causal", scalar(BOOL, False)), "reads in both directions"),
    "a bias of another size": (extra("blk.0.attn_k.bias"), r"blk.0.attn_k.bias' has shape \(8,\), not"),
    "rope scaling by 0": (key("llama.rope.scaling.factor", scalar(F32, 0.0)), "factor=0.0 must be a positive number"),
    "rope divisors of another size": (extra("rope_freqs.weight"), r"rope_freqs.weight has shape \(8,\), not \(2,\)"),
    "rope divisors that are zero": (
        lambda file: file.tensors.append(TensorBytes("rope_freqs.weight", [2], bytes(8))),
        "divisors must be positive",
    ),
    "rope divisors and factor": (
        lambda f: f.set("llama.rope.scaling.factor", scalar(F32, 2.0)).tensors.append(
            TensorBytes("rope_freqs.weight", [2], np.ones(2, "<f4").tobytes())
        ),
        "has both linear and llama3 rope scaling",
    ),
    "mixture of experts": (key("llama.expert_count", scalar(U32, 8)), "sets llama.expert_count"),
    # vocabulary
    "other tokenizer": (key("tokenizer.ggml.model", scalar(STRING, "bert")), "has tokenizer 'bert'; only llama"),
    "other pre-tokenizer": (bpe("bloom"), "has pre-tokenizer 'bloom', which is not supported; these are: smollm"),
    "no merges": (bpe("gpt2"), "lacks tokenizer.ggml.merges"),
    "no vocabulary": (key("tokenizer.ggml.tokens", None), "lacks tokenizer.ggml.tokens"),
    "tokens that are numbers": (key("tokenizer.ggml.tokens", array(U32, [1])), "tokens must be an array"),
    "fewer tokens than rows": (
        keys(
            {
                "tokenizer.ggml.tokens": array(STRING, list("abcde")),
                "tokenizer.ggml.scores": array(F32, [0] * 5),
                "tokenizer.ggml.token_type": array(I32, [1] * 5),
            }
        ),
        "has 5 tokens and 6 rows of embeddings",
    ),
    "fewer scores": (
        key("tokenizer.ggml.scores", array(F32, [0] * 5)),
        r"has 6 tokens and 5 values of tokenizer\.ggml\.scores",
    ),
    "scores that are text": (key("tokenizer.ggml.scores", array(STRING, ["0"] * 6)), "scores must be an array"),
    "types that are short": (key("tokenizer.ggml.token_type", array(I16, [1] * 6)), "holds int16, must hold int32"),
    "fewer types": (
        key("tokenizer.ggml.token_type", array(I32, [1] * 5)),
        r"has 6 tokens and 5 values of tokenizer\.ggml\.token_type",
    ),
    "end of text out of range": (
        key("tokenizer.ggml.eos_token_id", scalar(U32, 6)),
        "eos token 6 is not one of its 6 tokens; convert the model again",
    ),
    "another end out of range": (key("tokenizer.ggml.eom_token_id", scalar(U32, 6)), "eom token 6 is not one of"),
    "beginning of text is -1": (key("tokenizer.ggml.bos_token_id", scalar(I32, -1)), "bos token -1 is not one of"),
    "unknown token out of range": (key("tokenizer.ggml.unknown_token_id", scalar(U32, 6)), "unknown token 6 is not"),
}


def test_the_unchanged_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFBytes().encode())
    model = checkpoint.open(path)
    model.check_finite()
    assert model.tokenizer.decode([5]) == "a"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, tmp_path: Path) -> None:
    edit, reason = FAULTS[fault]
    file = GGUFBytes()
    edit(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.encode())
    assert re.search(reason, refusal(path))


def test_cut_short_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = GGUFBytes().encode()
    header = whole.index(GGUFBytes()["token_embd.weight"].data)
    path.write_bytes(whole)
    for size in [len(whole) - 1, header + 100, *reversed(range(header + 1))]:
        os.truncate(path, size)
        refusal(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"Once upon a time\n", "is not a GGUF file, for it begins with b'Once'; check the path, or download it again"),
        (b"GGUF", "the header needs bytes 4 to 8, and the file ends at 4"),
    ],
)
def test_not_a_model(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert reason in refusal(path)


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refusal(tmp_path / "absent.gguf")
    assert "is an empty folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a regular file" in refusal(tmp_path / "pipe.gguf")

    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFBytes().encode())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # root may read everything, so it is only played

    monkeypatch.setattr(os, "open", refuse)
    assert "cannot be read (Permission denied); check its permissions" in refusal(path)


def test_token_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = struct.pack("<IIQ", ARRAY, STRING, 6) + string(b"\xff") * 6
    path.write_bytes(GGUFBytes().set("tokenizer.ggml.tokens", tokens).encode())
    model = checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"'tokenizer.ggml.tokens' is not UTF-8"):
        model.tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("format", "name", "at", "kind"),
    [
        ("F32", "output_norm.weight", 12, "<f4"),
        ("F16", "blk.0.attn_q.weight", 0, "<f2"),
        ("Q8_0", "blk.1.ffn_down.weight", 34 * 5, "<f2"),
        ("Q4_1", "output.weight", 20 * 7 + 2, "<f2"),
        ("Q6_K", "token_embd.weight", 210 * 3 + 208, "<f2"),
    ],
)
def test_weights_that_are_not_numbers(format: str, name: str, at: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, format=format)
    checkpoint.open(path).check_finite()
    start = {part.name: part.data_offset for part in gguf.GGUFReader(path).tensors}[name]
    for weight in (np.nan, np.inf, -np.inf):
        with path.open("r+b") as file:
            file.seek(start + at)
            file.write(np.array(weight, kind).tobytes())
        with pytest.raises(CheckpointError, match="holds weights that are not finite numbers; download it again"):
            checkpoint.open(path).check_finite()


def test_blocks_of_zeros_are_finite(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    file = GGUFBytes()
    for part in file.tensors:
        part.data = bytes(len(part.data))
    path.write_bytes(file.encode())
    checkpoint.open(path).check_finite()


def huge_files(folder: Path) -> list[Path]:
    """Files whose numbers ask for much memory or time, and that are as large as they can be for it."""
    emoji = "\N{LLAMA}" + "a" * (2 * MB)  # one wide character makes a Python string four bytes a character
    files = {
        "names": GGUFBytes(keys=[(f"{i:04}" + emoji[:65000], scalar(U32, 1)) for i in range(1200)]),
        "keys": GGUFBytes(keys=[(f"key {i:04}", scalar(U32, 1)) for i in range(4096)]),
        "text": GGUFBytes(keys=[(f"text {i}", scalar(STRING, emoji)) for i in range(4)]),
        "strings": GGUFBytes().set("x", struct.pack("<IIQ", ARRAY, STRING, (1 << 20) - 6) + bytes(8 << 20)),
        "many strings": GGUFBytes().set("x", struct.pack("<IIQ", ARRAY, STRING, 1 << 22) + bytes(8 << 22)),
        "numbers": GGUFBytes().set("x", struct.pack("<IIQ", ARRAY, BOOL, 50 * MB) + bytes(50 * MB - 1) + b"\2"),
        "tensors": GGUFBytes(tensors=[TensorBytes(f"blk.{i}.attn_q.weight", [8], bytes(32)) for i in range(1 << 14)]),
        "layers": GGUFBytes().set("llama.block_count", scalar(U32, 4096)),
        "tail": GGUFBytes(tensors=[TensorBytes("token_embd.weight", [8, 6], bytes(100 * MB))]),
    }
    paths = []
    for name, file in files.items():
        if name in ("strings", "numbers", "many strings"):
            file.n_tensors = 0
            file.tensors = []
        paths.append(folder / f"{name}.gguf")
        paths[-1].write_bytes(file.encode())
    return paths


@pytest.mark.parametrize("options", [[], ["-O"]])
def test_time_and_memory(options: list[str], tmp_path: Path) -> None:
    """A second and 64 MB beyond the file's size, for everything above; also where `assert` does nothing."""
    paths = []
    for i, (edit, _) in enumerate(FAULTS.values()):
        file = GGUFBytes()
        edit(file)
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(file.encode())
    assert_refused_cheaply(paths + huge_files(tmp_path), options)


LONG = "\N{LLAMA}" + "a" * 199_998  # one wide character makes a Python string four bytes a character
VOCABULARIES: dict[str, tuple[list[str], list[int], str]] = {
    "control token of 30,000 letters": ([*"abcde", "a" * 30_000], [2, 3, 3, 1, 1, 3], "string of 30000 bytes"),
    "pieces of 200,000 letters": ([f"{i:03}{LONG}" for i in range(40)], [1] * 40, "string of 200005 bytes"),
    "9 MB of tokens": ([f"{i:06}" + "a" * 1000 for i in range(9000)], [1] * 9000, "has 9126000 bytes, more than"),
    "merges of 200,000 letters": ([], [], "string of 200004 bytes"),
}


def write_vocabulary(name: str, path: Path) -> None:
    tokens, types, _ = VOCABULARIES[name]
    if not tokens:
        merges = GGUFValue([f"a {LONG}"] * 40, GGUFValueType.ARRAY, GGUFValueType.STRING)
        write_tiny_gguf(
            path, tokenizer="bpe", edit=lambda writer: writer.kv_data[0].update({"tokenizer.ggml.merges": merges})
        )
        return
    file = GGUFBytes().set("tokenizer.ggml.tokens", array(STRING, tokens)).set("tokenizer.ggml.scores", None)
    file.set("tokenizer.ggml.token_type", array(I32, types))
    file.tensors[0] = TensorBytes("token_embd.weight", [8, len(tokens)], bytes(32 * len(tokens)))
    path.write_bytes(file.encode())


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabulary_longer_than_any(name: str, tmp_path: Path) -> None:
    write_vocabulary(name, tmp_path / "model.gguf")
    with pytest.raises((CheckpointError, TokenizerError), match=VOCABULARIES[name][2]) as error:
        checkpoint.open(tmp_path / "model.gguf").tokenizer  # noqa: B018
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("options", [[], ["-O"]])
@pytest.mark.parametrize("fault", ["2^63 bytes of text", "10^9 layers", "other architecture", "data beyond the end"])
def test_command(fault: str, options: list[str], tmp_path: Path) -> None:
    """The program says why in one line, and ends with 1."""
    file = GGUFBytes()
    FAULTS[fault][0](file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.encode())
    program = "from llama2.cli.main import run; run()"
    run = subprocess.run(
        [sys.executable, *options, "-c", program, "show", str(path)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(rf"llama2: error: {re.escape(str(path))}: .+\n", run.stderr)


def test_vocabulary_that_no_tokenizer_takes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFBytes().set("tokenizer.ggml.tokens", array(STRING, ["a"] * 6)).encode())
    with pytest.raises(TokenizerError, match=rf"^{re.escape(str(path))}: "):
        checkpoint.open(path).tokenizer  # noqa: B018
