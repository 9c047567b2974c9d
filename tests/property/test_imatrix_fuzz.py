"""Random damage to importance matrices: they are read as importance, or refused in one line, within bounded memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damages import Damage, damages
from llama2.checkpoint import gguf_writer, imatrix
from llama2.errors import CheckpointError
from models import tiny_config

CONFIG = tiny_config()
MATRICES = {name: shape[1] for name, shape in CONFIG.tensor_shapes().items() if len(shape) == 2 and "layers.0" in name}


def dat() -> bytes:
    """Three matrices in the older format."""
    data = (3).to_bytes(4, "little")
    for name, columns in (("blk.0.attn_q.weight", 64), ("blk.0.ffn_down.weight", CONFIG.hidden_dim), ("other", 5)):
        data += len(name).to_bytes(4, "little") + name.encode() + (2).to_bytes(4, "little")
        data += columns.to_bytes(4, "little") + np.ones(columns, "<f4").tobytes()
    return data


@pytest.fixture(scope="module", params=["gguf", "dat"])
def seed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("seed") / "matrix"
    if request.param == "dat":
        path.write_bytes(dat())
    else:
        sums = {name: (np.ones(columns), 512) for name, columns in MATRICES.items()}
        gguf_writer.write_imatrix(sums, CONFIG, "text.txt", path)
    assert imatrix.read(path, CONFIG)
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(damages(1500), min_size=1, max_size=4))
def test_any_damage_is_refused_or_harmless(seed: bytes, tmp_path: Path, changes: list[Damage]) -> None:
    data = seed
    for damage in changes:
        data = damage(data)
    path = tmp_path / "matrix"
    path.write_bytes(data)
    reason, found = "", {}
    tracemalloc.start()
    try:
        found = imatrix.read(path, CONFIG)
    except CheckpointError as error:
        reason = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * len(data) + (1 << 20)
    assert reason.isprintable()  # one line
    shapes = CONFIG.tensor_shapes()
    for name, values in found.items():
        assert values.shape == shapes[name][1:]
        assert np.isfinite(values).all()
        assert (values >= 0).all()
