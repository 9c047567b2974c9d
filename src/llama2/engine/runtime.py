"""How a model runs: `Runtime`, its settings, and `start`, which makes the engine that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict, get_type_hints

from llama2.engine.request import flag, index, shown, whole
from llama2.errors import ContextError, EngineError, RequestError
from llama2.native import CacheType

if TYPE_CHECKING:
    from llama2.checkpoint import Checkpoint
    from llama2.engine.protocol import EngineProtocol
    from llama2.engine.runner import Runner

_BOUNDS = (("sequences", 1, 1 << 30), ("cache_bytes", 0, 1 << 62), ("threads", 1, 1024))


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How a model runs. Raises RequestError for values out of range, or that exclude each other."""

    engine: Annotated[
        Literal["llama2", "vllm"], "The engine: our own, or vLLM, which divides a model among GPUs and machines."
    ] = "llama2"
    runner: Annotated[
        Literal["native", "numpy", "torch"],
        "Backend: native code, NumPy, or PyTorch, on a GPU if there is one.",
    ] = "native"
    compile: Annotated[bool, "Compile the torch runner's network: slow at first, then faster."] = False
    threads: Annotated[int | None, "Threads that compute."] = None  # None: every core
    context: Annotated[int | None, "Tokens of prompt and answer together."] = None  # None: the model's own
    sequences: Annotated[int, "Requests of the whole context that the cache holds; it holds more shorter ones."] = 1
    cache_type: Annotated[
        CacheType,
        "Numbers in the cache of the native runner: what runs fastest here, or float16, which is nearer to float32 "
        "than the bfloat16 of some processors.",
    ] = "auto"
    cache_bytes: Annotated[int | None, "Bytes of the cache at most; one whole context fits in any case."] = None
    tensor_parallel: Annotated[int, "With vLLM: processes that share each layer."] = 1
    pipeline_parallel: Annotated[int, "With vLLM: groups of processes that share the layers."] = 1

    def __post_init__(self) -> None:
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is not None or name == "sequences":
                object.__setattr__(self, name, whole(name, value, low, high))
        flag("compile", self.compile)
        if self.engine not in ("llama2", "vllm"):
            raise RequestError(f"engine={shown(self.engine)} must be llama2 or vllm")
        if self.runner not in ("native", "numpy", "torch"):
            raise RequestError(f"runner={shown(self.runner)} must be native, numpy or torch")
        if self.cache_type not in ("auto", "float16"):
            raise RequestError(f"cache_type={shown(self.cache_type)} must be auto or float16")
        if self.engine == "vllm":
            if self.runner != "native" or self.compile or self.threads is not None or self.cache_type != "auto":
                raise RequestError(
                    "runner, compile, threads and cache_type are for our own engine; vLLM has settings of its own"
                )
            return
        if (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            raise RequestError('tensor_parallel and pipeline_parallel need engine="vllm"')
        if self.compile and self.runner != "torch":
            raise RequestError(f"compile is for the torch runner, not for {self.runner}; choose that, or leave it out")
        if self.threads is not None and self.runner != "native":
            raise RequestError(
                f"threads: the {self.runner} runner leaves them to its library; set OMP_NUM_THREADS instead"
            )
        if self.cache_type != "auto" and self.runner != "native":
            raise RequestError(f"cache_type is for the native runner; that of {self.runner} is of its weights' type")

    @classmethod
    def meaning(cls, field: str) -> str:
        """What a field means, in a sentence."""
        meaning: str = get_type_hints(cls, include_extras=True)[field].__metadata__[0]
        return meaning


class RuntimeSettings(TypedDict, total=False):
    """The fields of `Runtime` as keyword arguments, for editors and type checkers."""

    engine: Literal["llama2", "vllm"]
    runner: Literal["native", "numpy", "torch"]
    compile: bool
    threads: int | None
    context: int | None
    sequences: int
    cache_type: CacheType
    cache_bytes: int | None
    tensor_parallel: int
    pipeline_parallel: int


def start(checkpoint: Checkpoint, runtime: Runtime) -> EngineProtocol:
    """The engine of a model. Under torchrun, with the torch runner, this returns in the first process alone.

    Raises ContextError for a context beyond the model's, and EngineError where a library is missing or does not start.
    """
    longest = checkpoint.config.context_length
    context = longest if runtime.context is None else index(runtime.context)
    if context is None or not 1 <= context <= longest:
        raise ContextError(
            f"context={shown(runtime.context)} must be from 1 to {longest}, which this model was made for"
        )
    if runtime.engine == "vllm":
        return _vllm(checkpoint, runtime, context)
    from llama2.checkpoint import SCORE_HEAD
    from llama2.engine.engine import Engine
    from llama2.engine.runner import BLOCK
    from llama2.engine.scheduler import blocks_for

    least = blocks_for(context)  # of one request
    blocks = runtime.sequences * least
    if runtime.cache_bytes is not None:
        blocks = min(blocks, max(least, runtime.cache_bytes // checkpoint.config.cache_bytes(BLOCK)))
    generates = SCORE_HEAD not in checkpoint.extras
    return Engine(_runner(checkpoint, runtime, blocks), checkpoint.tokenizer, context=context, generates=generates)


def _vllm(checkpoint: Checkpoint, runtime: Runtime, context: int) -> EngineProtocol:
    if checkpoint.adapters:
        raise EngineError(
            "vLLM reads the base's own files; write the merged model first, with `llama2 convert BASE FOLDER "
            "--to hf --adapter DIR`, and give that"
        )
    from llama2.engine.cluster import ClusterEngine

    return ClusterEngine(
        checkpoint,
        context=context,
        sequences=runtime.sequences,
        cache_bytes=runtime.cache_bytes,
        tensor_parallel=runtime.tensor_parallel,
        pipeline_parallel=runtime.pipeline_parallel,
    )


def _runner(checkpoint: Checkpoint, runtime: Runtime, blocks: int) -> Runner:
    if runtime.runner == "native":
        from llama2.engine.runner_native import NativeRunner

        return NativeRunner(checkpoint, blocks, threads=runtime.threads, cache_type=runtime.cache_type)
    if runtime.runner == "numpy":
        from llama2.engine.runner_numpy import NumpyRunner

        return NumpyRunner(checkpoint, blocks)
    try:
        from llama2.engine.runner_torch import start as start_torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise EngineError(
            "the torch runner needs PyTorch, which is not installed; `pip install 'whole-llama[train]'` brings it"
        ) from None
    return start_torch(checkpoint, blocks, compile=runtime.compile)
