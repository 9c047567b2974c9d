"""Every path of PyTorch on a GPU against the same on the CPU; where there is none, the paths run on the CPU alone.

The runner is compared with NumPy. Steps of training are compared with those that tests/unit/test_step.py compares with
transformers, in float32 and without TF32, so that nothing but the order of additions differs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_runner_native import batch, conversation, tiny, tokens
from torch.distributed.device_mesh import init_device_mesh

from fakes import ByteTokenizer
from llama2.align.ranking import ranking
from llama2.data.loader import TokenBatch
from llama2.data.pairs import PairBatch
from llama2.engine.engine import Engine
from llama2.engine.request import Sampling
from llama2.engine.rollout import rollout
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.runner_torch import LiveTorchRunner, TorchRunner, start
from llama2.errors import EngineError
from llama2.model import lora, parallel
from llama2.model.heads import RewardTransformer
from llama2.model.transformer import Transformer
from llama2.train import throughput
from llama2.train.states import States
from llama2.train.step import Step
from models import tiny_config
from steps import adapted, network, rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch can use")
    yield request.param
    if request.param == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def losses(model: Transformer, **settings: Any) -> list[float]:
    """Of six steps on the same rows, of which some have fewer targets than others."""
    step = Step(model, **settings)
    batches = [rows(4, 16, 1, ignored=3), rows(2, 16, 2)]
    return [step.step(batches, 1e-2, number=i).loss for i in range(6)]


def close(found: list[float], expected: list[float], relative: float) -> None:
    """The same losses; and they fall, or nothing was learnt."""
    assert found == pytest.approx(expected, rel=relative)
    assert found[-1] < 0.99 * found[0]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.15)])
def test_runner(device: str, dtype: torch.dtype, largest: float, tmp_path: Path) -> None:
    model = tiny(tmp_path)
    expected = conversation(NumpyRunner(model, 16))
    logits = conversation(TorchRunner(model, 16, device=device, dtype=dtype))
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= largest


def test_compiled_runner(device: str, tmp_path: Path) -> None:
    if device == "cpu":
        pytest.skip("tests/unit/test_runner_torch.py compiles on the CPU")
    model = tiny(tmp_path, config=tiny_config(n_layers=1))
    plain, compiled = (
        TorchRunner(model, 16, device=device, dtype=torch.float32, compile=compile) for compile in (False, True)
    )
    for count in (1, 2, 3):
        step = batch(*((tokens(1, seed=n), 0, [n]) for n in range(count)))
        np.testing.assert_allclose(compiled.forward(step), plain.forward(step), rtol=0, atol=1e-4)


def test_the_default_device_is_the_best_there_is(tmp_path: Path) -> None:
    best = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    runner = start(tiny(tmp_path), 4)
    assert (runner.device.type, runner.keys[0].dtype) == best


def test_hidden_states_for_embeddings(device: str, tmp_path: Path) -> None:
    model, text = tiny(tmp_path), tokens(20)
    expected, found = (np.empty((20, model.config.dim), np.float32) for _ in range(2))
    NumpyRunner(model, 4).forward(batch((text, 0, [1])), expected)
    TorchRunner(model, 4, device=device, dtype=torch.float32).forward(batch((text, 0, [1])), found)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_rollouts_follow_the_weights(device: str) -> None:
    """Greedy answers of a live network, before and after a step that changes it, are those of the CPU."""
    answers: dict[str, list[tuple[int, ...]]] = {}
    for where in ("cpu", device):
        model = network().to(where)
        engine = Engine(LiveTorchRunner(model, 16), ByteTokenizer())  # type: ignore[arg-type]
        answers[where] = []
        for _ in range(2):
            groups = rollout(engine, [[3, 4, 5]], 2, Sampling(temperature=0), max_tokens=12)
            answers[where] += [tuple(answer.tokens) for answer in groups[0]]
            losses(model, precision="fp32")
            engine.weights_changed()
    assert answers[device] == answers["cpu"]
    assert answers[device][0] != answers[device][2]


@pytest.mark.parametrize(
    "settings", [{}, {"recompute": True}, {"compile": True}], ids=["plain", "recompute", "compile"]
)
def test_a_step_in_float32(device: str, settings: dict[str, Any]) -> None:
    expected = losses(network(n_layers=1), precision="fp32")
    close(losses(network(n_layers=1).to(device), precision="fp32", **settings), expected, 1e-4)


def test_a_step_in_bfloat16(device: str) -> None:
    expected = losses(network(), precision="fp32")
    close(losses(network().to(device), precision="bf16"), expected, 0.02)


def test_documents_in_a_row_do_not_read_each_other(device: str) -> None:
    """Two documents in a row have the losses that each has in a row of its own."""
    step = Step(network().to(device), precision="fp32")
    whole = rows(1, 20, 3)
    parts = [TokenBatch(whole.tokens[:, a:b], whole.targets[:, a:b]) for a, b in ((0, 8), (8, 20))]
    numbers = np.repeat([[0, 1]], [8, 12], axis=1).astype(np.int32)
    packed = TokenBatch(whole.tokens, whole.targets, documents=numbers)
    assert step.evaluate([packed]) == pytest.approx(step.evaluate(parts), rel=1e-4)


def test_adapters(device: str) -> None:
    expected = losses(adapted(half=False), precision="fp32")
    close(losses(adapted(half=False).to(device), precision="fp32"), expected, 1e-4)


@pytest.mark.parametrize("format", lora.QUANTIZED)
def test_adapters_of_a_quantized_network(device: str, format: str, tmp_path: Path) -> None:
    model = tiny(tmp_path)

    def of(where: str) -> list[float]:
        frozen = lora.load_frozen(model, quantize=format, device=where)
        lora.attach(frozen, lora.Lora(4, 8.0, 0.0, ("q_proj", "down_proj")), torch.Generator().manual_seed(0))
        return losses(frozen, precision="fp32")

    assert of(device) == pytest.approx(of("cpu"), rel=1e-4)


def test_reward_models(device: str) -> None:
    """Pairs that share a row, with margins and the loss for safety."""

    def found(where: str) -> list[float]:
        torch.manual_seed(0)
        step = Step(RewardTransformer(tiny_config()).to(where), partial(ranking, safety_weight=0.5), precision="fp32")
        pairs = PairBatch(
            tokens=rows(2, 12, 4).tokens,
            documents=np.repeat([[0, 1], [0, 1]], [5, 7], axis=1).astype(np.int32),
            ends=np.array([[4, 11], [16, 23]]),
            margins=np.array([0.0, 1.0], np.float32),
            safe=np.array([[1, 0], [np.nan, np.nan]], np.float32),
        )
        return [step.step([pairs], 1e-2).loss for _ in range(4)]

    close(found(device), found("cpu"), 1e-4)


def test_one_process_sharded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 over the device's own collectives, from weights drawn where the network is."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device, (1, 1), mesh_dim_names=("dp", "tp"))
        with torch.device("meta"):
            model = Transformer(tiny_config())
        step = Step(model, precision="fp32", mesh=mesh, device=device)
        parallel.initialise(model, torch.Generator(device=device).manual_seed(0))
        batches = [rows(4, 16, 1), rows(2, 16, 2)]
        found = [step.step(batches, 1e-2).loss for _ in range(6)]
    finally:
        dist.destroy_process_group()
    assert found[0] == pytest.approx(np.log(320), rel=0.02)  # a new network knows nothing
    assert found[-1] < 0.99 * found[0]


def test_a_state_resumes_on_the_device(device: str, tmp_path: Path) -> None:
    """A step after a state was loaded is the step that followed its saving."""
    model = tiny(tmp_path)
    batches = [rows(4, 16, 1)]

    def begun() -> Step:
        return Step(Transformer.load(model, device=device), precision="fp32")

    def states(step: Step) -> States:
        return States(tmp_path / "run", step, model.config, model.tokenizer, None, keep_last=2)

    first = begun()
    first.step(batches, 1e-2)
    with states(first) as saving:
        saving.save(1, {"position": 7})
    expected = first.step(batches, 1e-2).loss
    again = begun()
    with states(again) as loading:
        assert loading.load(1)["position"] == 7
    assert again.step(batches, 1e-2).loss == pytest.approx(expected, rel=1e-6)


def test_the_peak_of_a_device(device: str) -> None:
    assert throughput.peak_flops(torch.device(device), "fp32") > 1e9


def test_a_cache_too_large_for_the_device(device: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cache"):
        TorchRunner(tiny(tmp_path), 1 << 40, device=device)
