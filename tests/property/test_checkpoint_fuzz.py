"""Random damage to .pth files, Meta's folders, vocabularies and llama2.c's files: they open, or our errors say why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damages import Damage, damages
from llama2 import checkpoint
from llama2.checkpoint import pth
from llama2.errors import CheckpointError, ConfigError, TokenizerError
from llama2.text.tokenizer import from_sentencepiece
from llama2c_bytes import random_weights, tokenizer_bin, version_0, version_1, version_2
from meta_bytes import (
    EMPTY,
    REBUILD,
    PthBytes,
    numbers,
    random_tensors,
    storage,
    tensor,
    text,
    tokenizer_model,
    whole,
    write_folder,
)
from models import tiny_config

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def peak() -> int:
    """The largest resident set, in KB, since it was last reset; 0 where that is not known."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else 0  # type: ignore[index]


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """No test of these small files may need more than 64 MB for any of them."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = peak()
    yield
    assert peak() - before < 64 << 10


def changes(header: int) -> st.SearchStrategy[list[Damage]]:
    return st.lists(damages(header), min_size=1, max_size=4)


def damaged(by: list[Damage], data: bytes) -> bytes:
    for damage in by:
        data = damage(data)
    return data


def assert_harmless(use: Callable[[], object]) -> None:
    """That `use` ends, or is refused in one line."""
    reason = ""
    try:
        use()
    except (CheckpointError, ConfigError, TokenizerError) as error:
        reason = str(error)
    assert reason.isprintable()


def use_model(path: Path) -> None:
    model = checkpoint.open(path)
    model.check_finite()
    for weights in model.tensors.values():
        weights.dequantize()
    assert len(model.tokenizer.encode("a b")) > 1


#: What the machine knows, whole or in halves, so that random programs come far.
WORDS = [
    b"}", b"(", b")", b"N", b"\x88", b"\x89", b"t", b"\x85", b"\x86", b"\x87", b"Q", b"R", b"s", b"u", b"b", b".",
    b"q\0", b"q\1", b"h\0", b"h\1", b"r\0\0\0\0", b"j\1\0\0\0", b"K\1", b"M\2\0", b"J\xff\xff\xff\xff",
    b"\x80\x02", REBUILD, EMPTY, EMPTY[:-2], storage(), storage()[:-1], storage("HalfStorage", count=12), tensor(),
    tensor()[:-1], numbers(2, 3), numbers(3, 1), text("a"), text("b"), text("storage"), whole(0), whole(6),
    whole(-(1 << 62)), whole(1 << 62), b"cos\nsystem\n",
]  # fmt: skip
programs = st.lists(st.sampled_from(WORDS) | st.binary(min_size=1, max_size=9), max_size=30).map(b"".join)


@fuzz
@given(program=programs, framed=st.booleans())
def test_any_program_of_a_pickle(tmp_path: Path, program: bytes, framed: bool) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(PthBytes(b"\x80\x02}(" + program + b"u." if framed else program).encode())
    assert_harmless(lambda: [weights.dequantize() for weights in pth.read(path).values()])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "a.pth"
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(5).bfloat16()}, path)
    return path.read_bytes()


@fuzz
@given(by=changes(1600))
def test_any_damage_to_what_torch_saved(saved: bytes, tmp_path: Path, by: list[Damage]) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(damaged(by, saved))
    assert_harmless(lambda: [weights.dequantize() for weights in pth.read(path).values()])


TINY = tiny_config(n_layers=1, dim=16, n_heads=4, n_kv_heads=2, head_dim=4, hidden_dim=32, vocab_size=704)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 1, "ffn_dim_multiplier": 0.75, "multiple_of": 16}
    path = write_folder(tmp_path_factory.mktemp("meta") / "a", random_tensors(TINY), 2, **params)
    return path


@settings(fuzz, max_examples=100)
@given(name=st.sampled_from(["params.json", "consolidated.00.pth", "consolidated.01.pth"]), data=st.data())
def test_any_damage_to_a_folder(folder: Path, name: str, data: st.DataObject) -> None:
    whole_file = (folder / name).read_bytes()
    by = data.draw(changes(200 if name == "params.json" else len(whole_file)))
    (folder / name).write_bytes(damaged(by, whole_file))
    try:
        assert_harmless(lambda: use_model(folder))
    finally:
        (folder / name).write_bytes(whole_file)


@fuzz
@given(by=changes(12_000))
def test_any_damage_to_a_sentencepiece_model(tmp_path: Path, by: list[Damage]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged(by, tokenizer_model()))

    def use() -> None:
        tokenizer = from_sentencepiece(path)
        tokenizer.decode(tokenizer.encode("a b<tool>é"))
        tokenizer.decode(range(tokenizer.vocab_size))
        tokenizer.vocabulary()

    assert_harmless(use)


SMALL = tiny_config(n_layers=1, dim=16, n_heads=4, head_dim=4, hidden_dim=32, vocab_size=8, context_length=4)
WEIGHTS = random_weights(SMALL)
GROUPS = {
    name: ([1] * weight.size, [0.5] * (weight.size // 16)) for name, weight in WEIGHTS.items() if weight.ndim == 2
}
TOKENS = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n"), *((-1.0, bytes([i])) for i in b" abcd")]


def files() -> list[bytes]:
    grouped = bytearray(version_2(SMALL, WEIGHTS, GROUPS))
    grouped[37:41] = (16).to_bytes(4, "little")
    return [version_0(SMALL, WEIGHTS), version_1(SMALL, WEIGHTS), bytes(grouped)]


@fuzz
@given(version=st.integers(0, 2), model=changes(60), vocabulary=changes(120), which=st.integers(0, 2))
def test_any_damage_to_files_of_llama2c(
    tmp_path: Path, version: int, model: list[Damage], vocabulary: list[Damage], which: int
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(damaged(model if which != 1 else [], files()[version]))
    path.with_name("tokenizer.bin").write_bytes(damaged(vocabulary if which else [], tokenizer_bin(TOKENS)))
    assert_harmless(lambda: use_model(path))


def test_the_undamaged_files_open(folder: Path, tmp_path: Path) -> None:
    use_model(folder)
    for data in files():
        (tmp_path / "a.bin").write_bytes(data)
        (tmp_path / "tokenizer.bin").write_bytes(tokenizer_bin(TOKENS))
        use_model(tmp_path / "a.bin")
