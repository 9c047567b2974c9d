"""Packed weights on disk: written once, then read or mapped; never believed when they may be another file's."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llama2 import checkpoint, native
from llama2.checkpoint import Checkpoint, artifacts
from llama2.engine import packed
from llama2.errors import CheckpointError, EngineError
from models import tiny_config, write_tiny_gguf

MATRICES = 2 * 7 + 1  # of two layers, and the output head


class Counting(ModuleType):
    """The native module, counting the matrices that it packs."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__("counting")
        self.module, self.isa, self.packed_bytes = module, module.isa, module.packed_bytes
        self.count = 0

    def pack(self, *arguments: object) -> None:
        self.count += 1
        self.module.pack(*arguments)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps packed weights."""
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLAMA2_PACKED_LIMIT", raising=False)
    return tmp_path / "home" / "packed"


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return tiny(tmp_path / "tiny.gguf")


def tiny(path: Path, format: str = "Q4_0", **changes: object) -> Checkpoint:
    write_tiny_gguf(path, format=format, config=tiny_config(format, **changes))
    return checkpoint.open(path)


def pack(model: Checkpoint, isa: str | None = None) -> int:
    """Pack or map `model`, compare every matrix with what the kernel packs, and return how many were packed."""
    counting = Counting(native.module(isa))
    for name, data in packed.pack(model, counting).items():
        tensor = model.tensors[name]
        expected = np.empty(counting.packed_bytes(tensor.format, *tensor.shape), np.uint8)
        counting.module.pack(tensor.format, tensor.data, *tensor.shape, expected)
        np.testing.assert_array_equal(data, expected)
    return counting.count


def test_the_second_start_maps_what_the_first_one_wrote(model: Checkpoint, folder: Path) -> None:
    for isa in native.supported():
        assert pack(model, isa) == MATRICES
        assert pack(model, isa) == 0
    assert len(list(folder.iterdir())) == len(native.supported())  # each has its own, and nothing temporary is left
    mapped = packed.pack(model, native.module())
    assert not any(data.flags.writeable or data.flags.owndata for data in mapped.values())
    assert "tok_embeddings.weight" not in mapped


@pytest.mark.parametrize(("available", "mapped"), [(1 << 40, False), (0, True)])
def test_weights_are_mapped_where_memory_is_short(
    available: int, mapped: bool, model: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped follows the file; what was read into memory does not."""
    monkeypatch.setattr(artifacts, "available_memory", lambda: available)
    monkeypatch.setattr(artifacts, "_PIECE", 1000)  # so that there are many
    assert pack(model) == MATRICES
    assert pack(model) == 0
    found = packed.pack(model, native.module())
    before = {name: data.copy() for name, data in found.items()}
    [file] = folder.iterdir()
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        content.write(bytes(64))
    assert mapped == any((data != before[name]).any() for name, data in found.items())


def test_an_embedding_is_packed_when_it_is_the_output_head_too(tmp_path: Path) -> None:
    model = tiny(tmp_path / "tied.gguf", tied_embeddings=True)
    assert "tok_embeddings.weight" in packed.pack(model, native.module())


def test_floats_are_not_packed_but_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path / "floats.gguf", "F16")
    assert packed.pack(model, native.module()) == {}
    monkeypatch.setattr(Checkpoint, "check_finite", lambda self: pytest.fail("read all weights again"))
    assert packed.pack(model, native.module()) == {}


def test_weights_that_are_not_numbers_are_refused_at_every_start(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "nan.gguf"
    write_tiny_gguf(path, format="Q8_0")
    tensor = checkpoint.open(path).tensors["layers.1.feed_forward.w2.weight"]
    content = path.read_bytes()
    at = content.index(tensor.data.tobytes())
    path.write_bytes(content[:at] + np.float16(np.nan).tobytes() + content[at + 2 :])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w2\.weight.*not finite"):
            packed.pack(checkpoint.open(path), native.module())
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"another file\n" + b[13:],
        lambda b: b[:24] + (1 << 60).to_bytes(8, "little") + b[32:],
        lambda b: b.replace(b'"layout"', b'"layers"', 1),
        lambda b: b[:-1],
        lambda b: b + b"\0",
    ],
    ids=["empty", "magic", "length", "header", "cut", "longer"],
)
def test_a_damaged_file_is_replaced(damage: Callable[[bytes], bytes], model: Checkpoint, folder: Path) -> None:
    pack(model)
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert pack(model) == MATRICES
    assert pack(model) == 0


def test_another_model_at_the_same_path_is_packed_anew(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "tiny.gguf"
    pack(tiny(path))
    stat = path.stat()
    write_tiny_gguf(path, format="Q4_0", seed=1)  # the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert pack(checkpoint.open(path)) == MATRICES
    write_tiny_gguf(path, format="Q8_0", seed=1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert pack(checkpoint.open(path)) == MATRICES
    assert len(list(folder.iterdir())) == 1


def test_a_new_layout_is_packed_anew(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(model)
    monkeypatch.setattr(packed, "LAYOUT", packed.LAYOUT + 1)
    assert pack(model) == MATRICES


@pytest.mark.parametrize("obstacle", ["a file where the folder should be", "a folder where the file should be"])
def test_without_a_place_to_write_weights_stay_in_memory(obstacle: str, model: Checkpoint, folder: Path) -> None:
    if obstacle.startswith("a file"):
        folder.parent.mkdir()
        folder.write_text("not a folder")
    else:
        pack(model)
        [path] = folder.iterdir()
        path.unlink()
        (path / "x").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"cannot be kept in .*packed \(.*\); every start will repack") as caught:
        assert pack(model) >= MATRICES
    assert len(caught) == 1
    assert not list(folder.parent.glob("packed/*.tmp"))


def test_the_limit_removes_what_was_not_used_for_longest(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny(tmp_path / f"{i}.gguf") for i in range(4)]
    for age, model in zip((30, 20, 40), models, strict=False):
        before = set(folder.glob("*")) if folder.exists() else set()
        pack(model)
        [new] = set(folder.iterdir()) - before
        os.utime(new, (1e9 - age, 1e9 - age))
    size = new.stat().st_size
    left_behind = folder / "interrupted.tmp"
    left_behind.write_bytes(bytes(size))
    os.utime(left_behind, (1e9 - 90, 1e9 - 90))
    monkeypatch.setenv("LLAMA2_PACKED_LIMIT", str(3 * size))
    assert pack(models[0]) == 0  # used just now
    assert pack(models[3]) == MATRICES
    assert not left_behind.exists()
    assert [pack(model) for model in (models[0], models[1], models[3])] == [0, 0, 0]
    assert pack(models[2]) == MATRICES


def test_a_limit_of_nothing_keeps_nothing(model: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_PACKED_LIMIT", "0")
    assert pack(model) >= MATRICES
    assert not list(folder.iterdir())


@pytest.mark.parametrize("limit", ["", "32GB", "-1", "²", "9" * 5000])
def test_a_limit_that_is_no_number_of_bytes(limit: str, model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_PACKED_LIMIT", limit)
    with pytest.raises(EngineError, match=r"LLAMA2_PACKED_LIMIT=.* must be a number of bytes"):
        pack(model)


#: Packs the model of its argument, and prints warnings and a number that depends on every packed byte.
PROGRAM = """
import sys, warnings, zlib
from llama2 import checkpoint, native
from llama2.engine import packed
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    matrices = packed.pack(checkpoint.open(sys.argv[1]), native.module())
print(sum(zlib.crc32(data) for data in matrices.values()), *[w.message for w in caught])
"""


def start(model: Checkpoint, before: str = "") -> subprocess.Popen[str]:
    program = [sys.executable, "-c", PROGRAM.format(before=before), str(model.path)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    with process:
        output, _ = process.communicate()
    assert process.returncode == 0
    return output.strip()


def test_processes_at_once(tmp_path: Path, folder: Path) -> None:
    model = tiny(tmp_path / "tiny.gguf", "Q6_K")
    outputs = [finished(process) for process in [start(model) for _ in range(3)]]
    assert outputs == [outputs[0]] * 3
    assert outputs[0].isdecimal()  # no warning
    assert len(list(folder.iterdir())) == 1
    assert pack(model) == 0


def test_a_full_disk(model: Checkpoint, folder: Path) -> None:
    pytest.importorskip("resource", reason="file sizes cannot be limited here")
    plenty = finished(start(model))
    [path] = folder.iterdir()
    path.unlink()
    full = finished(start(model, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"))
    number, warning = full.split(maxsplit=1)
    assert number == plenty
    assert warning.count("cannot be kept in") == 1
    assert not list(folder.iterdir())


def test_nothing_is_warned_of_in_the_good_case(model: Checkpoint) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(model)
        pack(model)
