"""The .pth reader on what torch.save wrote, and what it wrote itself in torch.load."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.checkpoint import Tensor, pth

TENSORS = {
    "float": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
    "half": torch.tensor([1.5, -2.0, 65504.0, 6e-8]).half(),
    "brain": torch.arange(300.0).reshape(2, 150).bfloat16(),
    "one": torch.ones(1, 1),
}
FORMATS = {"float": "F32", "half": "F16", "brain": "BF16", "one": "F32"}


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).ravel().tolist()


def assert_same(tensors: dict[str, Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.name, tensor.shape, tensor.format) == (name, tuple(expected[name].shape), FORMATS[name])
        assert tensor.data.tolist() == bits(expected[name])
        assert tensor.nbytes == len(tensor.data)
        assert torch.equal(torch.from_numpy(tensor.dequantize()), expected[name].float())


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_what_torch_saved(kind: type, tmp_path: Path) -> None:
    torch.save(kind(TENSORS), tmp_path / "a.pth")
    assert_same(pth.read(tmp_path / "a.pth"), TENSORS)


def test_a_state_dict(tmp_path: Path) -> None:
    """It has an attribute with the modules' versions."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, track_running_stats=False))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    tensors = pth.read(tmp_path / "a.pth")
    assert {n: t.dequantize().tolist() for n, t in tensors.items()} == {
        n: t.tolist() for n, t in module.state_dict().items()
    }


def test_many_tensors(tmp_path: Path) -> None:
    """More than 256 objects need the long operations of the memo."""
    tensors = {f"layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(400)}
    torch.save(tensors, tmp_path / "a.pth")
    assert [t.dequantize()[1, 1] for t in pth.read(tmp_path / "a.pth").values()] == list(range(400))


def test_parts_of_a_storage(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    parts = {"float": whole[1:3], "one": whole[4:, 3:]}
    torch.save(parts, tmp_path / "a.pth")
    assert_same(pth.read(tmp_path / "a.pth"), parts)


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_what_stands_in_folders_of_others(options: dict[str, Any], tmp_path: Path) -> None:
    """Also as PyTorch saved before 1.6; views, tied tensors, parameters, positions and masks beside the weights."""
    shared = torch.arange(24.0).reshape(4, 6)
    tensors = {
        **TENSORS,
        "transposed": torch.arange(12.0).reshape(3, 4).half().T,
        "columns": shared[:2, 1:4],
        "rows": shared[2:],
        "tied": TENSORS["float"],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "positions": torch.arange(5),
        "mask": torch.tensor([[True, False]]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
    }
    torch.save(OrderedDict(tensors), tmp_path / "a.bin", **options)
    read = pth.read(tmp_path / "a.bin")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (name, read[name].shape) == (name, tuple(tensor.shape))
        assert read[name].data.tolist() == bits(tensor.detach().reshape(tensor.shape or 1))
        assert read[name].data.ctypes.data % tensor.element_size() == 0
    assert (read["positions"].format, read["mask"].format) == ("I64", "BOOL")


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pth")
    for tensor in pth.read(tmp_path / "a.pth").values():
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_members_that_were_zipped_again(shift: int, tmp_path: Path) -> None:
    """They lie at odd addresses, and may have their folder as a member."""
    torch.save(TENSORS, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        new.writestr("a/", b"")
        new.writestr("a/" + "x" * (shift + 1), b"")
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert_same(pth.read(tmp_path / "b.pth"), TENSORS)


def test_a_zip_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of more than 4 GB are, but small."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    torch.save(TENSORS, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert b"PK\6\6" in (tmp_path / "b.pth").read_bytes()
    assert_same(pth.read(tmp_path / "b.pth"), TENSORS)


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_what_is_written(mapped: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pth")
    tensors = pth.read(tmp_path / "a.pth")
    described = {name: (tensor.format, tensor.shape) for name, tensor in tensors.items()}
    with (tmp_path / "b.pth").open("wb") as file, pth.writing(file, described) as add:
        for tensor in tensors.values():
            add(tensor.data)
    loaded = torch.load(tmp_path / "b.pth", weights_only=True, mmap=mapped)
    assert list(loaded) == list(TENSORS)
    for name, value in loaded.items():
        assert value.dtype == TENSORS[name].dtype
        assert torch.equal(value, TENSORS[name])
    again = pth.read(tmp_path / "b.pth")
    assert_same(again, TENSORS)
    assert all(tensor.data.ctypes.data % 64 == 0 for tensor in again.values())
