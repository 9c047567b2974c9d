"""Files of tensors, between this reader and writer and the safetensors library's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama2.checkpoint import Tensor, safetensors
from llama2.errors import CheckpointError

TENSORS = {
    "a": torch.arange(15, dtype=torch.float32).reshape(3, 5) / 7,
    "b": torch.arange(7, dtype=torch.float32).to(torch.bfloat16) / 3,
    "c.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(torch.float16) / 9,
    "d": torch.full((1, 1), -2.5),
}


def as_bytes(tensor: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


def test_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file(TENSORS, path, {"about": "anything"})
    tensors = safetensors.read(path)
    assert tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        tensor = tensors[name]
        assert (tensor.name, tensor.shape) == (name, tuple(expected.shape))
        assert tensor.format == {"a": "F32", "b": "BF16", "c.weight": "F16", "d": "F32"}[name]
        assert np.array_equal(tensor.data, as_bytes(expected))
        assert np.array_equal(tensor.dequantize(), expected.float().numpy())


def test_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    formats = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    tensors = [Tensor(name, formats[t.dtype], tuple(t.shape), as_bytes(t)) for name, t in TENSORS.items()]
    safetensors.write(tensors, path)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 8 == 0  # where the first tensor begins
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert all(header[name]["data_offsets"][0] % t.dtype.itemsize == 0 for name, t in TENSORS.items())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_tensors_at_any_address(odd: int, tmp_path: Path) -> None:
    """The library's older files pad neither the header nor what lies between."""
    path = tmp_path / "some.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * odd
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for name, tensor in safetensors.read(path).items():
        assert np.array_equal(tensor.dequantize(), TENSORS[name].float().numpy())


def test_formats_that_it_has_not(tmp_path: Path) -> None:
    tensor = Tensor("a", "Q8_0", (1, 32), np.zeros(34, np.uint8))
    with pytest.raises(CheckpointError, match=r"tensor 'a' has format Q8_0, which safetensors does not have"):
        safetensors.write([tensor], tmp_path / "some.safetensors")
    assert not list(tmp_path.iterdir())
