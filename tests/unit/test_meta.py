"""Meta's folders: what torch.save wrote is read, and what is written torch.load opens, cut into any number of files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2 import checkpoint
from llama2.checkpoint import meta
from llama2.config import SIZES, RopeScaling
from llama2.engine.runner import Batch
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import CheckpointError
from meta_bytes import CONFIG, PARAMS, Tensors, cut, random_tensors, tokenizer_model, write_folder
from models import write_tiny_gguf


def assert_holds(model: checkpoint.Checkpoint, tensors: Tensors) -> None:
    """That a checkpoint has these tensors, bit by bit."""
    assert list(model.tensors) == list(tensors)
    for name, expected in tensors.items():
        tensor = model.tensors[name]
        assert (tensor.name, tensor.shape) == (name, tuple(expected.shape))
        assert np.array_equal(tensor.data, expected.view(torch.uint8).numpy().ravel())


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "format"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_what_torch_saved(shards: int, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=dtype)
    model = checkpoint.open(write_folder(tmp_path / "llama-2-tiny", tensors, shards))
    assert model.config == CONFIG
    assert_holds(model, tensors)
    assert {tensor.format for tensor in model.tensors.values()} == {format}
    assert (model.format, model.name, model.path) == ("meta", "llama-2-tiny", tmp_path / "llama-2-tiny")
    assert model.metadata == PARAMS
    assert model.template is model.licence is None
    model.check_finite()


def test_tensors_are_joined_when_they_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.open(write_folder(tmp_path / "whole", random_tensors(), 1))
    assert all(isinstance(tensor.source, np.ndarray) for tensor in whole.tensors.values())
    joined: list[int] = []
    concatenate = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts, **options: joined.append(1) or concatenate(parts, **options))
    model = checkpoint.open(write_folder(tmp_path / "cut", random_tensors(), 2))
    assert sum(tensor.nbytes for tensor in model.tensors.values()) == 2 * CONFIG.parameters()
    assert not joined
    first = model.tensors["output.weight"].data
    assert len(joined) == 1
    assert first is not model.tensors["output.weight"].data  # nobody else may hold on to it


@pytest.mark.parametrize("place", [".", ".."])
def test_the_tokenizer_lies_in_the_folder_or_above(place: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", random_tensors(), 1)
    (folder / "tokenizer.model").rename(folder / place / "tokenizer.model")
    tokenizer = checkpoint.open(folder).tokenizer
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == ("sentencepiece", 704, 1, 2)
    assert tokenizer.decode(tokenizer.encode("don't, naïve — 12345")) == "don't, naïve — 12345"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 704}, {}),
        ({"vocab_size": None}, {}),
        ({"norm_eps": None}, {}),
        ({"n_kv_heads": 8, "max_batch_size": 32}, {}),
        ({"multiple_of": 96, "ffn_dim_multiplier": None, "dim": 64}, {"hidden_dim": 192}),
        ({"multiple_of": None, "ffn_dim_multiplier": None}, {"hidden_dim": 256}),
        ({"ffn_dim_multiplier": 1.3}, {"hidden_dim": 224}),  # int(1.3 * 170) = 221
        ({"norm_eps": 1e-6}, {"norm_eps": 1e-6, "context_length": 2048}),
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "context_length": 16384}),
        ({"rope_theta": 1000000}, {"rope_theta": 1e6, "context_length": 16384}),
        ({"max_seq_len": 512}, {"context_length": 512}),
        ({"n_kv_heads": None}, {"n_kv_heads": 16}),
    ],
)
def test_params(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, **expected)
    model = checkpoint.open(write_folder(tmp_path / "model", random_tensors(config), 2, **changes))
    assert model.config == config


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "hidden"),
    [  # spec 1.1
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (6656, 256, None, 17920),
        (8192, 256, None, 22016),
        (8192, 256, 1.0, 22016),
        (8192, 4096, 1.3, 28672),
    ],
)
def test_width_of_the_published_sizes(dim: int, multiple_of: int, multiplier: float | None, hidden: int) -> None:
    assert meta.hidden_dim(dim, multiple_of, multiplier) == hidden
    expected = {"multiple_of": multiple_of} | ({"ffn_dim_multiplier": 1.3} if multiplier == 1.3 else {})
    assert meta.multiples(dim, hidden) == expected


@given(dim=st.integers(1, 1 << 20), hidden=st.integers(1, 1 << 22))
def test_any_width_can_be_expressed(dim: int, hidden: int) -> None:
    params = meta.multiples(dim, hidden)
    assert meta.hidden_dim(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == hidden


def test_ring_of_files(tmp_path: Path) -> None:
    """8 → 1 → 2 → 8 files return the same bits, and torch finds in each file what the table says."""
    tensors = random_tensors()
    model = checkpoint.open(write_folder(tmp_path / "given", tensors, 8))
    for step, shards in enumerate((1, 2, 8)):
        folder = tmp_path / f"step {step}"
        meta.write(model, folder, shards=shards)
        names = sorted(path.name for path in folder.iterdir())
        assert names == [*(f"consolidated.{i:02}.pth" for i in range(shards)), "params.json", "tokenizer.model"]
        for i, expected in enumerate(cut(tensors, shards)):
            found = torch.load(folder / f"consolidated.{i:02}.pth", weights_only=True)
            assert list(found) == list(expected)
            assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
        model = checkpoint.open(folder)
        assert_holds(model, tensors)
        assert model.config == CONFIG
        assert (folder / "tokenizer.model").read_bytes() == tokenizer_model()
    assert json.loads((folder / "params.json").read_text()) == {
        "dim": 64, "multiple_of": 32, "ffn_dim_multiplier": 0.57, "n_heads": 16, "n_kv_heads": 8, "n_layers": 2,
        "norm_eps": 1e-5, "vocab_size": 704,
    }  # fmt: skip


def test_params_of_gguf(tmp_path: Path) -> None:
    """Its float32 epsilon becomes 1e-5 again; quantized weights become float32, and a tied head a tensor."""
    config = replace(CONFIG, vocab_size=320, hidden_dim=64, tied_embeddings=True, rope_theta=500000.0)
    weights = write_tiny_gguf(tmp_path / "a.gguf", config=config, format="Q8_0")
    meta.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a", shards=2)
    params = json.loads((tmp_path / "a" / "params.json").read_text())
    assert (params["norm_eps"], params["rope_theta"]) == (1e-5, 500000.0)
    model = checkpoint.open(tmp_path / "a")
    assert model.config == replace(config, tied_embeddings=False, context_length=8192)  # as Llama 3 with its base
    for name, tensor in model.tensors.items():
        assert tensor.format == "F32"
        source = "tok_embeddings.weight" if name == "output.weight" else name
        assert np.array_equal(tensor.dequantize(), weights[source])
    text = "the best of it"
    assert model.tokenizer.encode(text) == checkpoint.open(tmp_path / "a.gguf").tokenizer.encode(text)


@pytest.mark.parametrize(
    ("params", "factor", "context"),
    [({}, None, 8192), ({"use_scaled_rope": False}, None, 8192), ({"use_scaled_rope": True}, 32, 131072)],
)
def test_params_of_llama_3(params: dict[str, Any], factor: float | None, context: int, tmp_path: Path) -> None:
    """Frequencies are those of transformers, by the config.json that Meta published beside such a params.json."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = write_folder(tmp_path / "model", random_tensors(), 1)
    given = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**given, "rope_theta": 500000.0, **params}))
    config = checkpoint.open(folder).config
    assert config.context_length == context
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 500000.0, "original_max_position_embeddings": 8192} | (scaling if factor else {})
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=16, head_dim=4, max_position_embeddings=context, rope_parameters=rope
    )
    expected = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0] if factor else 500000.0 ** -(torch.arange(0, 4, 2) / 4)
    assert config.inverse_frequencies() == pytest.approx(expected.tolist(), rel=1e-6)
    assert ["32 is assumed" in note for note in checkpoint.open(folder).notes] == ([True] if factor else [])


def test_the_factor_is_that_of_the_width() -> None:
    """Meta's 8B to 405B of Llama 3.1 and 70B of 3.3 have 8, 1B and 3B of Llama 3.2 have 32."""
    for width, factor in ((2048, 32), (3072, 32), (4096, 8), (8192, 8), (16384, 8)):
        assert meta._scaling(Path("params.json"), width, []).factor == factor


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("runner", [NativeRunner, NumpyRunner])
@pytest.mark.parametrize(("dtype", "format"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_logits_equal_those_of_gguf(
    shards: int, runner: Any, dtype: torch.dtype, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    config = replace(CONFIG, vocab_size=320)
    weights = write_tiny_gguf(tmp_path / "a.gguf", config=config, format=format)
    tensors = {name: torch.from_numpy(weights[name]).to(dtype) for name in config.tensor_shapes()}
    if dtype == torch.bfloat16:  # GGUF's norms are float32
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[name] = torch.from_numpy(weights[name])
    folder = write_folder(tmp_path / "a", tensors, shards)
    ids = np.random.default_rng(0).integers(3, 320, 40, dtype=np.int32)
    zeros, places = np.zeros(40, np.int32), np.arange(40, dtype=np.int32)
    batch = Batch(ids, places, zeros, np.array([[0, 1]], np.int32), places)
    logits = [runner(checkpoint.open(path), 2).forward(batch) for path in (tmp_path / "a.gguf", folder)]
    assert np.ptp(logits[0]) > 1
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))


def test_a_folder_that_changed_is_checked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether weights are finite is remembered of a folder's files, not of the folder."""
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    tensors = random_tensors()
    folder = write_folder(tmp_path / "a", tensors, 1)
    NativeRunner(checkpoint.open(folder), 1)
    tensors["norm.weight"][3] = torch.nan
    with (folder / "consolidated.00.pth").open("wb") as file:  # the same file
        torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight.*not finite"):
        NativeRunner(checkpoint.open(folder), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_scaling": RopeScaling("linear", factor=2.0)},
            "has rope scaling, biases, a sliding window or a head size that params.json",
        ),
        ({"head_dim": 8}, "has rope scaling, biases, a sliding window or a head size that params.json"),
    ],
)
def test_what_cannot_be_expressed(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf", config=replace(CONFIG, vocab_size=320, **changes))
    with pytest.raises(CheckpointError, match=reason):
        meta.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("shards", [0, -1, 3, 16])
def test_files_that_would_cut_a_head(shards: int, tmp_path: Path) -> None:
    model = checkpoint.open(write_folder(tmp_path / "a", random_tensors(), 1))
    with pytest.raises(CheckpointError, match=rf"{shards} files must divide n_kv_heads=8, dim=64, hidden_dim=96"):
        meta.write(model, tmp_path / "b", shards=shards)


def test_a_byte_level_vocabulary_has_no_place(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf", tokenizer="bpe")
    with pytest.raises(CheckpointError, match=r"has a byte-level vocabulary, which no tokenizer\.model can hold"):
        meta.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a")


def test_nothing_is_left_when_a_tensor_fails(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = write_folder(tmp_path / "a", tensors, 2)
    second = torch.load(folder / "consolidated.01.pth", weights_only=True)
    second["norm.weight"] += 1
    torch.save(second, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: tensor 'norm\.weight' is not that of consol"):
        meta.write(checkpoint.open(folder), tmp_path / "b", shards=4)
    assert not list((tmp_path / "b").iterdir())


def test_the_published_sizes_keep_their_params(tmp_path: Path) -> None:
    """params.json of a model that cannot be written here: all but the vocabulary's size, which Meta's leave out."""
    for size, published in {
        "7B": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05},
        "13B": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05},
        "70B": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                "n_layers": 80, "norm_eps": 1e-05},
    }.items():  # fmt: skip
        assert meta.to_params(tmp_path, SIZES[size]) == published | {"vocab_size": 32000}


WRITER = """
import re, resource, sys
from pathlib import Path
from llama2 import checkpoint
from llama2.checkpoint import llama2c, meta

def write(source, target):
    model = checkpoint.open(source)
    meta.write(model, target / "meta", shards=2)
    llama2c.write(model, target / "c.bin", version=2)

small, large, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write(small, small)  # whatever is imported is imported now
data = 1024 * int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
write(large, large)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory cannot be limited here")
def test_writers_hold_one_tensor_at_a_time(tmp_path: Path) -> None:
    """With less memory than the model has, and four times its largest tensor: in parts, joined, cut and quantised."""
    config = replace(CONFIG, dim=512, hidden_dim=1024, head_dim=32, n_layers=8)
    small = write_folder(tmp_path / "small", random_tensors(dtype=torch.float32), 2)
    tensors = random_tensors(config, torch.float32)
    large = write_folder(tmp_path / "large", tensors, 4, dim=512, n_layers=8, multiple_of=1024)
    sizes = [tensor.nbytes for tensor in tensors.values()]
    limit = 4 * max(sizes) + (4 << 20)
    assert sum(sizes) > 6 * limit
    subprocess.run([sys.executable, "-c", WRITER, str(small), str(large), str(limit)], check=True, timeout=60)
    assert_holds(checkpoint.open(large / "meta"), tensors)
    for name, tensor in checkpoint.open(large / "c.bin").tensors.items():
        groups = tensors[name].numpy().reshape(-1, 64)
        error = np.abs(tensor.dequantize().reshape(-1, 64) - groups)
        assert np.all(error <= np.abs(groups).max(axis=1, keepdims=True) / 253)  # half a step of 127, and rounding
