"""Going through a whole model keeps no more of its file in memory than one tensor."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2.convert import convert
from llama2.convert.quantize import quantize
from llama2.files import MappedFile
from models import tiny_config, write_tiny_gguf


def resident_files() -> int:
    """Bytes of mapped files in this process's memory."""
    return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) << 10


def converted(source: Path, target: Path, **options: Any) -> None:
    convert(source, target, "gguf", format="F16", run=False, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not report it")
@pytest.mark.parametrize("command", [quantize, converted])
def test_memory_is_of_one_tensor(command: Callable[..., Any], tmp_path: Path) -> None:
    config = replace(tiny_config(), dim=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=1024)
    write_tiny_gguf(tmp_path / "m.gguf", config=config, format="F32")
    size = (tmp_path / "m.gguf").stat().st_size
    assert size > 80e6
    before = resident_files()
    found = []
    command(tmp_path / "m.gguf", tmp_path / "q.gguf", progress=lambda *_: found.append(resident_files()))
    assert len(found) > 8 * 9
    assert max(found) - before < size / 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not report it")
def test_only_the_pages_of_the_given_mapping_are_released(tmp_path: Path) -> None:
    size = 32 << 20
    (tmp_path / "a").write_bytes(bytes(size))
    (tmp_path / "b").write_bytes(bytes(size))
    first, second = MappedFile(tmp_path / "a"), MappedFile(tmp_path / "b")
    before = resident_files()
    assert not first.view(0, size, "it").any()
    assert not second.view(0, size, "it").any()
    assert resident_files() - before > 1.8 * size
    first.release_pages()
    assert 0.8 * size < resident_files() - before < 1.2 * size
