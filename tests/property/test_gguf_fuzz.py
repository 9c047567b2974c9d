"""Random damage to a valid GGUF file: it opens, or one of our errors refuses it in one line."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damages import Damage, damages
from gguf_bytes import write_seed
from llama2 import checkpoint
from llama2.errors import CheckpointError, ConfigError, TokenizerError

HEADER = 4500  # bytes in which the names and numbers stand


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
@given(changes=st.lists(damages(HEADER), min_size=1, max_size=4))
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
