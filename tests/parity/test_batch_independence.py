"""Same bytes, whatever the load: a request's logits and samples do not depend on batch, chunks or threads (bitwise).

The promise is the native runner's, of one build on one instruction set (docs/architecture.md, decision 1).
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fakes import plain
from llama2 import checkpoint, native
from llama2.checkpoint import Checkpoint
from llama2.config import BIASED
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner import BLOCK, Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_torch import TorchRunner
from models import tiny_config, write_tiny_gguf

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

BLOCKS = 64
#: Grouped-query and multi-head attention, tied and untied heads, every kind of weights that has a kernel of its own.
TINY = {
    **{name: tiny_config(name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")},
    **{name: tiny_config(name, n_layers=1, hidden_dim=256) for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
    "Q4_1 multi-head tied": tiny_config("Q4_1", n_kv_heads=4, tied_embeddings=True),
    "Q4_1 biases, window": tiny_config("Q4_1", biases=BIASED, sliding_window=37),
}


@pytest.fixture(scope="module", params=[*TINY, "default"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of each kind."""
    name: str = request.param
    if name == "default":
        return checkpoint.open(request.getfixturevalue("model_path"))
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path, config=TINY[name], format=name.split(maxsplit=1)[0], tokenizer="bpe")
    return checkpoint.open(path)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> NativeRunner:
    """A small quantised model, whose cache keeps what earlier examples left there."""
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path, config=TINY["Q4_1"], format="Q4_1")
    return NativeRunner(checkpoint.open(path), BLOCKS, threads=2)


@pytest.fixture(scope="module")
def torch_runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path)
    return TorchRunner(checkpoint.open(path), BLOCKS)


def prompt(vocabulary: int, length: int, seed: int) -> Ints:
    return np.random.default_rng(seed).integers(3, vocabulary, length, dtype=np.int32)


def tables(lengths: Sequence[int], seed: int = 0) -> list[Ints]:
    """Cache blocks for sequences of `lengths`, scattered over the whole cache."""
    free = np.random.default_rng(seed).permutation(BLOCKS).astype(np.int32)
    needs = [-(-length // BLOCK) for length in lengths]
    return [np.array(part) for part in np.split(free[: sum(needs)], np.cumsum(needs)[:-1])]


def step(runner: Runner, parts: Sequence[tuple[Ints, int, Ints]]) -> list[Floats]:
    """One forward pass over several sequences' (tokens, first position, cache blocks): logits after every token."""
    width = max(len(table) for _, _, table in parts)
    lengths = [len(tokens) for tokens, _, _ in parts]
    batch = Batch(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]),
        positions=np.concatenate([np.arange(start, start + len(t), dtype=np.int32) for t, start, _ in parts]),
        sequences=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        blocks=np.stack([np.pad(table, (0, width - len(table)), constant_values=-1) for _, _, table in parts]),
        outputs=np.arange(sum(lengths), dtype=np.int32),
    )
    return np.split(runner.forward(batch), np.cumsum(lengths)[:-1])


def run(runner: Runner, prompts: Sequence[Ints], chunks: Sequence[Iterator[int]], seed: int = 0) -> list[Floats]:
    """Logits after every token of every prompt; `chunks` says how many tokens of each run in the next step."""
    places = tables([len(tokens) for tokens in prompts], seed)
    done = [0] * len(prompts)
    rows: list[list[Floats]] = [[] for _ in prompts]
    while going := [s for s, tokens in enumerate(prompts) if done[s] < len(tokens)]:
        ends = [done[s] + next(chunks[s]) for s in going]
        parts = [(prompts[s][done[s] : end], done[s], places[s]) for s, end in zip(going, ends, strict=True)]
        for s, end, logits in zip(going, ends, step(runner, parts), strict=True):
            rows[s].append(logits)
            done[s] = end
    return [np.concatenate(parts) for parts in rows]


def assert_same_bytes(logits: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(logits.view(np.uint32), expected.view(np.uint32))


def test_logits_alone_in_company_and_in_chunks(model: Checkpoint) -> None:
    vocabulary = model.config.vocab_size
    mine, *others = (prompt(vocabulary, length, seed=length) for length in (80, 33, 1, 64))
    [expected] = run(NativeRunner(model, BLOCKS, threads=1), [mine], [repeat(len(mine))])
    assert np.isfinite(expected).all()
    for threads in (1, 2):
        runner = NativeRunner(model, BLOCKS, threads=threads)
        for size in (1, 7, 64):
            [alone] = run(runner, [mine], [repeat(size)], seed=size)
            assert_same_bytes(alone, expected)
            company = run(runner, [*others, mine], [*repeat(repeat(20), len(others)), repeat(size)])
            assert_same_bytes(company[-1], expected)


def test_logits_whatever_threads_divide(model: Checkpoint) -> None:
    """Threads divide the rows of products in small steps, and the tokens in large ones."""
    mine = prompt(model.config.vocab_size, 200, seed=2)
    lengths = (15, 16, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 129, 200)
    if model.config.n_layers > 2:  # the default model
        lengths = (16, 33, 96, 129)
    [expected] = run(NativeRunner(model, BLOCKS, threads=1), [mine], [repeat(7)])
    for threads in (1, 2, 3):
        runner = NativeRunner(model, BLOCKS, threads=threads)
        for length in lengths:
            [logits] = run(runner, [mine[:length]], [repeat(length)])
            assert_same_bytes(logits, expected[:length])


@settings(max_examples=30, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 70), min_size=1)), min_size=1, max_size=5))
def test_logits_under_any_schedule(runner: NativeRunner, plan: list[tuple[int, list[int]]]) -> None:
    """`plan`: the length of each prompt, and the sizes of its chunks."""
    prompts = [prompt(runner.config.vocab_size, length, seed=length) for length, _ in plan]
    together = run(runner, prompts, [cycle(sizes) for _, sizes in plan])
    for tokens, logits in zip(prompts, together, strict=True):
        assert_same_bytes(logits, *run(runner, [tokens], [repeat(len(tokens))]))


@settings(max_examples=20, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 70), min_size=1)), min_size=1, max_size=5))
def test_torch_under_any_schedule(torch_runner: TorchRunner, plan: list[tuple[int, list[int]]]) -> None:
    """Not the same bits, but nothing of what another sequence says, or of what stood in the cache before."""
    prompts = [prompt(torch_runner.config.vocab_size, length, seed=length) for length, _ in plan]
    together = run(torch_runner, prompts, [cycle(sizes) for _, sizes in plan])
    for tokens, logits in zip(prompts, together, strict=True):
        [alone] = run(torch_runner, [tokens], [repeat(len(tokens))])
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-5)


def test_rejected_tokens_leave_no_trace(model: Checkpoint) -> None:
    """Steps of one true token and wrong ones behind it, which the next steps write over."""
    vocabulary, runner = model.config.vocab_size, NativeRunner(model, BLOCKS, threads=2)
    mine, [place] = prompt(vocabulary, 80, seed=1), tables([96])
    [expected] = run(runner, [mine], [repeat(len(mine))])
    rows = [step(runner, [(mine[:25], 0, place)])[0]]
    for at in range(25, 80):
        wrong = prompt(vocabulary, at % 13, seed=at)
        [logits] = step(runner, [(np.concatenate([mine[at : at + 1], wrong]), at, place)])
        rows.append(logits[:1])
    assert_same_bytes(np.concatenate(rows), expected)


def answer(engine: Engine, mine: Request, others: Sequence[Request]) -> list[Event]:
    """Events of `mine`, which joins when the first half of `others` is on its way; the second half joins later."""
    half = len(others) // 2
    for other in others[:half]:
        engine.add(other)
    for _ in others[:half]:
        engine.step()
    id = engine.add(mine)
    waiting, events = list(others[half:]), list[Event]()
    while not (events and events[-1].finish):
        if waiting:
            engine.add(waiting.pop())
        events += [event for event in engine.step() if event.request == id]
    return plain(events)


def test_samples_and_logprobs_through_the_engine(model: Checkpoint) -> None:
    vocabulary = model.config.vocab_size
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=11)
    mine = Request(tuple(prompt(vocabulary, 70, seed=0).tolist()), max_tokens=16, sampling=sampling, logprobs=3)
    others = [
        Request(tuple(prompt(vocabulary, n, seed=n).tolist()), max_tokens=n, sampling=Sampling(seed=n))
        for n in (5, 33, 20, 3)
    ]
    expected = answer(Engine(NativeRunner(model, BLOCKS, threads=1), model.tokenizer), mine, [])
    assert len(expected) == 16 or expected[-1].finish == "stop"
    for threads in (1, 2):
        runner = NativeRunner(model, BLOCKS, threads=threads)
        for budget in (1, 7, 64):
            engine = Engine(runner, model.tokenizer, max_batch_tokens=budget, max_sequences=min(budget, 8))
            assert answer(engine, mine, []) == expected
            assert answer(engine, mine, others) == expected


@pytest.mark.parametrize("isa", [isa for isa in native.supported() if isa != native.module().isa])
def test_other_instruction_sets(isa: str) -> None:
    """The tests above on some tiny models, under each further instruction set of this machine; plain code is slow."""
    others = " and ".join(
        f"not {name}" for name in ("default", "instruction", "torch", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "Q5_1")
    )
    tests = [sys.executable, "-m", "pytest", "-q", __file__, "-k", others]
    result = subprocess.run(tests, env={**os.environ, "LLAMA2_ISA": isa}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
