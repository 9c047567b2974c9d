"""Folders that transformers wrote, read here; folders and GGUF files written here, read by transformers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llama2
from llama2 import checkpoint
from llama2.checkpoint import Tensor, gguf_writer, hf_folder, llama2c, meta, quantization
from llama2.config import RopeScaling
from llama2.engine.runner import Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import CheckpointError, TokenizerError
from llama2.text import tokenizer_folder
from llama2.text.tokenizer import from_pieces, from_sentencepiece
from texts import strings, train_bpe, train_sentencepiece

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.2}
#: What differs from grouped-query attention with heads of 16, an output head of its own, in float32 and one file.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "sharded": {"shard": "100KB"},
    "multi-head, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi-query, long heads": {"num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-3},
    "odd sizes": {"hidden_size": 66, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 77},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of attention, tied": {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
}
TOKENS = np.random.default_rng(0).integers(0, 700, 50).tolist()


@cache
def sentencepiece_model() -> bytes:
    return train_sentencepiece(user_defined=())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of one of MODELS as transformers saves it, with a SentencePiece vocabulary; made once."""

    @cache
    def make(name: str) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

        config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config |= {"num_key_value_heads": 2, "vocab_size": 700, "max_position_embeddings": 256}
        given = dict(MODELS[name])
        shard, dtype = given.pop("shard", "5GB"), given.pop("dtype", "float32")
        kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
        hyperparameters, build = kinds[given.pop("model_type", "llama")]
        torch.manual_seed(0)
        network = build(hyperparameters(**{**config, **given, "initializer_range": 0.1}))
        for key, parameter in network.named_parameters():
            if key.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp("saved") / "model"
        network.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        return folder

    return make


def network_of(folder: Path, **options: Any) -> LlamaForCausalLM:
    from transformers import AutoModelForCausalLM

    network: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()
    return network


def theirs(network: LlamaForCausalLM) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = network(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def logits(runner: Runner) -> NDArray[np.float32]:
    n = len(TOKENS)
    arrays = (TOKENS, range(n), [0] * n, [[2, 0]], range(n))
    return runner.forward(Batch(*(np.array(array, np.int32) for array in arrays)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_what_transformers_saved(name: str, saved: Callable[[str], Path]) -> None:
    folder = saved(name)
    expected = theirs(network_of(folder))
    with checkpoint.open(folder) as model:
        assert model.format == "huggingface"
        np.testing.assert_allclose(logits(NumpyRunner(model, 4)), expected, rtol=0, atol=1e-4)
        error = np.abs(logits(NativeRunner(model, 4)) - expected)  # its cache has 16-bit numbers
        assert error.max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_written(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = checkpoint.open(saved(name))
    hf_folder.write(model, tmp_path, shard=100_000)
    before, after = network_of(saved(name)), network_of(tmp_path)
    for key, value in before.state_dict().items():
        assert np.array_equal(value.numpy(), after.state_dict()[key].numpy()), key
    assert np.array_equal(theirs(before), theirs(after))
    again = checkpoint.open(tmp_path)
    assert again.config == model.config
    files = [load_file(path) for path in sorted(tmp_path.glob("model*.safetensors"))]
    sizes = [[tensor.nbytes for tensor in file.values()] for file in files]
    assert all(sum(size) <= 100_000 or len(size) == 1 for size in sizes)
    if name == "bfloat16":  # embeddings to wq; to layer 1's norm; its feed-forward part and the last norm; the head
        assert [*map(sum, sizes)] == [89_600 + 128 + 8_192, 65_664 + 24_832, 3 * 16_384 + 128, 89_600]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(map(sum, sizes))}
    for key, tensor in model.tensors.items():
        assert np.array_equal(again.tensors[key].data, tensor.data)


@pytest.mark.parametrize("name", ["grouped", "multi-head, tied", "multi-query, long heads", "bfloat16"])
def test_transformers_loads_gguf(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    gguf_writer.write(checkpoint.open(saved(name)), tmp_path / "model.gguf")
    expected = theirs(network_of(saved(name)))
    assert np.array_equal(theirs(network_of(tmp_path, gguf_file="model.gguf")), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dynamic"])
def test_gguf_gives_the_same_bits(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint.open(saved(name))
    gguf_writer.write(model, tmp_path / "model.gguf")
    again = checkpoint.open(tmp_path / "model.gguf")
    for key, tensor in model.tensors.items():
        assert np.array_equal(again.tensors[key].dequantize(), tensor.dequantize())
    np.testing.assert_allclose(
        again.config.inverse_frequencies(), model.config.inverse_frequencies(), rtol=1e-7, atol=0
    )
    hf_folder.write(again, tmp_path)  # and back: from divisors to their rule, from float32 to decimals
    assert checkpoint.open(tmp_path).config == model.config


def test_what_one_format_cannot_say(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dynamic rope scaling, which GGUF has no key for"):
        gguf_writer.write(checkpoint.open(saved("dynamic")), tmp_path / "model.gguf")
    for name in ("biases", "mistral"):
        with pytest.raises(CheckpointError, match="biases, a sliding window or a head size that"):
            meta.write(checkpoint.open(saved(name)), tmp_path / "meta")
        with pytest.raises(CheckpointError, match="no biases and no sliding window"):
            llama2c.write(checkpoint.open(saved(name)), tmp_path / "model.bin")
    both = checkpoint.open(saved("biases"))
    both.config = replace(both.config, sliding_window=16)
    with pytest.raises(CheckpointError, match=r"both biases and a sliding window, which no config\.json can say"):
        hf_folder.write(both, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_biases_of_queries_keys_and_values_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Files may lack the bias of wo, which transformers then takes for zeros."""
    from safetensors.numpy import load_file, save_file

    folder = write_config(tmp_path / "model", saved("biases of attention, tied"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("o_proj.bias")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    model = checkpoint.open(folder)
    assert model.config.biases == ("attention.wq", "attention.wk", "attention.wv")
    np.testing.assert_allclose(logits(NumpyRunner(model, 4)), theirs(network_of(folder)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "expected"), [(None, None), (256, None), (255, 255), ("absent", None)]
)  # 4,096 is the default
def test_windows_that_matter(window: Any, expected: int | None, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", saved("mistral"), sliding_window=window)
    assert checkpoint.open(folder).config.sliding_window == expected
    longer = write_config(tmp_path / "longer", saved("mistral"), sliding_window="absent", max_position_embeddings=8192)
    assert checkpoint.open(longer).config.sliding_window == 4096


def test_rows_by_hand() -> None:
    """Two heads of 8: Meta's rows of a head are Hugging Face's 0 4 1 5 2 6 3 7, and these Meta's 0 2 4 6 1 3 5 7."""
    rows = np.arange(16, dtype="<u2").repeat(3).view(np.uint8)  # 16 rows of three numbers
    tensor = Tensor("wk", "F16", (16, 3), rows)
    pairs, halves = hf_folder.in_pairs(tensor, 2), hf_folder.in_halves(tensor, 2)
    first, second = [0, 4, 1, 5, 2, 6, 3, 7], [0, 2, 4, 6, 1, 3, 5, 7]
    assert pairs.data.view("<u2")[::3].tolist() == first + [row + 8 for row in first]
    assert halves.data.view("<u2")[::3].tolist() == second + [row + 8 for row in second]
    assert np.array_equal(hf_folder.in_halves(pairs, 2).data, rows)
    assert hf_folder.in_pairs(tensor, 4).data.view("<u2")[::3].tolist()[:4] == [0, 2, 1, 3]


def test_nothing_is_read_before_it_is_touched(saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    hf_folder.write(checkpoint.open(saved("grouped")), tmp_path)
    model = checkpoint.open(tmp_path)
    with path.open("r+b") as file:  # the mapping sees what is written into the file after it was opened
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(bytes(path.stat().st_size - file.tell()))
    wq, wv = (model.tensors[f"layers.0.attention.{name}.weight"] for name in ("wq", "wv"))
    assert not wq.data.any()
    assert not wv.data.any()
    assert not wq.data.flags.writeable
    assert not wv.data.flags.writeable
    assert len(wq.data) == wq.nbytes == 64 * 64 * 4


def test_a_folder_opens_like_any_model(saved: Callable[[str], Path], tmp_path: Path) -> None:
    gguf_writer.write(checkpoint.open(saved("bfloat16")), tmp_path / "model.gguf")
    answers = []
    for path in (saved("bfloat16"), tmp_path / "model.gguf"):
        with llama2.load(path) as model:
            answers.append(model.generate("Hello World, the", max_tokens=40, temperature=0, logprobs=2))
    assert answers[0] == answers[1]
    assert len(answers[0].token_ids) == 40


def test_a_repository_of_the_hub_opens(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "models--some--llama", "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in saved("sharded").iterdir():
        content = file.read_bytes()
        blob = hashlib.sha256(content).hexdigest()
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with llama2.load("some/llama") as model, llama2.load(saved("sharded")) as same:
        assert model.checkpoint.name == "llama"
        assert model.generate("Hello", max_tokens=8, seed=1) == same.generate("Hello", max_tokens=8, seed=1)


@pytest.mark.parametrize("name", ["odd sizes", "float16", "bfloat16"])
def test_weights_at_odd_addresses(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """As in files whose header ends anywhere."""
    folder = write_config(tmp_path / "model", saved(name))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little") + 1
    path.write_bytes(length.to_bytes(8, "little") + content[8 : 7 + length] + b" " + content[7 + length :])
    model = checkpoint.open(folder)
    assert model.tensors["norm.weight"].data.ctypes.data % 2 == 1
    for runner in (NumpyRunner, NativeRunner):
        assert np.array_equal(logits(runner(model, 4)), logits(runner(checkpoint.open(saved(name)), 4)))


def test_weights_that_changed_are_checked_again(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """What is kept of a folder is known by the times of its files, not by the folder's own."""
    hf_folder.write(checkpoint.open(saved("grouped")), tmp_path)
    path = tmp_path / "model.safetensors"
    NativeRunner(checkpoint.open(tmp_path), 1)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.array(np.nan, "<f4").tobytes())
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="not finite numbers"):
        NativeRunner(checkpoint.open(tmp_path), 1)


def write_config(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((source / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_parameters": "absent"}, 1e4, None),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        (
            {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2}},
            1e4,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_parameters": "absent", "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 1e6},
            1e6,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_parameters": "absent", "rope_scaling": {"type": "yarn", **YARN, "finetuned": True, "short": [1]}},
            1e4,
            RopeScaling("yarn", 8.0, original_context=32, attention_factor=1.2),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
            1e4,
            RopeScaling("yarn", 8.0, original_context=32, attention_factor=1 + 0.1 * math.log(8)),
        ),
        (
            {
                "rope_parameters": "absent",
                "rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 8, "beta_slow": 0},
            },
            1e4,
            RopeScaling("yarn", 2.0, original_context=256, beta_fast=8.0, attention_factor=1 + 0.1 * math.log(2)),
        ),
    ],
)
def test_rotation_in_the_keys_of_every_version(
    changes: dict[str, Any], theta: float, scaling: RopeScaling | None, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write_config(tmp_path / "model", saved("grouped"), **changes)
    model = checkpoint.open(folder)
    assert (model.config.rope_theta, model.config.rope_scaling) == (theta, scaling)
    np.testing.assert_allclose(logits(NumpyRunner(model, 4)), theirs(network_of(folder)), rtol=0, atol=1e-4)


def test_defaults_of_older_files(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys that transformers fills in, and frequencies that old files hold as tensors."""
    from safetensors.numpy import load_file, save_file

    absent = dict.fromkeys(
        ("head_dim", "max_position_embeddings", "rms_norm_eps", "architectures", "hidden_act"), "absent"
    )
    folder = write_config(tmp_path / "model", saved("grouped"), **absent)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = checkpoint.open(folder).config
    assert (config.head_dim, config.context_length, config.norm_eps) == (16, 2048, 1e-6)
    multi_head = write_config(tmp_path / "heads", saved("odd sizes"), num_key_value_heads="absent")
    assert checkpoint.open(multi_head).config.n_kv_heads == 3


def test_divisors_that_follow_no_rule(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint.open(saved("grouped"))
    divisors = (1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0)
    model.config = replace(model.config, rope_scaling=RopeScaling("llama3", divisors=divisors))
    with pytest.raises(CheckpointError, match=r"has rotary divisors that are not Llama 3\.1's"):
        hf_folder.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_quantised_weights_become_float32(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint.open(saved("bfloat16"))
    name = "layers.1.attention.wq.weight"
    wq = model.tensors[name]
    eight = replace(wq, format="Q8_0", source=quantization.quantize(wq.dequantize(), "Q8_0"))
    model.tensors = {**model.tensors, name: eight}
    hf_folder.write(model, tmp_path)
    again = checkpoint.open(tmp_path).tensors
    assert {key for key, tensor in again.items() if tensor.format == "F32"} == {name}
    assert np.array_equal(again[name].dequantize(), eight.dequantize())
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"  # which holds them all


@pytest.mark.parametrize("write", [hf_folder.write, gguf_writer.write])
def test_one_tensor_is_in_memory_at_a_time(
    write: Callable[[Any, Path], None], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = checkpoint.open(saved("bfloat16"))
    made: list[weakref.ref[Any]] = []

    def copied(tensor: Tensor) -> NDArray[np.uint8]:
        assert all(data() is None for data in made)
        data = tensor.data.copy()
        made.append(weakref.ref(data))
        return data

    model.tensors = {name: replace(t, source=partial(copied, t)) for name, t in model.tensors.items()}
    write(model, tmp_path / "model")
    assert len(made) == len(model.tensors) == 21  # each once


def test_vocabularies_that_cannot_be_written(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", saved("grouped"))
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    with pytest.raises(TokenizerError, match=rf"^{folder}: the user-defined token '▁▁▁' has a space"):
        hf_folder.write(checkpoint.open(folder), tmp_path / "written")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(model_type="unigram"))
    for write in (hf_folder.write, gguf_writer.write):
        with pytest.raises(TokenizerError, match=rf"^{folder}: its SentencePiece model is not BPE"):
            write(checkpoint.open(folder), tmp_path / "written")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=rf"^{folder}: has no tokenizer\.json and no tokenizer\.model; fetch"):
        checkpoint.open(folder).tokenizer  # noqa: B018
    assert not (tmp_path / "written").exists()


def test_files_that_cannot_be_written(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint.open(saved("grouped"))
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"taken/model\.safetensors: cannot be written \(Is a directory\)"):
        hf_folder.write(model, tmp_path / "taken")
    shutil.rmtree(tmp_path / "taken")
    name, tensor = "layers.1.feed_forward.w3.weight", model.tensors["layers.1.feed_forward.w3.weight"]

    def full() -> NDArray[np.uint8]:
        raise OSError(28, "No space left on device")  # as a write would, half-way

    model.tensors = {**model.tensors, name: replace(tensor, source=full)}
    for path, write in ((tmp_path / "model.gguf", gguf_writer.write), (tmp_path, hf_folder.write)):
        with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\); free some room"):
            write(model, path)
    assert not list(tmp_path.iterdir())


TEXTS = [text for text in strings(1000) if "<unk>" not in text]  # a special token to transformers, and ours is text


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "smollm", "llama-bpe"])
@pytest.mark.parametrize("without", ["", "tokenizer.model"])
def test_tokenizers_that_transformers_loads(kind: str, without: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, written = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    written.mkdir()
    if kind == "sentencepiece":
        (source / "tokenizer.model").write_bytes(sentencepiece_model())
    else:
        train_bpe(kind, source / "tokenizer.json")
    ours = tokenizer_folder.read(source)
    for name, content in tokenizer_folder.written(
        ours, {"default": "{{ bos_token }}{{ messages[0].content }}"}
    ).items():
        if name != without:
            (written / name).write_bytes(content)
    ignores = json.loads((written / "tokenizer.json").read_text())["model"]["ignore_merges"]
    assert ignores == (kind == "llama-bpe")  # Llama 3 takes a word that is a token before its merges
    theirs, again = AutoTokenizer.from_pretrained(written), tokenizer_folder.read(written)
    assert again.vocabulary().pieces == ours.vocabulary().pieces
    assert (again.bos_id, again.eos_id, again.add_bos) == (ours.bos_id, ours.eos_id, ours.add_bos)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("Hi")
    for text in TEXTS:
        ids = ours.encode(text, bos=ours.add_bos, special=True)
        assert theirs.encode(text) == ids == again.encode(text, bos=again.add_bos, special=True), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text


@pytest.mark.parametrize("equal", [True, False])
def test_runs_of_spaces(equal: bool, tmp_path: Path) -> None:
    """Llama 2's are equally good (spec 2.1), and grow from the left; those of other vocabularies are as they are."""
    from transformers import AutoTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁▁b"]
    pieces += ["▁" * n for n in (2, 4, 8, 16, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    scores = [-float(i) for i in range(len(pieces))]
    for i, piece in enumerate(pieces[260:], 260):
        if not piece.strip("▁"):
            scores[i] = -1e9 if equal else -500.0 - len(piece)
    ours = from_pieces(pieces, scores, types)
    for name, content in tokenizer_folder.written(ours, {}).items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    again = tokenizer_folder.read(tmp_path)
    texts = [f"{' ' * n}{end}" for n in range(70) for end in ("", "a", "b", "b  a", "xab")]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text) == again.encode(text), text
    if equal:
        assert ours.encode(" " * 32) == [pieces.index("▁" * 16)] * 2 + [pieces.index("▁")]


def test_vocabulary_that_transformers_saved(tmp_path: Path) -> None:
    """Version 5 writes a tokenizer.json alone, and puts no space before one that begins a text; so do we."""
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    ours = tokenizer_folder.read(tmp_path)
    theirs = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    theirs.save_pretrained(tmp_path / "saved")
    again = tokenizer_folder.read(tmp_path / "saved")
    assert (again.bos_id, again.eos_id, again.add_bos, again.vocab_size) == (1, 2, True, 700)
    for text in TEXTS:
        if text[:1] not in (" ", "▁") and "<tool>" not in text:
            assert again.encode(text) == ours.encode(text), text
        assert again.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False, "add_eos_token": False}])
@pytest.mark.parametrize("eos", [True, False])
def test_tokens_that_the_post_processor_adds(settings: dict[str, bool], eos: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    ours = from_sentencepiece(tmp_path / "tokenizer.model", add_eos=eos)
    for name, content in tokenizer_folder.written(ours, {}).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.model").unlink()
    one, two = (ours.encode(text, bos=True, eos=eos) for text in "ab")
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a", "b") == one + two
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ends | settings))
    again = tokenizer_folder.read(tmp_path)
    assert (again.add_bos, again.add_eos) == (not settings, eos and not settings)


def test_added_tokens(tmp_path: Path) -> None:
    """Beyond a SentencePiece model: those of either file, unused ones up to the embeddings, none after them."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 701, "<pad>": 704, "<tool>": 700}))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "add_bos_token": False}
    settings["additional_special_tokens"] = ["<tool>", "<|im_end|>"]  # others: in changed text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizer_folder.read(tmp_path, size=704)
    assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.add_bos) == (704, 701, 1, False)
    assert ours.control == {"<s>": 1, "</s>": 2, "<tool>": 700, "<|im_end|>": 701}
    assert ours.encode("<tool><|im_end|>", special=True)[-2:] == [700, 701]
    assert 701 not in ours.encode("<|im_end|>")
    assert ours.vocabulary().pieces[700:] == ["<tool>", "<|im_end|>", "[PAD702]", "[PAD703]"]
    assert ours.vocabulary().types[700:] == [3, 3, 5, 5]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    with pytest.raises(TokenizerError, match="eos_token '<pad>' is not in the vocabulary"):
        tokenizer_folder.read(tmp_path, size=704)  # it is beyond the embeddings
    assert tokenizer_folder.read(tmp_path).eos_id == 704
    plain = {"special": False, "normalized": False}
    decoder = {"700": {"content": "<a>", "special": True}, "702": {"content": "<b>", **plain}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    ours = tokenizer_folder.read(tmp_path)
    assert ours.vocabulary().pieces[700:] == ["<a>", "[PAD701]", "<b>"]
    assert ours.vocabulary().types[700:] == [3, 5, 4]


def test_what_ends_an_answer(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", saved("grouped"), eos_token_id=[2, 5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "temperature": 0.6}))
    model = checkpoint.open(folder)
    assert model.tokenizer.stop_ids == {2, 5, 7}
    hf_folder.write(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [7, 2],
        "temperature": 0.6,
    }
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [2, 5, 7]
    assert checkpoint.open(tmp_path).tokenizer.stop_ids == {2, 5, 7}
    gguf_writer.write(model, tmp_path / "model.gguf")
    assert checkpoint.open(tmp_path / "model.gguf").tokenizer.stop_ids == {2, 5, 7}
    model.tokenizer.stop_ids |= {9}
    with pytest.raises(CheckpointError, match=r"tokens \[5, 7, 9\] end an answer, and GGUF has two besides EOS"):
        gguf_writer.write(model, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": json.dumps({"chat_template": "{{ 1 }}"})}, "{{ 1 }}"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "no"}), "chat_template.jinja": "{{ 2 }}"}, "{{ 2 }}"),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "{{ 3 }}"}]})},
            "{{ 3 }}",
        ),
        ({}, None),
    ],
)
def test_chat_templates(
    files: dict[str, str], expected: str | None, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write_config(tmp_path / "model", saved("grouped"))
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: llama2\n---\n# A model\n")
    model = checkpoint.open(folder)
    assert (model.template, model.licence, model.name) == (expected, "llama2", "model")
    hf_folder.write(model, tmp_path)
    again = checkpoint.open(tmp_path)
    assert (again.template, again.licence) == (expected, "llama2")
