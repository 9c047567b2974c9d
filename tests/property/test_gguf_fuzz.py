"""Random damage to a valid GGUF file: it opens, or one of our errors refuses it in one line."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_bytes import write_seed
from llama2 import checkpoint
from llama2.errors import CheckpointError, ConfigError, TokenizerError

HEADER = 4500  # bytes in which the names and numbers stand

Damage = Callable[[bytes], bytes]

positions = st.integers(0, HEADER)
numbers = st.sampled_from([0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1])
integers = st.sampled_from("BIQ").flatmap(
    lambda code: (numbers | st.integers(0, 300)).map(
        lambda n: struct.pack(f"<{code}", n % 256 ** struct.calcsize(code))
    )
)
bytes_ = integers | st.binary(min_size=1, max_size=24)


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Overwrite, insert, delete, repeat or cut."""
    kind, at, size, new = draw(st.integers(0, 4)), draw(positions), draw(st.integers(1, 64)), draw(bytes_)

    def damage(data: bytes) -> bytes:
        return [
            data[:at] + new + data[at + len(new) :],
            data[:at] + new + data[at:],
            data[:at] + data[at + size :],
            data[: at + size] + data[at:],
            data[:at],
        ][kind]

    return damage


@pytest.fixture(scope="module", params=["sentencepiece", "bpe"])
def seed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model, valid in all its parts."""
    path = tmp_path_factory.mktemp("seed") / "model.gguf"
    write_seed(request.param, path)
    use(path)
    return path.read_bytes()


def use(path: Path) -> None:
    model = checkpoint.open(path)
    model.check_finite()
    for tensor in model.tensors.values():
        tensor.dequantize()
    model.tokenizer.decode(range(model.config.vocab_size))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(damages(), min_size=1, max_size=4))
def test_any_damage_is_refused_or_harmless(seed: bytes, tmp_path: Path, changes: list[Damage]) -> None:
    data = seed
    for damage in changes:
        data = damage(data)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    reason = ""
    try:
        use(path)
    except (CheckpointError, ConfigError, TokenizerError) as error:
        reason = str(error)
    assert reason.isprintable()  # one line
