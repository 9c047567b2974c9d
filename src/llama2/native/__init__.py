"""The C++ half: one extension module for each instruction set, of which the best that this processor runs is used.

`LLAMA2_ISA` (avx512_bf16, avx512_vnni, avx2, neon_dotprod or plain) forces one. Results of one instruction set are
bitwise reproducible; those of two agree within rounding.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

from llama2.errors import EngineError
from llama2.machine import processors

CacheType = Literal["auto", "float16"]
#: Instruction sets that cache keys and values in bfloat16 (decision 7).
_CACHES_BFLOAT16 = ("avx512_bf16",)


def supported() -> list[str]:
    """Instruction sets that this machine runs and this build has, best first."""
    try:
        cpu = import_module("llama2.native._cpu")
    except ImportError as error:
        raise EngineError(f"the native extension is missing ({error}); reinstall it: pip install whole-llama") from None
    names: list[str] = cpu.supported()
    return names


@cache
def _load(isa: str) -> ModuleType:
    return import_module(f"llama2.native._native_{isa}")


def module(isa: str | None = None, *, cache_type: CacheType = "auto") -> ModuleType:
    """The extension module for `isa`, by default `LLAMA2_ISA`, or the best one with this type of cache.

    Raises EngineError for one that cannot run, or whose cache is of another type.
    """
    names = supported()
    isa = isa or os.environ.get("LLAMA2_ISA")
    if isa and isa not in names:
        raise EngineError(f"instruction set {isa!r} does not run here; LLAMA2_ISA may be one of {', '.join(names)}")
    if cache_type == "float16":
        if isa in _CACHES_BFLOAT16:
            raise EngineError(f"instruction set {isa} caches in bfloat16; for float16, unset LLAMA2_ISA")
        names = [name for name in names if name not in _CACHES_BFLOAT16]
    isa = isa or names[0]
    return _load(isa)


def default_threads() -> int:
    """Processors this process may use (`machine.processors`); `LLAMA2_THREADS` overrides."""
    forced = os.environ.get("LLAMA2_THREADS")
    if forced:
        try:
            threads = int(forced)
        except ValueError:
            threads = 0
        if not 1 <= threads <= 1024:
            raise EngineError(f"LLAMA2_THREADS={forced!r} must be a number from 1 to 1024")
        return threads
    return processors()
