"""Damaged and hostile folders of Meta's: a one-line reason, quickly, in little memory."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import checkpoint
from llama2.errors import CheckpointError, TokenizerError
from meta_bytes import PARAMS, Tensors, random_tensors, tokenizer_model, write_folder
from refusals import MB, assert_refused_cheaply, refusal

Edit = Callable[[Path], object]


def params(**changes: Any) -> Edit:
    """Parameters that differ; None leaves one out."""
    values = {key: value for key, value in (PARAMS | changes).items() if value is not None}
    return lambda folder: (folder / "params.json").write_text(json.dumps(values))


def text(content: str | bytes) -> Edit:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / "params.json").write_bytes(data)


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def second(change: Callable[[Tensors], object], name: str = "consolidated.01.pth") -> Edit:
    """The second of the two files, or that of this name, with its tensors changed."""

    def edit(folder: Path) -> None:
        path = folder / name
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return edit


def copied(source: str, target: str) -> Edit:
    return lambda folder: shutil.copy(folder / source, folder / target)


ZERO, ONE, TWO = (f"consolidated.0{i}.pth" for i in range(3))
PARAMS_TEXT = json.dumps(PARAMS)

FAULTS: dict[str, tuple[Edit, str]] = {
    # files
    "first file missing": (without(ZERO), r"consolidated\.00\.pth: no such file, and consolidated\.01\.pth is there"),
    "last file missing": (without(ONE), r"00\.pth: tensor 'tok_embeddings\.weight' makes \(704, 32\) of 1 files, and"),
    "a file too many": (copied(ONE, TWO), r"tensor 'tok_embeddings\.weight' makes \(704, 96\) of 3 files, and params"),
    "a file with another number": (
        copied(ONE, "consolidated.07.pth"),
        r"02\.pth: no such file, and .*07",
    ),
    "a file without a number": (copied(ONE, "consolidated.x.pth"), r"02\.pth: no such file, and .*x\.pth is there"),
    "a file that is empty": (lambda f: (f / ONE).write_bytes(b""), r"consolidated\.01\.pth: is empty"),
    "a file cut short": (lambda f: os.truncate(f / ONE, 9999), r"consolidated\.01\.pth: has no end of a zip's direct"),
    "no parameters": (without("params.json"), r"params\.json: no such file"),
    # parameters
    "not JSON": (text("dim: 64"), r"params\.json: it is not JSON"),
    "not UTF-8": (text(b'{"dim": "\xff"}'), r"params\.json: it is not UTF-8"),
    "a list": (text("[64]"), r"params\.json: it is not a JSON object"),
    "10^4 deep": (text("[" * 10**4), r"params\.json: it is not JSON"),
    "a key twice": (text(PARAMS_TEXT[:-1] + ', "dim": 65}'), "has dim twice, with different values"),
    "a number of 5000 digits": (
        text(PARAMS_TEXT.replace("64", "6" * 5000, 1)),
        "has a number of more than 4300 di",
    ),
    "not a number": (params(norm_eps=float("nan")), "norm_eps=nan must be a positive number"),
    "infinite": (text(PARAMS_TEXT.replace("0.5", "1e999")), "ffn_dim_multiplier=inf must be positive"),
    "65 MB": (text(PARAMS_TEXT + " " * 65 * MB), r"params\.json: has 68\d+ bytes, and the limit is 67108864"),
    "a mixture of experts": (params(moe={"num_experts": 8}), "sets 'moe', which is not supported"),
    "eyes": (params(vision_chunk_size=560), "sets 'vision_chunk_size', which is not supported"),
    "quantised": (params(quantization_args={"group_size": 32}), "sets 'quantization_args', which is not supported"),
    "an adapter": (params(lora_args={"rank": 16, "scale": 2.0}), "sets 'lora_args', which is not supported"),
    "a sliding window of no keys": (params(sliding_window=0), "sliding_window=0 must be at least 1"),
    "windows that differ": (params(sliding_window=[1024, None]), "sliding_window must be a whole number"),
    "a text for scaling": (params(use_scaled_rope="yes"), "use_scaled_rope must be true or false"),
    "another size of heads": (params(head_dim=8), r"tensor 'layers\.0\.attention\.wq\.weight' makes"),
    "a tensor of whole numbers": (
        second(lambda t: t.update({"norm.weight": t["norm.weight"].long()})),
        r"01\.pth: tensor 'norm\.weight' has format 'I64'; supported are",
    ),
    "a pointer of Git LFS": (
        text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        r"params\.json: is a pointer of Git LFS",
    ),
    "no width": (params(dim=None), "lacks dim"),
    "no layers": (params(n_layers=None), "lacks n_layers"),
    "a text for a width": (params(dim="64"), "dim must be a whole number"),
    "true for layers": (params(n_layers=True), "n_layers must be a whole number"),
    "a fraction of heads": (params(n_heads=16.0), "n_heads must be a whole number"),
    "no heads": (params(n_heads=0), "dim=64 must be a multiple of n_heads=0"),
    "heads that do not divide": (params(n_heads=24), "dim=64 must be a multiple of n_heads=24"),
    "key heads that do not divide": (params(n_kv_heads=7), "n_heads=16 must be a multiple of n_kv_heads=7"),
    "odd heads": (params(n_heads=64), "head_dim=1 must be even"),
    "a negative width": (params(dim=-64), "dim=-64 must be between"),
    "a width of 10^19": (params(dim=10**19), "dim=10000000000000000000 must be between"),
    "10^9 layers": (params(n_layers=10**9), "n_layers=1000000000 must be between"),
    "4096 layers": (params(n_layers=4096), r"lacks tensor 'layers\.2\."),
    "fewer layers": (params(n_layers=1), r"has tensor 'layers\.1\..*', which no Llama has"),
    "multiples of 0": (params(multiple_of=0), "multiple_of=0 and ffn_dim_multiplier=0.5 must be positive"),
    "a negative multiplier": (params(ffn_dim_multiplier=-1.3), "ffn_dim_multiplier=-1.3 must be positive"),
    "an enormous multiplier": (params(ffn_dim_multiplier=1e300), "ffn_dim_multiplier=1e\\+300 must be"),
    "multiples of 10^18": (params(multiple_of=10**18), "hidden_dim=1000000000000000000 must be between"),
    "another multiple": (params(multiple_of=256), r"makes \(96, 64\) of 2 files, and params\.json says \(256, 64\)"),
    "another vocabulary": (params(vocab_size=32000), r"makes \(704, 64\) of 2 files, and .* says \(32000, 64\)"),
    "a vocabulary of -2": (params(vocab_size=-2), "vocab_size=-2 must be between"),
    "an epsilon of 0": (params(norm_eps=0), "norm_eps=0.0 must be a positive number"),
    "a negative base": (params(rope_theta=-1.0), "rope_theta=-1.0 must be a positive number"),
    # tensors
    "a tensor missing": (second(lambda t: t.pop("output.weight")), r"01\.pth: lacks tensor 'output\.weight'"),
    "no embeddings": (
        second(lambda t: t.pop("tok_embeddings.weight"), ZERO),
        r"00\.pth: lacks tensor 'tok_embeddings\.weight'",
    ),
    "a tensor too many": (second(lambda t: t.update(bias=torch.ones(1))), r"01\.pth: has tensor 'bias', which no Lla"),
    "another format": (
        second(lambda t: t.update({"norm.weight": t["norm.weight"].float()})),
        r"01\.pth: tensor 'norm\.weight' has F32, and consolidated\.00\.pth BF16",
    ),
    "cut along the other axis": (
        second(lambda t: t.update({"output.weight": torch.ones(704, 32).bfloat16()})),
        r"01\.pth: tensor 'output\.weight' makes \(1408, 32\) of 2 files, and params\.json says \(704, 64\)",
    ),
    "one dimension too few": (
        second(lambda t: t.update({"output.weight": torch.ones(352).bfloat16()})),
        r"tensor 'output\.weight' makes \(704,\) of 2 files",
    ),
    "something that is not a tensor": (second(lambda t: t.update({"norm.weight": 1})), "its entry 'norm.weight' is no"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("valid") / "model", random_tensors(), 2)
    checkpoint.open(folder).check_finite()
    return folder


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "model"))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, folder: Path) -> None:
    edit, reason = FAULTS[fault]
    edit(folder)
    assert re.search(reason, refusal(folder).removeprefix(str(folder)))


def test_a_file_of_the_folder(folder: Path) -> None:
    assert checkpoint.open(folder / ZERO).path == folder
    assert checkpoint.open(folder / "params.json").path == folder
    (folder / "params.json").unlink()
    assert "is a file of weights alone; give the folder that has its params.json" in refusal(folder / ZERO)


def test_a_file_of_another_model(folder: Path) -> None:
    """Files that were exchanged between two models of a size give themselves away by their norms, when touched."""
    edit = second(lambda t: t.update({"norm.weight": t["norm.weight"] * 2}))
    edit(folder)
    model = checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"01\.pth: tensor 'norm\.weight' is not that of consolidated\.00\.pth"):
        model.check_finite()


def test_weights_that_are_not_numbers(folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["layers.1.feed_forward.w2.weight"][63, 47] = torch.inf

    second(spoil)(folder)
    model = checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"'layers\.1\.feed_forward\.w2\.weight' holds weights that"):
        model.check_finite()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"no tokenizer in .*tokenizer\.model; give its file with --tokenizer"),
        (tokenizer_model()[:5000], r"tokenizer\.model: not a whole SentencePiece model"),
        (tokenizer_model()[:-1], r"tokenizer\.model: not a whole SentencePiece model"),
        (b"", r"tokenizer\.model: is empty"),
        (tokenizer_model(712), r"tokenizer\.model: has 712 tokens, and the model 704; give the model's own"),
    ],
)
def test_tokenizer(content: bytes | None, reason: str, folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    if content is not None:
        (folder / "tokenizer.model").write_bytes(content)
    model = checkpoint.open(folder)
    with pytest.raises(TokenizerError, match=reason):
        model.tokenizer  # noqa: B018


@pytest.mark.parametrize("options", [[], ["-O"]])
def test_time_and_memory(options: list[str], valid: Path, tmp_path: Path) -> None:
    """A second and 64 MB beyond the files, for everything above; also where `assert` does nothing."""
    folders = []
    for i, (edit, _) in enumerate(FAULTS.values()):
        folders.append(Path(shutil.copytree(valid, tmp_path / str(i))))
        edit(folders[-1])
    assert_refused_cheaply(folders, options)
