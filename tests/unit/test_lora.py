"""Low-rank updates of a frozen network: what is trained, what is held in memory, and dropout's masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint, quantization
from llama2.data.loader import IGNORED
from llama2.model import lora
from llama2.model.lora import Lora, LoraLinear, QuantizedLinear
from llama2.model.transformer import Transformer
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step
from models import tiny_config, write_tiny_gguf
from steps import gradients, rows, seeded

LORA = Lora(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The same shape in three formats, of which the quantized ones are random."""
    folder, opened = tmp_path_factory.mktemp("lora"), {}
    for format in ("F32", "Q4_1", "Q4_0"):
        path = folder / f"{format}.gguf"
        write_tiny_gguf(path, format=format, config=tiny_config(biases=("attention.wq",), tied_embeddings=True))
        opened[format] = checkpoint.open(path)
    return opened


def adapted(base: Checkpoint, settings: Lora = LORA, quantize: str | None = None) -> Transformer:
    """A network whose updates are not 0."""
    network = lora.load_frozen(base, quantize=quantize)
    lora.attach(network, settings, seeded())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=seeded(), std=0.1)
    return network


def test_a_new_adapter_changes_nothing(files: dict[str, Checkpoint]) -> None:
    network, tokens = Transformer.load(files["F32"]), torch.from_numpy(rows(2, 9, 0).tokens)
    lora.attach(network, LORA, seeded())
    assert all(p.requires_grad == ("lora_" in name) for name, p in network.named_parameters())
    assert torch.equal(network(tokens), Transformer.load(files["F32"])(tokens))
    width = files["F32"].config.dim
    first = network.get_submodule("layers.0.attention.wq")
    assert isinstance(first, LoraLinear)
    assert 0.9 / width**0.5 < first.lora_a.abs().max() <= 1 / width**0.5


def test_the_optimizer_sees_the_adapter_alone(files: dict[str, Checkpoint]) -> None:
    """The frozen weights have no gradient, also the norms and the head, and stay as they are."""
    network = adapted(files["F32"])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = Step(network, optimizer=OptimizerSettings(clip=1e9), precision="fp32")
    _, found = gradients(step, [rows(2, 9, 1)], lr=1e-2)
    trained = {name for name in before if "lora_" in name}
    assert found.keys() == trained
    assert len(trained) == 2 * 2 * files["F32"].config.n_layers
    assert [len(group["params"]) for group in step.optimizer.param_groups] == [len(trained)]
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_masked_targets_have_no_gradient(files: dict[str, Checkpoint]) -> None:
    """Exactly none of a row without targets, whatever is in it."""
    batch, other = rows(2, 9, 1), rows(2, 9, 2)
    for each in (batch, other):
        each.targets[0] = IGNORED
    other.tokens[1], other.targets[1] = batch.tokens[1], batch.targets[1]
    step = Step(adapted(files["F32"]), precision="fp32")
    (first, mine), (second, others) = gradients(step, [batch]), gradients(step, [other])
    assert (first.loss, first.count) == (second.loss, 9)
    assert all(torch.equal(gradient, others[name]) for name, gradient in mine.items())
    batch.targets[1] = IGNORED
    running = step.running(batch)
    running.backward()
    assert running.item() == 0
    assert not any(p.grad.any() for p in step.network.parameters() if p.grad is not None)


@pytest.mark.parametrize("format", ["Q4_1", "Q4_0"])
def test_quantized_product(format: str, files: dict[str, Checkpoint]) -> None:
    """Dequantize, then multiply: of the file's own bytes, and of what quantization makes of floats."""
    name = "layers.1.feed_forward.w2"
    x = torch.randn(3, 128, generator=seeded(), requires_grad=True)
    for source in (format, "F32"):
        stored = files[source].tensors[f"{name}.weight"]
        data = stored.data
        if source == "F32":
            data = quantization.quantize(stored.dequantize(), format, np.ones(128, np.float32))
        weight = torch.from_numpy(quantization.dequantize(data, format, stored.shape))
        layer = lora.load_frozen(files[source], quantize=format).get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.dequantize(), weight)
        assert torch.equal(layer(x), F.linear(x, weight))
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        (expected,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
        torch.testing.assert_close(found, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), F.linear(x, weight))


def test_quantized_network_is_that_of_the_file(files: dict[str, Checkpoint]) -> None:
    found, expected = adapted(files["Q4_1"], quantize="Q4_1"), adapted(files["Q4_1"])
    (_, mine), (_, truth) = (gradients(Step(each, precision="fp32"), [rows(2, 9, 1)]) for each in (found, expected))
    torch.testing.assert_close(mine, truth)


def test_memory_of_a_quantized_network(files: dict[str, Checkpoint]) -> None:
    """The matrices have 5 bits a weight; between forward and backward pass nothing keeps their floats."""
    network, config = adapted(files["F32"], quantize="Q4_1"), files["F32"].config
    held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    shapes = config.tensor_shapes()
    matrices = sum(s[0] * s[1] for name, s in shapes.items() if len(s) == 2 and "embeddings" not in name)
    others = config.parameters() - matrices
    updates = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
    assert held == matrices * 20 // 32 + 4 * (others + updates)
    largest = 4 * config.dim * config.hidden_dim
    kept: list[int] = []
    tokens = torch.zeros(1, 1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
    ):
        network.hidden_states(tokens)
    assert kept
    assert max(kept) < largest


def test_bfloat16_holds_the_matrices_as_products_read_them(files: dict[str, Checkpoint]) -> None:
    """Autocast rounds float32 matrices in every product; held in bfloat16, they give the same bits."""
    halves = lora.load_frozen(files["F32"], dtype=torch.bfloat16)
    assert {p.dtype for name, p in halves.named_parameters() if name.endswith("w1.weight")} == {torch.bfloat16}
    tokens = torch.from_numpy(rows(2, 9, 0).tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halves(tokens), lora.load_frozen(files["F32"])(tokens))


def test_dropout_follows_from_seed_and_step(files: dict[str, Checkpoint]) -> None:
    def losses(number: int, seed: int = 0, *, recompute: bool = False) -> dict[str, list[float]]:
        network = adapted(files["F32"], Lora(4, 8.0, 0.5, ("q_proj",)))
        step = Step(network, precision="fp32", seed=seed, recompute=recompute)
        torch.rand(number + 3)  # whatever was drawn before
        progress = step.step([rows(2, 9, 0), rows(2, 9, 0)], 0.1, number)
        after = network.get_parameter("layers.0.attention.wq.lora_b").detach().flatten().tolist()
        return {"loss": [progress.loss, progress.norm], "after": after}

    first = losses(1)
    assert losses(1) == first
    assert losses(1, recompute=True) == first
    assert losses(2)["loss"] != first["loss"] != losses(1, seed=1)["loss"]
    step = Step(adapted(files["F32"], Lora(4, 8.0, 0.5, ("q_proj",))), precision="fp32")
    plain = Step(adapted(files["F32"], Lora(4, 8.0, 0.0, ("q_proj",))), precision="fp32")
    assert step.evaluate([rows(2, 9, 0)]) == plain.evaluate([rows(2, 9, 0)]) != first["loss"][0]
