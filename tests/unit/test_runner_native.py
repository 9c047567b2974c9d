"""The native runner against the NumPy runner, and bitwise against itself: long contexts, reused blocks, any threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llama2 import checkpoint, native
from llama2.checkpoint import Checkpoint, quantization
from llama2.config import BIASED, ModelConfig, RopeScaling
from llama2.engine import runner_numpy
from llama2.engine.runner import BLOCK, Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import EngineError
from models import tiny_config, write_tiny_gguf

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Start = Callable[..., Runner]

QUANTISED = [name for name in quantization.FORMATS if name not in ("F32", "F16", "BF16")]

#: The largest and the mean difference of logits with unquantized weights, as parts of the largest logit; with attention
#: in bfloat16 more, as rounding to 8 bits meets more ties.
CLOSE = {False: (2e-4, 1e-5), True: (4e-3, 2e-4)}

YARN = RopeScaling("yarn", factor=8.0, original_context=32, attention_factor=1.2)

#: Every kind of attention and of head, widths that fill no vector, both rules of scaled rotation.
MODELS = {
    "multi-head, tied": ("F32", tiny_config(n_kv_heads=4, tied_embeddings=True)),
    "grouped": ("F32", tiny_config()),
    "multi-query": ("F32", tiny_config(n_kv_heads=1)),
    "twelve to one": ("F32", tiny_config(n_heads=12, n_kv_heads=1, head_dim=8)),
    "heads of 2": ("F32", tiny_config(head_dim=2)),
    "heads of 6": ("F32", tiny_config(n_heads=6, n_kv_heads=3, head_dim=6)),
    "heads of 20": ("F16", tiny_config(head_dim=20)),
    "heads of 80": ("BF16", tiny_config(head_dim=80)),
    "odd widths": ("F32", tiny_config(dim=50, head_dim=10, hidden_dim=77, vocab_size=321)),
    "odd widths, halves": ("F16", tiny_config(dim=51, head_dim=14, hidden_dim=33, vocab_size=299)),
    "linear scaling": ("BF16", tiny_config(rope_scaling=RopeScaling("linear", factor=4.0))),
    "biases": ("F32", tiny_config(biases=BIASED)),
    "biases, odd widths": ("F16", tiny_config(dim=50, head_dim=10, hidden_dim=77, vocab_size=321, biases=BIASED)),
    "biases, quantised": ("Q4_1", tiny_config("Q4_1", biases=(*BIASED[:3], "feed_forward.w2"))),
    "window": ("F32", tiny_config(sliding_window=20)),
    "window of 1": ("F32", tiny_config(sliding_window=1, n_kv_heads=4)),
    "window of a block": ("F16", tiny_config(sliding_window=32, n_kv_heads=1)),
    "window and biases, quantised": ("Q8_0", tiny_config("Q8_0", sliding_window=41, biases=BIASED)),
    "yarn": ("F32", tiny_config(rope_scaling=YARN)),
    "dynamic": ("F32", tiny_config(rope_scaling=RopeScaling("dynamic", factor=4.0, original_context=30))),
    "one layer": ("F32", tiny_config(n_layers=1, rope_theta=1e6, norm_eps=1e-3)),
    **{name: (name, tiny_config(name)) for name in QUANTISED},
    "quantised multi-head, tied": ("Q4_1", tiny_config("Q4_1", n_kv_heads=4, tied_embeddings=True)),
    "multi-query, heads of 40": ("Q8_0", tiny_config("Q8_0", n_kv_heads=1, head_dim=40)),
    "odd vocabulary": ("Q4_K", tiny_config("Q4_K", vocab_size=301)),
}


@pytest.fixture(autouse=True, scope="module")
def packed_weights_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA2_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(params=native.supported())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine."""
    return str(request.param)


@pytest.fixture
def start(isa: str) -> Start:
    """Starts a runner of a model on that instruction set."""
    return partial(NativeRunner, isa=isa)


def tiny(folder: Path, format: str = "F32", config: ModelConfig | None = None) -> Checkpoint:
    write_tiny_gguf(folder / "tiny.gguf", config=config or tiny_config(format), format=format)
    return checkpoint.open(folder / "tiny.gguf")


def tokens(n: int, seed: int = 0, vocabulary: int = 290) -> Ints:
    return np.random.default_rng(seed).integers(3, vocabulary, n, dtype=np.int32)


def batch(*parts: tuple[Ints, int, Sequence[int]]) -> Batch:
    """One step of sequences given as (new tokens, position of the first, cache blocks); all logits are wanted."""
    width = max(len(blocks) for _, _, blocks in parts)
    return Batch(
        tokens=np.concatenate([new for new, _, _ in parts]),
        positions=np.concatenate([np.arange(start, start + len(new), dtype=np.int32) for new, start, _ in parts]),
        sequences=np.repeat(np.arange(len(parts), dtype=np.int32), [len(new) for new, _, _ in parts]),
        blocks=np.array([[*blocks, *[-1] * (width - len(blocks))] for _, _, blocks in parts], np.int32),
        outputs=np.arange(sum(len(new) for new, _, _ in parts), dtype=np.int32),
    )


def conversation(runner: Runner) -> Floats:
    """Two prompts in scattered blocks, prefilled beside each other in two steps, then two decoded tokens of each."""
    a, b, places = tokens(80, seed=1), tokens(50, seed=2), ([9, 3, 12], [1, 15])
    rows = [runner.forward(batch((a[:33], 0, places[0]), (b[:1], 0, places[1])))]
    rows.append(runner.forward(batch((b[1:48], 1, places[1]), (a[33:78], 33, places[0]))))
    for i in (2, 1):
        rows.append(runner.forward(batch((a[-i:][:1], 80 - i, places[0]), (b[-i:][:1], 50 - i, places[1]))))
    return np.concatenate(rows)


def assert_same_bits(a: Floats, b: Floats) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def eight_bits(x: Floats) -> Floats:
    """Each group of 32 in whole multiples of its largest over 127: (n, groups, 32)."""
    step = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    y: Floats = np.rint(x / np.where(step, step, 1)) * step
    return y


class EightBits:
    """A matrix that rounds what it is multiplied with to 8 bits; what is left of the two largest groups, again."""

    __array_ufunc__ = None  # `x @ w.T` is __rmatmul__'s

    def __init__(self, weight: Floats) -> None:
        self.T, self._weight = self, weight

    def __rmatmul__(self, x: Floats) -> Floats:
        groups = x.reshape(len(x), -1, 32)
        rounded = eight_bits(groups)
        order = np.argsort(-np.abs(groups).max(axis=2), axis=1, kind="stable")
        refined = (np.arange(len(x))[:, None], order[:, :2])
        rounded[refined] += eight_bits(groups[refined] - rounded[refined])
        y: Floats = rounded.reshape(x.shape) @ self._weight.T
        return y


def bfloat16(x: Floats) -> Floats:
    """The nearest numbers of 8 bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    y: Floats = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
    return y


def attend_in_bfloat16(q: Floats, k: Floats, v: Floats, positions: Ints, window: int | None = None) -> Floats:
    """runner_numpy.attend with both factors of every product in bfloat16; sums are exact enough."""
    (n, heads, size), groups = q.shape, k.shape[1]
    q = bfloat16(q / np.float32(np.sqrt(size))).reshape(n, groups, -1, size)
    scores = np.einsum("nkge,tke->kgnt", q, bfloat16(k))
    distance = positions[:, None] - np.arange(len(k))
    scores[..., (distance < 0) | (distance >= (window or len(k)))] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    sums = np.einsum("kgnt,tke->nkge", bfloat16(weights), bfloat16(v))
    y: Floats = (sums / weights.sum(axis=-1).transpose(2, 0, 1)[..., None]).reshape(n, heads, size)
    return y


class InBfloat16(NumpyRunner):
    """The NumPy runner with attention in bfloat16."""

    def forward(self, batch: Batch) -> Floats:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner_numpy, "attend", attend_in_bfloat16)
            return super().forward(batch)


def oracle(model: Checkpoint, isa: str, n_blocks: int = 16) -> NumpyRunner:
    """The NumPy runner with what the native one rounds: keys and values to halves or, where the instruction set has
    products of such pairs, all factors of attention to bfloat16; activations to 8 bits."""
    runner = (InBfloat16 if isa == "avx512_bf16" else NumpyRunner)(model, n_blocks)
    if isa != "avx512_bf16":
        runner.keys, runner.values = runner.keys.astype("<f2"), runner.values.astype("<f2")
    if model.tensors["layers.0.attention.wq.weight"].format in QUANTISED:
        runner.head = EightBits(runner.head)  # type: ignore[assignment]
        for name, weight in runner.weights.items():
            if weight.ndim == 2 and name != "tok_embeddings":
                runner.weights[name] = EightBits(weight)  # type: ignore[assignment]
    return runner


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Checkpoint, Floats]]:
    """One of MODELS and the logits of its conversation, made once for the instruction sets that round alike."""

    @cache
    def made(name: str, isa: str) -> tuple[Checkpoint, Floats]:
        model = tiny(tmp_path_factory.mktemp("model"), *MODELS[name])
        return model, conversation(oracle(model, isa))

    def make(name: str, isa: str) -> tuple[Checkpoint, Floats]:
        return made(name, isa if isa == "avx512_bf16" else "")

    return make


@pytest.mark.parametrize("format", ["F16", *QUANTISED])
def test_embeddings_read_from_the_output_head_are_the_files(start: Start, tmp_path: Path, format: str) -> None:
    tied = tiny(tmp_path, format, tiny_config(format, tied_embeddings=True))
    head = replace(tied.tensors["tok_embeddings.weight"], name="output.weight")
    apart = replace(
        tied, config=replace(tied.config, tied_embeddings=False), tensors={**tied.tensors, "output.weight": head}
    )
    assert_same_bits(conversation(start(tied, 16, threads=1)), conversation(start(apart, 16, threads=1)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_against_numpy(
    start: Start, isa: str, name: str, reference: Callable[[str, str], tuple[Checkpoint, Floats]]
) -> None:
    """Equal but for the order of additions, and for what that pushes over a tie when it is rounded."""
    model, expected = reference(name, isa)
    logits = conversation(start(model, 16, threads=2))
    error = np.abs(logits - expected) / np.abs(expected).max()
    quantised = MODELS[name][0] in QUANTISED
    most, mean = (0.03, 2.5e-3) if quantised else CLOSE[isa == "avx512_bf16"]
    assert error.max() <= most
    assert error.mean() <= mean


@pytest.fixture
def several_threads() -> tuple[int, ...]:
    return (2, 3)


@pytest.mark.parametrize("window", [None, 40, 600])
def test_long_contexts(
    start: Start, isa: str, several_threads: tuple[int, ...], window: int | None, tmp_path: Path
) -> None:
    """Positions on both sides of the chunks of 512: decoded one at a time, where chunks are computed apart and merged,
    alone or beside others, they get the bits that a prefill of the whole gave them; and these are NumPy's, nearly."""
    sizes = {"context_length": 1120, "n_layers": 1, "n_kv_heads": 1, "hidden_dim": 32}
    model = tiny(tmp_path, config=tiny_config(**sizes, sliding_window=window))
    text = tokens(1100)
    blocks = np.random.default_rng(1).permutation(40)[:35].tolist()
    prefill = start(model, 40, threads=1).forward(batch((text, 0, blocks)))
    expected = oracle(model, isa, 40).forward(batch((text, 0, blocks)))
    most, _ = CLOSE[isa == "avx512_bf16"]
    np.testing.assert_allclose(prefill, expected, rtol=0, atol=most * np.abs(expected).max())
    for threads in several_threads:
        runner = start(model, 40, threads=threads)
        assert_same_bits(runner.forward(batch((text, 0, blocks))), prefill)
        for position in (0, 31, 32, 511, 512, 513, 543, 1023, 1024, 1099):
            logits = runner.forward(batch((text[position : position + 1], position, blocks)))
            assert_same_bits(logits[0], prefill[position])
        several = [(500, 530), (1020, 1030), (3, 4), (1099, 1100)]  # all over the same blocks, as after a shared prefix
        logits = runner.forward(batch(*[(text[start:end], start, blocks) for start, end in several]))
        assert_same_bits(logits, np.concatenate([prefill[start:end] for start, end in several]))


def poisoned(model: Checkpoint, token: int) -> Checkpoint:
    """The same model with an embedding of `token` that is not a number."""
    table = model.tensors["tok_embeddings.weight"]
    values = table.dequantize().copy()
    values[token] = np.nan
    return replace(model, tensors={**model.tensors, table.name: replace(table, source=values.view(np.uint8).ravel())})


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_freed_block_leaks_nothing(
    start: Start, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence gone wrong leaves NaN in its blocks; the next one to get them never reads what it did not write."""
    monkeypatch.setattr(Checkpoint, "check_finite", lambda self: None)
    model = poisoned(tiny(tmp_path, config=tiny_config(n_kv_heads=kv_heads)), token=2)
    runner, fresh = (start(model, 8, threads=2) for _ in range(2))
    dirty = np.full(4 * BLOCK, 2, np.int32)
    text = tokens(100)
    for length in (1, 31, 33, 100):
        assert np.isnan(runner.forward(batch((dirty, 0, [3, 5, 1, 7])))).all()
        for part in (slice(0, 1), slice(1, length), slice(length, length + 1)):  # prefill, more of it, decode
            if len(text[part]):
                expected = fresh.forward(batch((text[part], part.start, [6, 2, 4, 0])))
                assert np.isfinite(expected).all()
                assert_same_bits(runner.forward(batch((text[part], part.start, [3, 5, 1, 7]))), expected)
    # Beside one that goes wrong in the same step, too.
    mixed = runner.forward(batch((dirty[:40], 0, [2, 4]), (text[:40], 0, [0, 6]), (dirty[:1], 0, [1])))
    assert_same_bits(mixed[40:80], fresh.forward(batch((text[:40], 0, [0, 1]))))
    assert np.isnan(mixed[[0, 39, 80]]).all()


def test_any_number_of_threads_beside_a_busy_program(tmp_path: Path) -> None:
    """More threads than cores, of which another program holds some: every step ends, with the same bits."""
    model = tiny(tmp_path, "Q4_1", tiny_config("Q4_1", hidden_dim=512, n_layers=3))
    expected = conversation(NativeRunner(model, 16, threads=1))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            for threads in (2, 3, 8):
                runner = NativeRunner(model, 16, threads=threads)
                for _ in range(20):
                    assert_same_bits(conversation(runner), expected)
        finally:
            busy.kill()


def test_a_step_without_outputs_or_tokens(start: Start, tmp_path: Path) -> None:
    runner = start(tiny(tmp_path), 4, threads=2)
    text, nothing = tokens(5), np.zeros(0, np.int32)
    expected = runner.forward(batch((text, 0, [1])))
    full = batch((text[:4], 0, [2]))
    assert runner.forward(replace(full, outputs=nothing)).shape == (0, 320)
    assert runner.forward(Batch(nothing, nothing, nothing, full.blocks, nothing)).shape == (0, 320)
    assert_same_bits(runner.forward(batch((text[4:], 4, [2]))), expected[4:])
    reverse = runner.forward(replace(batch((text, 0, [1])), outputs=np.array([4, 0, 4], np.int32)))
    assert_same_bits(reverse, expected[[4, 0, 4]])


def step_with(field: str, at: int, value: int) -> Batch:
    """A step of positions 62 and 63 of one sequence and position 0 of another, with one number changed."""
    good = batch((tokens(2), 62, [1, 2]), (tokens(1), 0, [3, 4]))
    changed = getattr(good, field).copy()
    changed.flat[at] = value
    return replace(good, **{field: changed})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_with("tokens", 0, -1), "token id out of range"),
        (step_with("tokens", 2, 320), "token id out of range"),
        (step_with("positions", 2, -1), "position out of range"),
        (batch((tokens(1), 256, [1] * 9)), "position out of range"),  # the context's length
        (step_with("positions", 2, 64), "position out of range"),  # of a third block
        (step_with("positions", 1, 62), "consecutive positions"),
        (step_with("positions", 0, 61), "consecutive positions"),
        (step_with("sequences", 0, -1), "sequence out of range"),
        (step_with("sequences", 2, 2), "sequence out of range"),
        (step_with("sequences", 0, 1), "at consecutive positions"),
        (step_with("blocks", 0, -1), "cache block out of range"),
        (step_with("blocks", 1, 8), "cache block out of range"),
        (step_with("blocks", 2, -1), "cache block out of range"),
        (step_with("outputs", 0, -1), "output out of range"),
        (step_with("outputs", 2, 3), "output out of range"),
        (replace(batch((tokens(2), 0, [0])), positions=np.zeros(1, np.int32)), "arrays differ in length"),
        (replace(batch((tokens(2), 0, [0])), sequences=np.zeros(3, np.int32)), "arrays differ in length"),
    ],
)
def test_a_step_out_of_range_is_refused(step: Batch, message: str, tmp_path: Path) -> None:
    runner = NativeRunner(tiny(tmp_path), 8, threads=1)
    runner.forward(step_with("tokens", 0, 5))
    with pytest.raises(ValueError, match=message):
        runner.forward(step)


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    for name in ("tok_embeddings.weight", "output.weight", "norm.weight", "layers.1.attention.wk.weight"):
        rest = {n: t for n, t in model.tensors.items() if n != name}
        with pytest.raises(ValueError, match="is missing or has a wrong shape"):
            NativeRunner(replace(model, tensors=rest), 1)
    wide = model.tensors["layers.0.feed_forward.w1.weight"]
    transposed = {**model.tensors, wide.name: replace(wide, shape=wide.shape[::-1])}
    with pytest.raises(ValueError, match="w1 is missing or has a wrong shape"):
        NativeRunner(replace(model, tensors=transposed), 1)
    for name in ("layers.2.ffn_norm.weight", "layers.0.attention.wx.weight", "rope.freqs", "layers.x"):
        more = {**model.tensors, name: replace(model.tensors["norm.weight"], name=name)}
        with pytest.raises(ValueError, match="tensor"):
            NativeRunner(replace(model, tensors=more), 1)


@pytest.mark.parametrize("blocks", [1 << 40, 1 << 60])
def test_a_cache_larger_than_memory_is_refused(blocks: int, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"key/value cache of .* does not fit into memory; choose a shorter context"):
        NativeRunner(tiny(tmp_path), blocks, threads=1)
