"""The published sizes, and how positions turn (paper 2.2, table 1)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama2.config import BIASED, LLAMA_1_SIZES, SIZES, ModelConfig, RopeScaling, yarn_attention_factor
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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("33B", 32_528_943_616), ("65B", 65_285_660_672)],
)
def test_sizes_of_llama_1(name: str, parameters: int) -> None:
    config = LLAMA_1_SIZES[name]
    assert config.parameters() == parameters
    assert (config.n_kv_heads, config.context_length) == (config.n_heads, 2048)


@pytest.mark.parametrize(
    ("name", "matrices", "attention", "mean_attention", "training"),
    [
        ("7B", 13_214_154_752, 2_147_483_648, 1_074_003_968, 8.086e22),
        ("13B", 25_703_219_200, 3_355_443_200, 1_678_131_200, 1.562e23),
        ("34B", 66_962_063_360, 6_442_450_944, 3_222_011_904, 4.049e23),
        ("70B", 137_426_370_560, 10_737_418_240, 5_370_019_840, 8.277e23),
    ],
)
def test_operations_of_a_token(name: str, matrices: int, attention: int, mean_attention: int, training: float) -> None:
    config = SIZES[name]
    assert config.matrix_flops() == 2 * config.matrix_parameters() == matrices
    assert config.attention_flops(4096) == attention
    assert config.causal_attention_flops(4096) == mean_attention
    assert config.training_flops(2 * 10**12) == pytest.approx(training, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "token", "context"),
    [("7B", 524_288, 2.0), ("13B", 819_200, 3.125), ("34B", 196_608, 0.75), ("70B", 327_680, 1.25)],
)
def test_bytes_of_the_cache(name: str, token: int, context: float) -> None:
    """Of a token, and in GiB of a whole context; numbers of four bytes take twice as much."""
    assert SIZES[name].cache_bytes() == token
    assert SIZES[name].cache_bytes(4096) == context * 2**30
    assert SIZES[name].cache_bytes(3, number=4) == 6 * token


def test_grouping_saves_seven_eighths_of_the_cache_of_70b() -> None:
    assert replace(SIZES["70B"], n_kv_heads=64).cache_bytes() == 2_621_440


def test_operations_do_not_depend_on_who_holds_the_head() -> None:
    """By hand, 2 layers of (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) and the head's 10 * 16; attention is 4 * 2 * 16."""
    for tied in (False, True):
        config = replace(TINY, tied_embeddings=tied)
        assert config.matrix_parameters() == 2 * 1920 + 160
        assert config.attention_flops(5) == 5 * 128
        assert config.causal_attention_flops(4) == (1 + 2 + 3 + 4) * 128 / 4


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
        {"kind": "dynamic", "factor": 4.0, "original_context": 1 << 17},
        {"kind": "yarn", "factor": 16.0, "original_context": 8192, "attention_factor": 1.5},
        {"kind": "yarn", "factor": 40.0, "original_context": 4096, "beta_fast": 64.0, "beta_slow": 2.0},
        {"kind": "yarn", "factor": 4.0, "original_context": 64, "truncate": False},
        {"kind": "yarn", "factor": 4.0, "original_context": 1, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
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
        rope_parameters={names.get(key, key): value for key, value in ({"attention_factor": 1.0} | scaling).items()}
        | {"rope_theta": 5e5},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, torch.device("cpu"))
    assert ours.inverse_frequencies() == pytest.approx(expected.tolist(), rel=2e-6)
    assert ours.attention_factor() == factor


@pytest.mark.parametrize("scales", [{}, {"mscale": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.3}])
@pytest.mark.parametrize("factor", [0.5, 1.0, 40.0])
def test_attention_factor_of_yarn_against_transformers(factor: float, scales: dict[str, float]) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64, "rope_theta": 1e4, **scales}
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(rope_parameters=rope), torch.device("cpu"))
    assert yarn_attention_factor(factor, **scales) == pytest.approx(expected, rel=1e-12)


def test_how_far_scaling_reaches() -> None:
    """YaRN and dynamic scaling multiply what a model was trained on; a file that states more knows better."""
    for kind in ("yarn", "dynamic"):
        assert RopeScaling(kind, factor=4.0, original_context=4096).context(4096) == 16384
        assert RopeScaling(kind, factor=4.0, original_context=4096).context(20000) == 20000
    assert RopeScaling("llama3", factor=8.0).context(131072) == 131072
    assert RopeScaling("linear", factor=8.0).context(4096) == 4096


def test_biases_and_window() -> None:
    config = ModelConfig(**CHANGES | {"biases": BIASED, "sliding_window": 3})
    plain = ModelConfig(**CHANGES)
    shapes = config.tensor_shapes()
    assert sum(map(math.prod, shapes.values())) == config.parameters()
    assert config.matrix_flops() == plain.matrix_flops()
    assert shapes["layers.0.feed_forward.w1.bias"] == (config.hidden_dim,)
    assert shapes["layers.0.attention.wo.bias"] == shapes["layers.0.feed_forward.w2.bias"] == (config.dim,)
    with pytest.raises(ConfigError, match=r"must be some of attention\.wq"):
        ModelConfig(**CHANGES | {"biases": BIASED[::-1]})


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
        ({"kind": "llama3", "original_context": 0}, "original_context=0 must be 1 to"),
        ({"kind": "yarn", "original_context": 10**400}, "must be 1 to"),
        ({"kind": "yarn", "attention_factor": math.inf}, "attention_factor=inf must be a positive number"),
        ({"kind": "dynamic", "factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"kind": "llama3", "divisors": (1.0, math.inf)}, "divisors must be positive numbers"),
    ],
)
def test_impossible_scalings_are_refused(scaling: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RopeScaling(**scaling)
