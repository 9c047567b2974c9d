"""Any change to the JSON of a folder: it opens, or one of our errors refuses it in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from folders import Folder
from llama2 import checkpoint
from llama2.errors import Llama2Error

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = [
    *Folder().config, "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "attention_bias",
    "quantization_config", "auto_map", "chat_template", "model_max_length", "weight_map",
]  # fmt: skip
FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "quantize_config.json"]

numbers = st.integers() | st.floats() | st.sampled_from([10**30, -(10**4000), 1e-320, 1e308, 2**63, 2**31])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=9) | st.sampled_from(["\ud800", "a\nb", "\x1b[2J"])
keys = st.sampled_from(KEYS) | st.text(max_size=3)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=6)
NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta")
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "default", "yarn", "dynamic"])},
    optional=dict.fromkeys(NUMBERS, numbers),
)
changes = st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(KEYS), values | ropes), min_size=1, max_size=4)


@fuzz
@given(changes=changes, twice=st.booleans(), dropped=st.sampled_from(["", *Folder().config]))
@example(changes=[("config.json", "rope_theta", 1e-320)], twice=False, dropped="")
@example(changes=[("generation_config.json", "eos_token_id", [2, "\ud800"])], twice=False, dropped="")
@example(changes=[("config.json", "rms_norm_eps", 10**4000)], twice=False, dropped="")
def test_any_value_of_any_key(changes: list[tuple[str, str, Any]], twice: bool, dropped: str, tmp_path: Path) -> None:
    folder = Folder()
    folder.config.pop(dropped, None)
    pairs: dict[str, list[tuple[str, Any]]] = {name: [] for name, _, _ in changes} | {"config.json": []}
    pairs["config.json"] += [pair for pair in folder.config.items() if twice or pair[0] not in {c[1] for c in changes}]
    for name, key, value in changes:
        pairs[name].append((key, value))
    folder.files = {
        name: ("{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in listed) + "}").encode()
        for name, listed in pairs.items()
    }
    path = folder.write(tmp_path / "model")
    for name in set(FILES) - pairs.keys():
        (path / name).unlink(missing_ok=True)
    reason = ""
    try:
        model = checkpoint.open(path)
        model.config.rope_divisors()
        assert all(note.isprintable() for note in model.notes)
    except Llama2Error as error:
        reason = str(error)
    assert reason.isprintable()
    assert len(reason) < 500 + len(str(path))
