"""Random damage to a valid folder of Hugging Face's format: it opens, or one of our errors refuses it in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damages import Damage, damages
from folders import Folder
from llama2 import checkpoint
from llama2.errors import CheckpointError, ConfigError, TokenizerError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SEED = Folder().part([*Folder().tensors])
HEADER = 8 + int.from_bytes(SEED[:8], "little")

numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 1e308])
texts = st.text(max_size=8) | st.sampled_from(["../x", "/etc/passwd", "F64", "I8", "yarn", "llama3", "linear"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, valid in all its parts."""
    path = Folder().write(tmp_path_factory.mktemp("seed") / "model")
    use(path)
    return path


def use(path: Path) -> None:
    model = checkpoint.open(path)
    model.check_finite()
    for tensor in model.tensors.values():
        assert len(tensor.data) == tensor.nbytes
        tensor.dequantize()
    model.tokenizer.decode(range(model.config.vocab_size))


def assert_refused_or_harmless(path: Path) -> None:
    reason = ""
    try:
        use(path)
    except (CheckpointError, ConfigError, TokenizerError) as error:
        reason = str(error)
    assert reason.isprintable()  # one line


@fuzz
@given(changes=st.lists(damages(HEADER), min_size=1, max_size=4))
def test_any_damage_to_the_header(folder: Path, changes: list[Damage]) -> None:
    data = SEED
    for damage in changes:
        data = damage(data)
    (folder / WHOLE).write_bytes(data)
    try:
        assert_refused_or_harmless(folder)
    finally:
        (folder / WHOLE).write_bytes(SEED)


def put(data: st.DataObject, tree: Any, value: Any) -> Any:
    """`tree` with `value` at a place of it."""
    if not tree or not isinstance(tree, (dict, list)) or data.draw(st.integers(0, 4)) == 0:
        return value
    key = data.draw(st.sampled_from([*tree] if isinstance(tree, dict) else range(len(tree))))
    changed = tree.copy()
    changed[key] = put(data, tree[key], value)
    return changed


@fuzz
@given(data=st.data(), value=values, name=st.sampled_from(["config.json", "tokenizer.json", INDEX, WHOLE]))
def test_any_value_at_any_place(tmp_path: Path, data: st.DataObject, value: Any, name: str) -> None:
    parts = Folder(config=Folder().config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    (tmp_path / WHOLE).unlink(missing_ok=True)
    if name == INDEX:
        parts.shards()
        parts.files[INDEX] = _text(put(data, json.loads(parts.files[INDEX]), value))
    elif name == WHOLE:
        text = _text(put(data, json.loads(SEED[8:HEADER]), value))
        parts.files[WHOLE] = len(text).to_bytes(8, "little") + text + SEED[HEADER:]
    else:
        tree = parts.config if name == "config.json" else parts.tokenizer
        parts.files[name] = _text(put(data, tree, value))
    assert_refused_or_harmless(parts.write(tmp_path))


def _text(tree: Any) -> bytes:
    return json.dumps(tree).encode()
