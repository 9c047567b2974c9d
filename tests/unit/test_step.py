"""A step of the optimiser against transformers' gradients, torch's own AdamW, and by hand."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama2 import checkpoint
from llama2.data.loader import TokenBatch
from llama2.model.transformer import Transformer, document_mask
from llama2.train.objective import Network, next_token
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step
from models import tiny_config, write_tiny_gguf
from oracle_transformers import their_names, their_order, transformers_model
from steps import gradients, network, rows


@pytest.mark.parametrize("tied", [True, False])
def test_accumulated_gradients_against_transformers(tied: bool, tmp_path: Any) -> None:
    """The mean over all targets, however they are divided into micro-batches, as if it were one batch."""
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(tied_embeddings=tied))
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        ours, theirs, config = Transformer.load(model), transformers_model(model), model.config
    batches = [rows(2, 17, 1), rows(1, 17, 2, ignored=12), rows(3, 17, 3, ignored=1)]
    logits = theirs(torch.from_numpy(np.concatenate([batch.tokens for batch in batches]))).logits
    targets = torch.from_numpy(np.concatenate([batch.targets for batch in batches]))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    truth = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    step = Step(ours, partial(next_token, chunk=10), optimizer=OptimizerSettings(clip=1e9), precision="fp32")
    _, found = gradients(step, batches)
    assert found.keys() == config.tensor_shapes().keys()
    for name, gradient in found.items():
        wanted = truth[their_names(config)[name]]
        error = np.abs(their_order(config, name, gradient.numpy()) - wanted).max()
        assert error <= 1e-5 * np.abs(wanted).max(), name
    progress = step.step(batches, 0.0)
    assert progress.loss == pytest.approx(expected.item(), rel=1e-6)
    assert progress.norm == pytest.approx(np.sqrt(sum(np.square(g).sum() for g in truth.values())), rel=1e-5)
    assert (progress.count, progress.skipped) == (2 * 17 + 5 + 3 * 16, False)
    assert step.evaluate(batches) == pytest.approx(expected.item(), rel=1e-6)


def test_steps_are_those_of_adamw() -> None:
    """Twenty steps with clipping and changing rates against a loop over torch's AdamW without its fused kernel."""
    ours, theirs = network(), network()
    step = Step(ours, optimizer=OptimizerSettings(clip=0.5, weight_decay=0.1), precision="fp32")
    decayed = [p for name, p in theirs.named_parameters() if "norm" not in name]
    others = [p for name, p in theirs.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, foreach=False, fused=False)
    for i in range(20):
        batch, rate = rows(2, 11, i), 1e-2 * (i + 1) / 20
        progress = step.step([batch], rate)
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        loss = F.cross_entropy(theirs(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
        assert progress.loss == pytest.approx(loss.item(), rel=1e-4)
        assert progress.norm == pytest.approx(norm.item(), rel=1e-3)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine - other).abs().max() <= 1e-3 * other.abs().max(), name


def test_any_objective_of_any_batch() -> None:
    """The mean over both micro-batches' losses, of a loss whose gradient is known: w · g has g."""

    @dataclass
    class Weighted:
        gradient: torch.Tensor
        count: int
        source: str = ""

    def objective(network: Network, batch: Weighted) -> torch.Tensor:
        return (network.transformer.norm.weight * batch.gradient).sum()

    step = Step(network(), objective, optimizer=OptimizerSettings(clip=1e9), precision="fp32")
    width = step.network.config.dim
    first, second = torch.arange(width).float(), torch.ones(width)
    progress = step.step([Weighted(first, 3), Weighted(second, 1)], 0.0)
    total = width * (width - 1) // 2 + width  # of weights that are all 1
    assert (progress.loss, progress.count) == (pytest.approx(total / 4), 4)
    assert progress.norm == pytest.approx(((first + second) / 4).norm().item())
    assert step.evaluate([Weighted(first, 2)]) == pytest.approx(first.sum().item() / 2)


def test_documents_know_nothing_of_each_other() -> None:
    """One row of three documents is the same as a row for each, in loss and gradients."""
    parts = [rows(1, length, seed) for seed, length in enumerate((5, 1, 9))]
    packed = TokenBatch(
        *(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("tokens", "targets")),
        np.array([[4] * 5 + [5] * 1 + [6] * 9], np.int32),
    )
    step = Step(network(), precision="fp32")
    (_, expected), (_, found) = gradients(step, parts), gradients(step, [packed])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    packed = TokenBatch(packed.tokens, packed.targets)
    assert gradients(step, [packed])[1]["norm.weight"].sub(expected["norm.weight"]).abs().max() > 1e-4


def test_positions_and_sight_within_documents() -> None:
    positions, visible = document_mask(torch.tensor([[7, 7, 8, 8], [0, 0, 0, 0]]))
    assert positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert visible[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert visible[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("fault", ["loss", "norm", "no target"])
def test_what_is_not_finite_changes_nothing(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(network(), precision="fp32")
    step.step([rows(2, 11, 0)], 1e-2)
    before = {name: p.clone() for name, p in step.network.named_parameters()}
    moments = [state["exp_avg"].clone() for state in step.optimizer.state.values()]
    batch = rows(2, 11, 1, ignored=11 if fault == "no target" else 0)
    if fault == "loss":
        with torch.no_grad():
            step.network.norm.weight[3] = torch.nan
            before["norm.weight"][3] = torch.nan
    elif fault == "norm":
        step.network.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    assert step.step([batch], 1e-2).skipped
    for name, parameter in step.network.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
        assert parameter.grad is None
    for state, moment in zip(step.optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)


def test_bfloat16_is_close_and_keeps_float32_parameters() -> None:
    _, expected = gradients(Step(network(), precision="fp32"), [rows(4, 33, 0)])
    _, found = gradients(Step(network(), precision="bf16"), [rows(4, 33, 0)])
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - expected[name]).norm() <= 0.03 * expected[name].norm(), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiler_that_fails_in_the_middle_leaves_no_trace(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the second micro-batch needs another program, and gradients of the first are there already."""
    plain = Step(network(), precision="fp32", recompute=recompute)
    expected = [plain.step([rows(2, 11, seed), rows(2, 11, seed + 1)], 1e-2) for seed in (0, 2)]
    monkeypatch.setattr("llama2.model.parallel.compiled", lambda function, **_: function)
    step = Step(network(), precision="fp32", recompute=recompute, compile=True)
    step.running.attention = plain.running.attention
    really, calls = step._loss, []

    def fails(batch: TokenBatch) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("no compiler\nSet TORCH_LOGS to see more")
        return really(batch)

    monkeypatch.setattr(step, "_loss", fails)
    found = [step.step([rows(2, 11, seed), rows(2, 11, seed + 1)], 1e-2) for seed in (0, 2)]
    assert found == expected
    assert len(calls) == 2 + 2 + 2
    assert step.take_note() == (
        "continues without compile, which failed (no compiler); a C++ compiler such as g++ is faster"
    )
    assert ["forward" in vars(layer) for layer in step.network.layers] == [recompute] * len(step.network.layers)
