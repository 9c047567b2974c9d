"""The page's parts by published check values and by hand; what it promises of names, memory, cache and compilers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2 import checkpoint
from llama2.config import LLAMA_1_SIZES, SIZES, ModelConfig
from llama2.errors import ContextError
from llama2.model.transformer import (
    ContiguousCache,
    RMSNorm,
    Transformer,
    apply_rope,
    attention,
    attention_by_products,
    document_mask,
    rope_cos_sin,
)
from models import tiny_config, write_tiny_gguf


def test_rms_norm() -> None:
    """[1, 2, 3, 4] over √7.5 (spec 12.3), and in half precision, where 600² would overflow."""
    norm = RMSNorm(4, 1e-5)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.tensor([0.365148, 0.730296, 1.095444, 1.460593])
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-6)
    halves = norm.half()(600 * x.half())
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("position", "pair", "cos", "sin"),
    [
        (1, 0, 0.540302, 0.841471),
        (2, 1, -0.160436, 0.987046),
        (1000, 31, 0.524600, -0.851349),
        (2047, 32, -0.049627, 0.998768),
        (4095, 1, -0.742366, 0.669995),
        (4095, 63, 0.890259, 0.455455),
    ],
)
def test_rotations_of_7b(position: int, pair: int, cos: float, sin: float) -> None:
    """Spec 12.2's table, in float64; a float32 angle would be off by 8e-5 at position 4095."""
    table = rope_cos_sin(torch.arange(4096), tuple(SIZES["7B"].inverse_frequencies()))
    assert table.shape == (4096, 64, 2)
    assert table[position, pair].tolist() == pytest.approx([cos, sin], abs=1e-6)


def test_rotary_embedding() -> None:
    """Spec 12.2: [1 … 8] at position 3, pairs side by side."""
    x = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    turned = apply_rope(x, rope_cos_sin(torch.tensor([3]), (1.0, 0.1, 0.01, 0.001))).flatten()
    expected = [-1.272233, -1.838865, 1.683929, 4.707907, 4.817777, 6.147278, 6.975969, 8.020964]
    assert turned.tolist() == pytest.approx(expected, abs=1e-5)


def test_neighbouring_query_heads_share_keys_and_values() -> None:
    """Values of key/value head g are g everywhere, so query heads 3g to 3g + 2 read g (spec 1)."""
    q, k = torch.randn(2, 5, 6, 4), torch.randn(2, 5, 2, 4)
    v = torch.arange(2.0)[:, None].expand(2, 5, 2, 4)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None].expand(2, 5, 6, 4)
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("heads", [6, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_by_products_is_attention(heads: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more tokens than it takes at once, and no multiple of them; gradients too."""
    monkeypatch.setattr("llama2.model.transformer.QUERIES", 64)
    q, k, v = (torch.randn(2, 150, count, 8, requires_grad=True) for count in (6, heads, heads))
    visible = document_mask(torch.arange(150).expand(2, 150) // 40)[1] if packed else None
    results = []
    for function in (attention, attention_by_products):
        y = function(q, k, v, visible)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [*SIZES.values(), *LLAMA_1_SIZES.values()])
def test_every_size_without_memory(config: ModelConfig) -> None:
    """A whole model on the meta device has the tensors of a checkpoint, and a forward pass has the logits' shape."""
    with torch.device("meta"):
        network = Transformer(config)
        assert network(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 32000)
    assert {name: tuple(weight.shape) for name, weight in network.state_dict().items()} == config.tensor_shapes()
    assert sum(parameter.numel() for parameter in network.parameters()) == config.parameters()


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    for format, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        for tied in (False, True):
            write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(tied_embeddings=tied), format=format)
            with checkpoint.open(tmp_path / "tiny.gguf") as model:
                tensors = Transformer.load(model, dtype=dtype).tensors()
                assert tensors.keys() == model.tensors.keys()
                for name, tensor in tensors.items():
                    assert (tensor.name, tensor.format, tensor.shape) == (name, format, model.tensors[name].shape)
                    exact = model.tensors[name].format == format  # norms are float32 in any file
                    np.testing.assert_allclose(
                        tensor.dequantize(), model.tensors[name].dequantize(), rtol=0 if exact else 2**-8
                    )


def test_initialisation() -> None:
    """Deviation 0.02, divided by √(2 · 8) = 4 where a block adds to the residual; norms are 1; same seed, same bits."""
    config = tiny_config("Q2_K", n_layers=8)
    network = Transformer(config)
    network.initialise(torch.Generator().manual_seed(1))
    for name, weight in network.state_dict().items():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        else:
            deviation = 0.005 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert weight.std().item() == pytest.approx(deviation, rel=0.03)
            assert abs(weight.mean().item()) < 0.05 * deviation
    with torch.device("meta"):
        other = Transformer(config)
    other.to_empty(device="cpu").initialise(torch.Generator().manual_seed(1))
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])


def test_a_new_model_knows_nothing() -> None:
    """Its loss is that of a guess, log V, which is what the size of the initial weights is for."""
    config = tiny_config("Q2_K")
    ids = torch.randint(0, config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(Transformer(config)(ids).flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_a_full_cache_is_an_error() -> None:
    network = Transformer(tiny_config())
    cache = ContiguousCache(network, 1, 8)
    network(torch.zeros(1, 5, dtype=torch.long), cache)
    with pytest.raises(ContextError, match="a cache of 8 tokens has no room for 9; make a longer one"):
        network(torch.zeros(1, 4, dtype=torch.long), cache)
    assert cache.length == 5
    assert network(torch.zeros(1, 3, dtype=torch.long), cache).shape == (1, 3, 320)


@pytest.mark.parametrize("cached", [False, True])
def test_the_whole_forward_pass_is_one_graph(cached: bool) -> None:
    network = Transformer(tiny_config())
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    ids = torch.randint(0, 320, (2, 12))
    with torch.inference_mode():
        logits = compiled(ids, ContiguousCache(network, 2, 16)) if cached else compiled(ids)
        torch.testing.assert_close(logits, network(ids), rtol=0, atol=1e-6)


def test_training_through_autocast_keeps_float32_weights() -> None:
    network, ids = Transformer(tiny_config()), torch.randint(0, 320, (1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(ids)
    logits.square().mean().backward()
    assert logits.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}
    torch.testing.assert_close(logits, network(ids), rtol=0, atol=0.02)
