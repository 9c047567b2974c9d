"""How a model runs: settings that exclude each other, and what they are in words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import llama2
from llama2 import Runtime, native
from llama2.engine.runtime import RuntimeSettings
from llama2.errors import EngineError, RequestError
from models import write_tiny_gguf

TASKS = Path("/proc/self/task")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def test_a_runtime_and_keyword_arguments_are_the_same(path: Path) -> None:
    given = Runtime(runner="numpy", context=32, sequences=2)
    with (
        llama2.load(path, given) as model,
        llama2.load(path, runner="numpy", context=32, sequences=2) as same,
        llama2.load(path, given, context=16) as shorter,
    ):
        assert (model.engine.context, same.engine.context, shorter.engine.context) == (32, 32, 16)
        assert model.engine.stats.blocks == same.engine.stats.blocks == 2  # of 32 positions each


@pytest.mark.parametrize(("cache_bytes", "blocks"), [(None, 32), (1 << 20, 32), (100_000, 12), (1, 8)])
def test_the_cache_has_at_most_its_bytes_and_at_least_one_context(
    path: Path, cache_bytes: int | None, blocks: int
) -> None:
    """A block is 32 tokens of 2 layers, 2 heads of 16 keys and 16 values, each of 2 bytes: 8,192 bytes."""
    with llama2.load(path, runner="numpy", sequences=4, cache_bytes=cache_bytes) as model:
        assert model.engine.context == 256
        assert model.engine.stats.blocks == blocks


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads as Linux lists them")
def test_so_many_threads_compute(path: Path) -> None:
    def threads(chosen: int) -> int:
        before = {task.name for task in TASKS.iterdir()}  # by id, as some may end meanwhile
        with llama2.load(path, threads=chosen) as model:
            model.generate([3, 4], max_tokens=1)
            return len({task.name for task in TASKS.iterdir()} - before)

    assert threads(5) - threads(2) == 3


def test_a_float16_cache_is_that_of_the_best_instruction_set_without_bfloat16(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA2_ISA", raising=False)
    best = next(isa for isa in native.supported() if isa != "avx512_bf16")
    with llama2.load(path, cache_type="float16") as model:
        assert model.engine.arithmetic == f"native, {best}"
    with llama2.load(path) as model:
        assert model.engine.arithmetic == f"native, {native.supported()[0]}"
    monkeypatch.setattr(native, "supported", lambda: ["avx512_bf16", best])
    assert native.module(cache_type="float16").isa == best
    monkeypatch.setenv("LLAMA2_ISA", "avx512_bf16")
    with pytest.raises(EngineError, match="avx512_bf16 caches in bfloat16; for float16, unset LLAMA2_ISA"):
        native.module(cache_type="float16")


def test_type_checkers_know_every_setting() -> None:
    assert get_type_hints(RuntimeSettings) == get_type_hints(Runtime)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"thread": 2}, "thread: unknown setting; did you mean threads?"),
        ({"colour": 2}, "colour: unknown setting; there are engine, runner, "),
        ({"engine": "vllm", "runner": "torch"}, "vLLM has settings of its own"),
        ({"engine": "vllm", "cache_type": "float16"}, "cache_type are for our own engine"),
        ({"runner": "numpy", "cache_type": "float16"}, "cache_type is for the native runner; that of numpy is"),
        ({"cache_type": "int3"}, "cache_type='int3' must be auto or float16"),
        ({"engine": "other"}, "engine='other' must be llama2 or vllm"),
        ({"pipeline_parallel": 2}, 'need engine="vllm"'),
        ({"sequences": None}, "sequences=None must be a whole number"),
    ],
)
def test_settings_that_are_refused_before_a_file_is_opened(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as error:
        llama2.load("no such model", **settings)
    assert reason in str(error.value)


def test_whole_numbers_of_numpy_are_pythons() -> None:
    assert type(Runtime(threads=np.int64(3)).threads) is int  # type: ignore[arg-type]


def test_every_field_has_a_meaning() -> None:
    assert all(Runtime.meaning(field.name).endswith(".") for field in fields(Runtime))
