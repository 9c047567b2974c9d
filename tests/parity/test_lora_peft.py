"""Adapters beside peft on transformers' Llama: logits, gradients, and files in both directions (float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.data.loader import IGNORED
from llama2.model.transformer import Transformer
from llama2.train import adapters
from llama2.train.settings import LoraSettings, OptimizerSettings
from llama2.train.states import AdapterWriter
from llama2.train.step import Step
from models import tiny_config, write_tiny_gguf
from oracle_transformers import their_names, their_order, transformers_model
from steps import gradients, rows

#: peft asks transformers by a name that is old there.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
SETTINGS = LoraSettings(rank=4, alpha=6, dropout=0.0, targets=TARGETS)
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (2, 23)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(biases=("attention.wq", "attention.wk", "attention.wv")))
    return checkpoint.open(path)


@pytest.fixture
def theirs(base: Checkpoint) -> Any:
    """peft's model, of which both factors are random."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(transformers_model(base), config)


@pytest.fixture
def ours(base: Checkpoint, theirs: Any, tmp_path: Path) -> Transformer:
    """Our network with the adapter that peft saved."""
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    return build(base, SETTINGS.model_copy(update={"adapter": str(tmp_path / "theirs")}))


def build(base: Checkpoint, settings: LoraSettings) -> Transformer:
    settings, found = adapters.continued(settings, base, Path)
    return adapters.build(base, settings, found, precision="fp32", seed=0, device=torch.device("cpu"))


def trained(network: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_of_an_adapter_of_theirs(base: Checkpoint, theirs: Any, ours: Transformer, tmp_path: Path) -> None:
    """Added in each product, and merged for the engine."""
    with torch.no_grad():
        expected, plain = theirs(TOKENS).logits, Transformer.load(base)(TOKENS)
        assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
        assert_close(ours(TOKENS), expected)
        merged = checkpoint.open(base.path, adapters=[(tmp_path / "theirs", 1.0)])
        assert_close(Transformer.load(merged)(TOKENS), expected)


def test_logits_of_an_adapter_of_ours(base: Checkpoint, ours: Transformer, tmp_path: Path) -> None:
    weights = trained(ours)
    generator = torch.Generator().manual_seed(2)
    for value in weights.values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.01)
    write: AdapterWriter = adapters.writer(base, SETTINGS, "org/base", None)
    write(tmp_path / "ours", weights)
    read = PeftModel.from_pretrained(transformers_model(base), tmp_path / "ours")
    assert read.peft_config["default"].base_model_name_or_path == "org/base"
    with torch.no_grad():
        assert_close(read(TOKENS).logits, ours(TOKENS))
        assert_close(read.merge_and_unload()(TOKENS).logits, ours(TOKENS))
    again = build(base, LoraSettings(adapter=str(tmp_path / "ours")))
    assert {name: value.tolist() for name, value in trained(again).items()} == {
        name: value.tolist() for name, value in weights.items()
    }


def test_gradients(base: Checkpoint, theirs: Any, ours: Transformer) -> None:
    batch = rows(3, 17, 1, ignored=5)
    logits = theirs(torch.from_numpy(batch.tokens)).logits
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), ignore_index=IGNORED).backward()
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    step = Step(ours, optimizer=OptimizerSettings(clip=1e9), precision="fp32")
    _, found = gradients(step, [batch])
    assert len(found) == len(truth) == 2 * len(TARGETS) * base.config.n_layers
    for name, gradient in found.items():
        module, _, part = name.rpartition(".lora_")
        wanted = truth[
            f"base_model.model.{their_names(base.config)[f'{module}.weight'].removesuffix('.weight')}"
            f".lora_{part.upper()}.default.weight"
        ]
        mine = gradient.numpy() if part == "a" else their_order(base.config, f"{module}.weight", gradient.numpy())
        assert_close(torch.from_numpy(np.ascontiguousarray(mine)), wanted)
