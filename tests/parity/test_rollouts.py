"""Rollouts over a live network against the same weights in a checkpoint, before and after they change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import ByteTokenizer
from llama2 import checkpoint
from llama2.checkpoint import hf_folder
from llama2.config import BIASED, ModelConfig
from llama2.engine.engine import Engine
from llama2.engine.request import Request, Sampling
from llama2.engine.rollout import Rollout, rollout
from llama2.engine.runner import BLOCK, Runner
from llama2.engine.runner_native import LiveNativeRunner, NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.runner_torch import LiveTorchRunner, TorchRunner
from llama2.errors import EngineError
from llama2.model.transformer import Transformer
from models import tiny_config, write_tiny_gguf

SAMPLED = Sampling(temperature=1, top_p=1, seed=7)
PROMPTS = [list(range(3, 3 + 2 * BLOCK + 5)), list(range(100, 109))]
BLOCKS = 64
MODELS = {"grouped": {}, "tied, biases": {"tied_embeddings": True, "biases": BIASED}}


class Tokenizer(ByteTokenizer):
    """Says nothing of the tokens that no byte is."""

    vocab_size = 320

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(min(token, 256))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed weights would be written."""
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def network(dtype: torch.dtype, **changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny_config(**changes))  # type: ignore[arg-type]
    for parameter in model.parameters():  # also norms and biases, which a new network has as ones and zeros
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.to(dtype)


def change(model: Transformer) -> None:
    """As an optimizer's step does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(torch.tensor([PROMPTS[0]])).logsumexp(-1).sum().backward()
    optimizer.step()


def sample(runner: Runner) -> list[list[Rollout]]:
    return rollout(Engine(runner, Tokenizer()), PROMPTS, 3, SAMPLED, max_tokens=40)


def saved(model: Transformer, folder: Path) -> checkpoint.Checkpoint:
    """The network's weights as they are now, in a checkpoint that shares no memory with it."""
    folder.mkdir()
    write_tiny_gguf(folder / "shape.gguf", config=model.config)
    shape = checkpoint.open(folder / "shape.gguf")
    shape.config, shape.tensors = model.config, model.tensors()
    hf_folder.write(shape, folder / "model")
    return checkpoint.open(folder / "model")


def assert_same_bits(a: list[list[Rollout]], b: list[list[Rollout]]) -> None:
    assert [len(group) for group in a] == [len(group) for group in b]
    for x, y in zip(chain(*a), chain(*b), strict=True):
        assert x.tokens.tolist() == y.tokens.tolist()
        assert x.logprobs.view(np.uint32).tolist() == y.logprobs.view(np.uint32).tolist()
        assert x.finish_reason == y.finish_reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_live_weights_give_the_bits_of_a_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path, home: Path) -> None:
    model = network(dtype, **MODELS[name])
    runner = LiveNativeRunner(model.config, model.tensors, BLOCKS, threads=2)
    engine = Engine(runner, Tokenizer())
    before = rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40)
    again = rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40)
    change(model)
    engine.weights_changed()
    after = rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40)
    assert not home.exists()  # nothing was packed

    assert_same_bits(after, sample(NativeRunner(saved(model, tmp_path / "after"), BLOCKS, threads=1)))
    assert_same_bits(before, sample(NativeRunner(saved(network(dtype, **MODELS[name]), tmp_path / "before"), BLOCKS)))
    assert_same_bits(before, again)
    assert [r.tokens.tolist() for r in chain(*before)] != [r.tokens.tolist() for r in chain(*after)]
    # Of 69 tokens, two blocks are found again, until the weights change: then by the group's others alone.
    assert [r.cached_tokens for r in again[0]] == [2 * BLOCK] * 3
    assert [r.cached_tokens for r in after[0]] == [0, 2 * BLOCK, 2 * BLOCK]


def test_tensors_that_move_are_followed(tmp_path: Path) -> None:
    """A change may also put a weight elsewhere, and release the memory where it was."""
    model = network(torch.float32)
    engine = Engine(LiveNativeRunner(model.config, model.tensors, BLOCKS, threads=2), Tokenizer())
    rollout(engine, PROMPTS, 1, SAMPLED, max_tokens=4)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    engine.weights_changed()
    moved = rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40)
    assert_same_bits(moved, sample(NativeRunner(saved(model, tmp_path / "moved"), BLOCKS)))


def live_native(model: Transformer) -> Runner:
    return LiveNativeRunner(model.config, model.tensors, BLOCKS, threads=2)


def live_torch(model: Transformer) -> Runner:
    return LiveTorchRunner(model, BLOCKS)


@pytest.mark.parametrize("start", [live_native, live_torch])
def test_log_probabilities_are_the_networks_own(start: Callable[[Transformer], Runner]) -> None:
    """Against the network's forward pass over prompt and answer, whatever the temperature was."""
    model = network(torch.float32)
    engine = Engine(start(model), Tokenizer())
    for seed in range(2):
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=seed)
        for prompt, group in zip(PROMPTS, rollout(engine, PROMPTS, 3, sampling, max_tokens=40), strict=True):
            for answer in group:
                ids = torch.tensor([prompt + answer.tokens.tolist()])
                with torch.no_grad():
                    scores = model(ids[:, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
                expected = scores.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()
                tolerance = 2e-2 if start is live_native else 1e-4  # its cache has 16-bit numbers
                np.testing.assert_allclose(answer.logprobs, expected, rtol=0, atol=tolerance)
        change(model)
        engine.weights_changed()


def test_torch_over_a_live_network_against_its_checkpoint(tmp_path: Path) -> None:
    model = network(torch.float32)
    engine = Engine(LiveTorchRunner(model, BLOCKS), Tokenizer())
    assert_same_bits(
        rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40), sample(TorchRunner(saved(model, tmp_path / "a"), BLOCKS))
    )
    change(model)
    engine.weights_changed()
    assert_same_bits(
        rollout(engine, PROMPTS, 3, SAMPLED, max_tokens=40), sample(TorchRunner(saved(model, tmp_path / "b"), BLOCKS))
    )


def test_answers_differ_within_a_group_and_between_seeds() -> None:
    engine = Engine(live_native(network(torch.float32)), Tokenizer())
    prompt = PROMPTS[1]
    groups = rollout(engine, [prompt, prompt], 4, SAMPLED, max_tokens=20)
    other = rollout(engine, [prompt], 4, Sampling(temperature=1, top_p=1, seed=8), max_tokens=20)
    answers = [tuple(answer.tokens.tolist()) for answer in chain(*groups, *other)]
    assert len(set(answers)) == 12


def test_stop_tokens_end_an_answer() -> None:
    engine = Engine(live_native(network(torch.float32)), Tokenizer())
    ((whole,),) = rollout(engine, PROMPTS[1:], 1, SAMPLED, max_tokens=20)
    ((cut,),) = rollout(engine, PROMPTS[1:], 1, SAMPLED, max_tokens=20, stop_tokens=[int(whole.tokens[7])])
    end = whole.tokens.tolist().index(whole.tokens[7]) + 1
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.tokens.tolist() == whole.tokens[:end].tolist()
    assert cut.logprobs.tolist() == whole.logprobs[:end].tolist()


def test_weights_that_may_not_change_now_are_refused(tmp_path: Path) -> None:
    model = network(torch.float32)
    engine = Engine(live_native(model), Tokenizer())
    events = engine.run(Request(PROMPTS[1], 4))
    next(events)
    with pytest.raises(EngineError, match="1 requests run with the weights before; finish or cancel them first"):
        engine.weights_changed()
    list(events)
    engine.weights_changed()
    fixed = Engine(NumpyRunner(saved(model, tmp_path / "a"), 8), Tokenizer())
    with pytest.raises(EngineError, match="NumpyRunner runs a checkpoint, whose weights do not change"):
        fixed.weights_changed()


def refused(config: ModelConfig, model: Transformer, **changes: object) -> str:
    tensors = {name: tensor for name, tensor in (model.tensors() | changes).items() if tensor is not None}
    with pytest.raises(EngineError) as caught:
        LiveNativeRunner(config, lambda: tensors, 4)
    return str(caught.value)


def test_tensors_that_are_not_the_networks_are_refused() -> None:
    model = network(torch.float32)
    c, norm = model.config, model.tensors()["norm.weight"]
    assert refused(c, model, **{"norm.weight": None}) == "tensor norm.weight is missing"
    assert refused(c, model, extra=norm) == "tensor extra is not of this network"
    assert refused(c, model, **{"output.weight": norm}) == (
        "tensor output.weight is (64,) in F32; the network needs (320, 64) in F32, F16, BF16"
    )
    half = model.to(torch.float64).tensors  # checkpoints have no such numbers
    with pytest.raises(KeyError):
        half()
