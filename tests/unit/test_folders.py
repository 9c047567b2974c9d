"""Folders as people publish them: opened, with a note of what was ignored or assumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folders import DIM, HIDDEN, VOCAB, Folder
from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.errors import CheckpointError
from models import tiny_config, write_tiny_gguf

Edit = Callable[[Folder], object]

HEAD, NORM = "lm_head.weight", "model.norm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def config(**values: Any) -> Edit:
    return lambda folder: folder.config.update(values)


def beside(name: str, text: str) -> Edit:
    return lambda folder: folder.files.update({name: text.encode()})


def renamed(rename: Callable[[str], str]) -> Edit:
    return lambda folder: setattr(folder, "tensors", {rename(name): value for name, value in folder.tensors.items()})


def untied(folder: Folder) -> None:
    del folder.config["tie_word_embeddings"], folder.tensors[HEAD]


def indexed(change: Callable[[dict[str, str]], object], add: str | None = None) -> Edit:
    """Two files, with an index that was changed after they were written; the first file has a tensor more."""

    def edit(folder: Folder) -> None:
        if add is not None:
            folder.tensors[add] = np.ones(2, "<f4")
        folder.shards()
        index = json.loads(folder.files["model.safetensors.index.json"])
        change(index["weight_map"])
        folder.files["model.safetensors.index.json"] = json.dumps(index).encode()

    return edit


def swapped(places: dict[str, str]) -> None:
    first, second = sorted(set(places.values()))
    places.update({name: second if file == first else first for name, file in places.items()})


def positions(folder: Folder) -> None:
    folder.tensors |= {
        "model.position_ids": np.arange(4, dtype="<i8"),
        "model.layers.0.self_attn.masked_bias": np.zeros((), "<f4"),
        FREQUENCIES: np.ones(2, "<f4"),
    }
    folder.header["model.position_ids"] = {"dtype": "I64"}


OPENED: dict[str, tuple[Edit, str]] = {
    "a length of 10^30": (beside("tokenizer_config.json", f'{{"model_max_length": {10**30}}}'), ""),
    "keys that nobody needs": (
        beside("tokenizer_config.json", '{"a": NaN, "b": 1, "b": 2, "c": "\\ud800", "d": {"e": 1, "e": []}}'),
        "",
    ),
    "the old spelling": (config(architectures=["LLaMAForCausalLM"]), ""),
    "no architecture": (config(architectures=None), ""),
    "code beside it": (config(auto_map={"AutoModelForCausalLM": "modeling.Llama"}), "auto_map of config.json names"),
    "frequencies, positions and masks": (positions, ""),
    "frequencies that the index lists alone": (indexed(lambda places: places.update({FREQUENCIES: "x.bin"})), ""),
    "frequencies that the index does not list": (indexed(lambda places: places.pop(FREQUENCIES), FREQUENCIES), ""),
    "an index of more than there is": (
        indexed(lambda places: places.update(x="model-00001-of-00002.safetensors")),
        "model.safetensors.index.json lists tensors that no file has, 1 in all, such as 'x'",
    ),
    "an index of less than there is": (indexed(lambda places: places.pop(NORM)), ""),
    "an index of other files": (indexed(swapped), ""),
    "an end that the vocabulary lacks": (
        beside("generation_config.json", '{"eos_token_id": [2, 99, -1]}'),
        "generation_config.json has end tokens that the vocabulary lacks, which are ignored: [99, -1]",
    ),
    "an end that is none": (config(eos_token_id=-1), ""),
    "tied without saying so": (untied, "its output head is taken to be its embeddings, because"),
    "names without model.": (renamed(lambda name: name.removeprefix("model.")), "its tensors' names lack `model.`"),
    "names with more": (
        renamed(lambda name: "base_model.model." + name),
        "its tensors' names begin with 'base_model.model.model.'",
    ),
    "whole weights that should have been quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "its configuration speaks of bitsandbytes weights of 4 bits; it has none, and that is ignored",
    ),
}


def assert_same(model: Checkpoint, plain: Checkpoint) -> None:
    assert model.tensors.keys() == plain.tensors.keys() - ({"output.weight"} if model.config.tied_embeddings else set())
    for name, tensor in model.tensors.items():
        assert np.array_equal(tensor.data, plain.tensors[name].data), name


@pytest.mark.parametrize("case", OPENED)
def test_opened_with_a_note(case: str, tmp_path: Path) -> None:
    edit, note = OPENED[case]
    plain = checkpoint.open(Folder().write(tmp_path / "plain"))
    edit(folder := Folder())

    model = checkpoint.open(folder.write(tmp_path / "model"))

    assert_same(model, plain)
    assert [entry[: len(note)] for entry in model.notes] == ([note] if note else [])
    assert model.tokenizer.stop_ids == ({2} if case != "an end that is none" else model.tokenizer.stop_ids)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pickles_of_pytorch(new: bool, shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Alone in a folder; where safetensors are too, those count. Old files tie with one tensor of two names."""
    folder = Folder()
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in folder.tensors.items()}
    tensors[HEAD] = tensors["model.embed_tokens.weight"]
    parts = [dict([*tensors.items()][i::shards]) for i in range(shards)]
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    path = folder.write(tmp_path / "model")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    else:
        for name, part in zip(names, parts, strict=True):
            torch.save(part, path / name, _use_new_zipfile_serialization=new)
        index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))  # of a partial download

    model = checkpoint.open(path)

    rows = tensors["model.layers.0.self_attn.v_proj.weight"]
    assert model.tensors["layers.0.attention.wv.weight"].data.tolist() == rows.view(torch.uint8).ravel().tolist()
    # from halves to pairs by hand: rows 0, 1, 2, 3 of a head become 0, 2, 1, 3
    keys = tensors["model.layers.0.self_attn.k_proj.weight"][[0, 2, 1, 3]]
    assert model.tensors["layers.0.attention.wk.weight"].data.tolist() == keys.view(torch.uint8).ravel().tolist()
    head = tensors["model.embed_tokens.weight"].view(torch.uint8).ravel().tolist()
    assert model.tensors["output.weight"].data.tolist() == head
    Folder().write(path)
    assert checkpoint.open(path).tensors["norm.weight"].format == "F32"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_file_means_its_folder(name: str, tmp_path: Path) -> None:
    path = Folder().write(tmp_path / "model")
    (path / "tokenizer_config.json").write_text("{}")
    if name.startswith("tokenizer"):
        with pytest.raises(CheckpointError):
            checkpoint.open(path / name)
    else:
        assert checkpoint.open(path / name).path == path


@pytest.mark.parametrize("name", [".", "..", "below/..", "./"])
def test_a_folder_in_which_one_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder().write(tmp_path / "model")
    (tmp_path / "model/below").mkdir()
    monkeypatch.chdir(tmp_path / ("model/below" if name == ".." else "model"))
    with checkpoint.open(name) as opened:
        assert opened.path == tmp_path / "model"
        assert opened.config.dim == DIM


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/..", "\0/.."])
def test_a_path_without_a_name_that_holds_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        checkpoint.open(name)


def test_a_file_of_weights_alone(tmp_path: Path) -> None:
    path = Folder().write(tmp_path / "model")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is a file of weights alone; give the folder that has its config"):
        checkpoint.open(path / "model.safetensors")


def mistral(folder: Path, **params: Any) -> dict[str, torch.Tensor]:
    """Mistral's own format: one file, Meta's names and order, and every width in params.json."""
    from safetensors.torch import save_file

    kv, generator = DIM // 2, torch.Generator().manual_seed(0)
    shapes = {
        "tok_embeddings.weight": (VOCAB, DIM),
        "layers.0.attention_norm.weight": (DIM,),
        "layers.0.attention.wq.weight": (DIM, DIM),
        "layers.0.attention.wk.weight": (kv, DIM),
        "layers.0.attention.wv.weight": (kv, DIM),
        "layers.0.attention.wo.weight": (DIM, DIM),
        "layers.0.ffn_norm.weight": (DIM,),
        "layers.0.feed_forward.w1.weight": (HIDDEN, DIM),
        "layers.0.feed_forward.w2.weight": (DIM, HIDDEN),
        "layers.0.feed_forward.w3.weight": (HIDDEN, DIM),
        "norm.weight": (DIM,),
        "output.weight": (VOCAB, DIM),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    widths = {"dim": DIM, "n_layers": 1, "head_dim": 4, "hidden_dim": HIDDEN, "n_heads": 2, "n_kv_heads": 1}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps({**widths, "norm_eps": 1e-5, "vocab_size": VOCAB, **params}))
    return tensors


@pytest.mark.parametrize(
    ("params", "theta", "context"),
    [({"rope_theta": 1e6}, 1e6, 32768), ({"rope_theta": 1e9}, 1e9, 131072), ({}, 1e6, 32768),
     ({"sliding_window": 32768}, 1e4, 32768), ({"max_seq_len": 4096, "sliding_window": 4096}, 1e4, 4096),
     ({"sliding_window": 4096}, 1e4, 32768)],
)  # fmt: skip
def test_mistral_s_own_folders(params: dict[str, Any], theta: float, context: int, tmp_path: Path) -> None:
    """7B v0.3 and Devstral give the base; Mistral's code takes 10^6 for models without a window, else 10^4."""
    tensors = mistral(tmp_path / "model", **params)
    model = checkpoint.open(tmp_path / "model")
    assert (model.config.rope_theta, model.config.context_length) == (theta, context)
    window = params.get("sliding_window")
    assert model.config.sliding_window == (window if window is not None and window < context else None)
    assert (model.config.head_dim, model.config.hidden_dim, model.config.n_kv_heads) == (4, HIDDEN, 1)
    assert model.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert model.tensors[name].data.tolist() == tensor.view(torch.uint8).ravel().tolist()


def test_a_folder_with_both_is_hugging_face_s(tmp_path: Path) -> None:
    mistral(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(Folder().config))
    assert checkpoint.open(tmp_path / "model").format == "meta"  # whose weights alone are there
    Folder().write(tmp_path / "model")
    assert checkpoint.open(tmp_path / "model").format == "huggingface"


def test_keys_of_params_that_do_not_matter_are_noted(tmp_path: Path) -> None:
    mistral(tmp_path / "model", colour="blue", moe=None)
    assert checkpoint.open(tmp_path / "model").notes == (
        "params.json sets 'colour', which is not known here and ignored",
    )


def test_packed_weights_are_not_those_of_a_file_of_equal_size_and_time(tmp_path: Path) -> None:
    """`cp -p` and reproducible images leave both; answers would be of neither model."""
    from llama2.checkpoint import artifacts

    arrays = {"a": np.arange(9, dtype=np.uint8)}
    model, place = tmp_path / "m.gguf", tmp_path / "place"
    write_tiny_gguf(model, config=tiny_config())
    artifacts.write(place, model, {}, arrays)
    assert artifacts.read(place, model, {}) is not None

    before, content = model.stat(), bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)  # in place: the same inode
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (model.stat().st_size, model.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert artifacts.read(place, model, {}) is None

    artifacts.write(place, model, {}, arrays)
    (tmp_path / "other").write_bytes(model.read_bytes())
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "other").rename(model)
    assert artifacts.read(place, model, {}) is None


def test_samples_tell_files_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where inode and time of change are the same, as on some network file systems."""
    from llama2.checkpoint import artifacts

    def identity(content: bytes) -> list[Any]:
        (tmp_path / "m").write_bytes(content)
        return [entry[5] for entry in artifacts._identity(tmp_path / "m")["files"]]

    content = bytes(2 << 20)
    assert identity(content) == identity(content)
    for place in (0, 4095, len(content) - 1, len(content) * 15 // 31):
        assert identity(content) != identity(content[:place] + b"\1" + content[place + 1 :])


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_written_follows_no_link(kind: str, tmp_path: Path) -> None:
    from llama2.files import create

    victim, path = tmp_path / "victim", tmp_path / "model.gguf"
    victim.write_bytes(b"precious")
    if kind == "link":
        (tmp_path / "model.gguf.part").symlink_to(victim)
        path.symlink_to(victim)
    else:
        (tmp_path / "model.gguf.part").write_bytes(b"half of an older one, which was longer")
    with create(path) as file:
        file.write(b"new")
    assert victim.read_bytes() == b"precious"
    assert (path.read_bytes(), path.is_symlink()) == (b"new", False)
    assert not (tmp_path / "model.gguf.part").exists()

    (tmp_path / "model.gguf.part").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"), create(path):
        pass
    assert path.read_bytes() == b"new"


def test_who_has_mapped_a_file_keeps_it_when_it_is_replaced(tmp_path: Path) -> None:
    from llama2.files import MappedFile, create

    path = tmp_path / "model.gguf"
    path.write_bytes(b"old" * 5000)
    mapped = MappedFile(path)
    with create(path) as file:
        file.write(b"new")
    assert mapped.view(0, 15000, "it").tobytes() == b"old" * 5000
