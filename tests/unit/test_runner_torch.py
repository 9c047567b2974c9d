"""The torch runner against the NumPy runner, alone and shared by two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_runner_native import batch, conversation, poisoned, tiny, tokens

import llama2
from llama2 import checkpoint
from llama2.config import RopeScaling
from llama2.engine.runner import BLOCK, Batch
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.runner_torch import TorchRunner
from llama2.errors import EngineError
from llama2.model import parallel
from llama2.model.transformer import Transformer
from models import tiny_config, write_tiny_gguf

MODELS = {
    "multi-head, tied": ("F32", tiny_config(n_kv_heads=4, tied_embeddings=True)),
    "grouped": ("F32", tiny_config()),
    "twelve to one": ("F32", tiny_config(n_heads=12, n_kv_heads=1, head_dim=8)),
    "odd widths": ("F16", tiny_config(dim=51, n_heads=6, n_kv_heads=3, head_dim=14, hidden_dim=33, vocab_size=299)),
    "linear scaling": ("BF16", tiny_config(rope_scaling=RopeScaling("linear", factor=4.0))),
    "quantised": ("Q4_K", tiny_config("Q4_K", vocab_size=301)),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_against_numpy(name: str, tmp_path: Path) -> None:
    """In float32 equal but for the order of additions; in bfloat16, of 8 binary digits, within some of its steps."""
    model = tiny(tmp_path, *MODELS[name])
    expected = conversation(NumpyRunner(model, 16))
    for dtype, largest, mean in ((torch.float32, 2e-5, 2e-6), (torch.bfloat16, 0.15, 0.015)):
        logits = conversation(TorchRunner(model, 16, dtype=dtype))
        assert (logits.dtype, logits.shape) == (np.float32, expected.shape)
        error = np.abs(logits - expected) / np.abs(expected).max()
        assert error.max() <= largest
        assert error.mean() <= mean


def test_a_long_context(tmp_path: Path) -> None:
    """Prefill in chunks, then decode, with several sequences that read the same blocks as after a shared prefix."""
    model = tiny(tmp_path, config=tiny_config(context_length=1120, n_layers=1, n_kv_heads=1, hidden_dim=32))
    text, blocks = tokens(1100), np.random.default_rng(1).permutation(40)[:35].tolist()
    expected = NumpyRunner(model, 40).forward(batch((text, 0, blocks)))
    runner = TorchRunner(model, 40)
    for start in range(0, 1100, 300):
        logits = runner.forward(batch((text[start : start + 300], start, blocks)))
        np.testing.assert_allclose(logits, expected[start : start + 300], rtol=0, atol=2e-5)
    several = [(500, 530), (1020, 1050), (3, 4), (1099, 1100)]
    logits = runner.forward(batch(*[(text[start:end], start, blocks) for start, end in several]))
    np.testing.assert_allclose(
        logits, np.concatenate([expected[start:end] for start, end in several]), rtol=0, atol=2e-5
    )


def test_a_freed_block_leaks_nothing(tmp_path: Path) -> None:
    """NaN of a sequence gone wrong, in the blocks before and beside in the same step, is never read by another."""
    model = poisoned(tiny(tmp_path), token=2)
    runner, fresh = TorchRunner(model, 8), TorchRunner(model, 8)
    for cache in (*runner.keys, *runner.values, *fresh.keys, *fresh.values):
        cache.fill_(torch.nan)
    dirty, text = np.full(4 * BLOCK, 2, np.int32), tokens(100)
    for length in (1, 31, 33, 98):
        assert np.isnan(runner.forward(batch((dirty, 0, [3, 5, 1, 7])))).all()
        for part in (slice(0, 1), slice(1, length + 1), slice(length + 1, length + 2)):
            expected = fresh.forward(batch((text[part], part.start, [6, 2, 4, 0])))
            assert np.isfinite(expected).all()
            logits = runner.forward(batch((text[part], part.start, [3, 5, 1, 7])))
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    mixed = runner.forward(
        batch((dirty[:40], 0, [2, 4]), (text[:40], 0, [0, 6]), (dirty[:1], 0, [1]), (text[:1], 0, [3]))
    )
    np.testing.assert_allclose(mixed[40:80], fresh.forward(batch((text[:40], 0, [0, 1]))), rtol=0, atol=1e-5)
    expected_first = mixed[40]
    np.testing.assert_allclose(mixed[81], expected_first, rtol=0, atol=1e-5)
    assert np.isnan(mixed[[0, 39, 80]]).all()
    # A shorter sequence beside a longer one does not read on to where that one is, here into what the dirty one left.
    mixed = runner.forward(batch((text[40:41], 40, [0, 6]), (text[:1], 0, [2])))
    np.testing.assert_allclose(mixed[0], fresh.forward(batch((text[40:41], 40, [0, 1])))[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mixed[1], expected_first, rtol=0, atol=1e-5)


def test_a_step_without_outputs_or_tokens(tmp_path: Path) -> None:
    runner, nothing = TorchRunner(tiny(tmp_path), 4), np.zeros(0, np.int32)
    expected = runner.forward(batch((tokens(5), 0, [1])))
    full = batch((tokens(5), 0, [2]))
    assert runner.forward(replace(full, outputs=nothing)).shape == (0, 320)
    assert runner.forward(Batch(nothing, nothing, nothing, full.blocks, nothing)).shape == (0, 320)
    reverse = runner.forward(replace(full, outputs=np.array([4, 0, 4], np.int32)))
    np.testing.assert_allclose(reverse, expected[[4, 0, 4]], rtol=0, atol=1e-5)


def test_decode_is_compiled_as_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any number of sequences and tokens, without a break; another number of either compiles nothing anew."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **_: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    model = tiny(tmp_path)
    plain, compiled = TorchRunner(model, 16), TorchRunner(model, 16, compile=True)
    np.testing.assert_allclose(conversation(compiled), conversation(plain), rtol=0, atol=1e-5)
    steps = [[(tokens(count, seed=s), 0, [s]) for s in range(4)] for count in (3, 4, 5)]
    steps += [[(tokens(1, seed=s), 5, [s]) for s in range(n)] for n in (2, 3, 4)]
    steps += [[(tokens(s + 1), 0, [s]) for s in range(n)] for n in (2, 3, 4)]  # these run as they are
    for step in steps:
        np.testing.assert_allclose(compiled.forward(batch(*step)), plain.forward(batch(*step)), rtol=0, atol=1e-5)
    assert len(graphs) == 3  # one for a single sequence, as it is another case to torch.compile than several


@pytest.mark.parametrize("blocks", [1 << 40, 1 << 60])
def test_a_cache_larger_than_memory_is_refused(blocks: int, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"key/value cache of .* does not fit into memory; choose a shorter context"):
        TorchRunner(tiny(tmp_path), blocks)


def test_weights_larger_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Transformer:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Transformer, "load", load)
    with pytest.raises(EngineError, match=r"the weights do not fit into the memory of cpu; share them .* by torchrun"):
        TorchRunner(tiny(tmp_path), 1)


def test_shares_are_a_smaller_network_of_every_size(tmp_path: Path) -> None:
    """Of 4 heads over 2 of keys and 128 hidden units, a half has 2, 1 and 64; what is not shared is there whole."""
    model = tiny(tmp_path)
    shapes = {name: tuple(w.shape) for name, w in parallel.load(model, 1, 2, dtype=torch.float32).state_dict().items()}
    assert shapes == replace(model.config, n_heads=2, n_kv_heads=1, hidden_dim=64).tensor_shapes()
    for size, reason in ((3, "n_kv_heads=2 cannot be divided by 3"), (4, "n_kv_heads=2 cannot be divided by 4")):
        with pytest.raises(EngineError, match=reason):
            parallel.load(model, 0, size, dtype=torch.float32)
    with pytest.raises(EngineError, match="hidden_dim=77 cannot be divided by 2 processes; start a divisor of it"):
        parallel.load(tiny(tmp_path, config=tiny_config(hidden_dim=77)), 0, 2, dtype=torch.float32)


#: Opens a model in two processes; the first one runs a conversation and says what its logits were.
SHARED = """
import sys
import numpy as np
sys.path[:0] = sys.argv[3:]
import forked
from llama2 import checkpoint
from llama2.engine import runner_torch
from test_runner_native import conversation
def converse():
    runner = runner_torch.start(checkpoint.open(sys.argv[1]), 16)
    np.save(sys.argv[2], conversation(runner))
    print("only the first process comes here", flush=True)
forked.start(2, converse)
"""


def python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(tied_embeddings=True))
    (tmp_path / "shared.py").write_text(SHARED)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    told = python(*(str(tmp_path / name) for name in ("shared.py", "tiny.gguf", "logits.npy")), *paths)
    assert told == "only the first process comes here\n"
    expected = conversation(TorchRunner(checkpoint.open(tmp_path / "tiny.gguf"), 16))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)


def test_a_command_on_two_processes_answers_once(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    words = ("generate", "-m", str(tmp_path / "tiny.gguf"), "to be", "--temperature", "0", "--max-tokens", "20")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    told = python(*torchrun, "-m", "llama2", *words, "--runner", "torch", "--json")
    with llama2.load(tmp_path / "tiny.gguf", runner="numpy") as model:
        answer = model.generate("to be", temperature=0, max_tokens=20)
    assert json.loads(told)["token_ids"] == answer.token_ids
