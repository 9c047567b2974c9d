"""The published sizes, and how positions turn (paper 2.2, table 1)."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama2.config import SIZES, ModelConfig, RopeScaling
from llama2.errors import ConfigError

TINY = ModelConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=10, head_dim=4, context_length=32
)
CHANGES = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("7B", 6_738_415_616, 291),
        ("13B", 13_015_864_320, 363),
        ("34B", 33_743_970_304, 435),
        ("70B", 68_976_648_192, 723),
    ],
)
def test_published_sizes(name: str, parameters: int, tensors: int) -> None:
    shapes = SIZES[name].tensor_shapes()
    assert SIZES[name].parameters() == sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == tensors


def test_a_tied_output_head_is_no_tensor_and_counts_once() -> None:
    tied = ModelConfig(**CHANGES | {"tied_embeddings": True})
    assert TINY.parameters() - tied.parameters() == 10 * 16
    assert set(TINY.tensor_shapes()) - set(tied.tensor_shapes()) == {"output.weight"}


def test_inverse_frequencies() -> None:
    """theta ** (-2i / 128): a half turn of the exponent is 0.1, all of it but one pair 1.1548e-4."""
    frequencies = SIZES["7B"].inverse_frequencies()
    assert len(frequencies) == 64
    assert [frequencies[i] for i in (0, 1, 16, 32, 48, 63)] == pytest.approx(
        [1, 0.8659643234, 0.1, 0.01, 0.001, 1.154781985e-4], rel=1e-9
    )


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "linear", "factor": 4.0},
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192},
        {"kind": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_context": 1024},
    ],
)
def test_scaled_frequencies_against_transformers(scaling: dict[str, Any]) -> None:
    ours = ModelConfig(**CHANGES | {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": RopeScaling(**scaling)})
    names = {"kind": "rope_type", "original_context": "original_max_position_embeddings"}
    theirs = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=1 << 17,
        rope_parameters={names.get(key, key): value for key, value in scaling.items()} | {"rope_theta": 5e5},
    )
    expected, _ = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, torch.device("cpu"))
    assert ours.inverse_frequencies() == pytest.approx(expected.tolist(), rel=1e-6)


def test_divisors_of_a_file_win() -> None:
    scaling = RopeScaling("llama3", factor=8.0, divisors=(2.0, 4.0))
    config = ModelConfig(**CHANGES | {"rope_theta": 100.0, "rope_scaling": scaling})
    assert config.inverse_frequencies() == pytest.approx([1 / 2, 0.1 / 4])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"vocab_size": 0}, "vocab_size=0 must be between 1 and"),
        ({"dim": 1 << 40}, "dim=1099511627776 must be between 1 and"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a positive number"),
        ({"rope_scaling": RopeScaling("llama3", divisors=(1.0,))}, "has 1 divisors, head_dim=4 needs half as many"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig(**CHANGES | change)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"kind": "linear", "factor": 0.0}, "factor=0.0 must be a positive number"),
        ({"kind": "llama3", "low_freq_factor": 4.0}, "high_freq_factor must be larger than low_freq_factor"),
        ({"kind": "llama3", "original_context": 0}, "original_context=0 must be at least 1"),
        ({"kind": "llama3", "divisors": (1.0, math.inf)}, "divisors must be positive numbers"),
    ],
)
def test_impossible_scalings_are_refused(scaling: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RopeScaling(**scaling)
