"""The Runner in C++ (native/model.h): quantized weights packed for the processor, key/value cache in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from llama2 import native
from llama2.checkpoint import Checkpoint, Tensor
from llama2.config import ModelConfig
from llama2.ending import EndsInSection
from llama2.engine import packed
from llama2.engine.runner import BLOCK, Batch, cache_too_large
from llama2.errors import EngineError
from llama2.formats import FLOATS


class NativeRunner(EndsInSection):
    """Runs a checkpoint on the CPU, for one caller at a time. The same tokens give the same bits, whatever else runs.

    `n_blocks` blocks of BLOCK tokens are reserved for the cache; memory is taken as they are first written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        n_blocks: int,
        *,
        threads: int | None = None,
        isa: str | None = None,
        cache_type: native.CacheType = "auto",
    ) -> None:
        c = checkpoint.config
        module = native.module(isa, cache_type=cache_type)
        self._allocate(c, n_blocks, threads, module)
        for tensor in checkpoint.tensors.values():
            if len(tensor.shape) == 1 and not tensor.name.endswith(".bias"):
                self._set(tensor, _in_float32(tensor), format="F32")
        checkpoint.release_pages()  # Linux may map megabytes of the file around each
        matrices = packed.pack(checkpoint, module)
        for tensor in checkpoint.tensors.values():
            tied = c.tied_embeddings and tensor.name == "tok_embeddings.weight"  # then read from the output head
            packs = matrices.get(tensor.name)
            if len(tensor.shape) == 2:
                self._set(tensor, tensor.data if packs is None else packs, "output.weight" if tied else tensor.name)
            elif tensor.name.endswith(".bias"):  # after its matrix, as in `tensor_shapes`
                self._set(tensor, _in_float32(tensor), format="F32")
        self._model.check()

    def _allocate(self, c: ModelConfig, n_blocks: int, threads: int | None, module: ModuleType) -> None:
        """Make the model, still without weights, and its cache."""
        self.config, self.n_blocks = c, n_blocks
        self.arithmetic = f"native, {module.isa}"
        if module.block != BLOCK:
            raise EngineError("the native extension is of another version; reinstall with `pip install whole-llama`")
        shape = (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, c.vocab_size, c.head_dim, c.context_length)
        rope = (c.inverse_frequencies(), c.attention_factor(), c.dynamic_growth() or (1.0, 0))
        window = c.sliding_window or c.context_length
        threads = threads or native.default_threads()
        try:
            self._model = module.Model(*shape, c.tied_embeddings, c.norm_eps, *rope, window, threads, n_blocks)
        except MemoryError:
            raise cache_too_large(n_blocks) from None

    def _set(
        self, tensor: Tensor, data: NDArray[np.uint8], name: str | None = None, *, format: str | None = None
    ) -> None:
        rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
        self._model.set(name or tensor.name, format or tensor.format, data, rows, columns)

    def forward(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Write keys and values of every token into its block, and return the logits of `outputs`: (M, V)."""
        logits = np.empty((len(batch.outputs), self.config.vocab_size), np.float32)
        arrays = (batch.tokens, batch.positions, batch.sequences, batch.blocks, batch.outputs)
        self._model.forward(*arrays, logits, hidden)
        return logits

    def activation_statistics(self) -> dict[str, NDArray[np.float64]]:
        """Sums of the squares of each column's inputs, (columns,) by matrix, to which every later `forward` adds."""
        c, sums = self.config, {}
        query = c.n_heads * c.head_dim
        all = np.zeros(c.n_layers * (2 * c.dim + query + c.hidden_dim) + c.dim)
        self._model.collect_statistics(all)
        products = {
            "attention.wq": c.dim,
            "attention.wo": query,
            "feed_forward.w1": c.dim,
            "feed_forward.w2": c.hidden_dim,
        }
        same = {"attention.wq": ["attention.wk", "attention.wv"], "feed_forward.w1": ["feed_forward.w3"]}
        at = 0
        for layer in range(c.n_layers):
            for matrix, columns in products.items():
                for name in [matrix, *same.get(matrix, [])]:
                    sums[f"layers.{layer}.{name}.weight"] = all[at : at + columns]
                at += columns
        sums["tok_embeddings.weight" if c.tied_embeddings else "output.weight"] = all[at:]
        return sums


class LiveNativeRunner(NativeRunner):
    """Runs a network's own weights where they lie in memory, while somebody else changes them between steps.

    `weights` returns every tensor of `config.tensor_shapes()`, in F32, F16 or BF16, with rows of wq and wk in Meta's
    interleaved order: `Transformer.tensors`, for example. Matrices are read in place; norms and biases of 16 bits are
    copied to float32. Nothing is packed, checked for NaN or written to disk.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[], Mapping[str, Tensor]],
        n_blocks: int,
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        """Raises EngineError for a tensor that is missing, unknown, or of another shape or format."""
        self._allocate(config, n_blocks, threads, native.module(isa))
        self._weights = weights
        self.weights_changed()

    def weights_changed(self) -> None:
        """Run what `weights` returns now; the memory of what it returned before may be released. Raises as above."""
        shapes, tensors = self.config.tensor_shapes(), self._weights()
        if wrong := sorted(shapes.keys() ^ tensors.keys()):
            raise EngineError(f"tensor {wrong[0]} is {'missing' if wrong[0] in shapes else 'not of this network'}")
        for name, shape in shapes.items():  # a bias after its matrix
            tensor = tensors[name]
            if tensor.shape != shape or tensor.format not in FLOATS:
                raise EngineError(
                    f"tensor {name} is {tensor.shape} in {tensor.format}; the network needs {shape} in "
                    f"{', '.join(FLOATS)}"
                )
            if len(shape) == 2:
                tied = self.config.tied_embeddings and name == "tok_embeddings.weight"  # then read from the output head
                self._set(tensor, tensor.data, "output.weight" if tied else name)
            else:
                self._set(tensor, tensor.data if tensor.format == "F32" else _in_float32(tensor), format="F32")
        self._model.check()


def _in_float32(tensor: Tensor) -> NDArray[np.uint8]:
    """A copy of a norm's or a bias's numbers."""
    return tensor.dequantize().astype(np.float32).view(np.uint8)
