"""The seam between learning and using: a Checkpoint and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2 import records
from llama2.config import ModelConfig
from llama2.errors import CheckpointError, TokenizerError

if TYPE_CHECKING:
    from llama2.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor, still in its file's number format.

    `shape` is PyTorch's order, (rows, columns) or (n,). `source` is a read-only uint8 view of exactly the tensor's
    bytes in the mapped file if they stand there in Meta's order, else what makes a copy of them in that order.
    """

    name: str
    format: str  # "F32", "F16", "BF16", "Q8_0", "Q4_0", … as in quantize.FORMATS
    shape: tuple[int, ...]
    source: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes in Meta's order. Nothing is read before this; a copy is made each time, and not kept."""
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """How many bytes `data` has, without touching it."""
        from llama2.checkpoint import quantize

        return quantize.nbytes(self.format, self.shape)

    def dequantize(self) -> NDArray[np.float32]:
        """The tensor's values in float32, in `shape`."""
        from llama2.checkpoint import quantize

        return quantize.dequantize(self.data, self.format, self.shape)

    def in_float32(self) -> Tensor:
        """This tensor in F32, which is made whenever it is touched."""
        if self.format == "F32":
            return self
        return replace(self, format="F32", source=lambda: self.dequantize().view(np.uint8).reshape(-1))

    def in_format(self, format: str) -> Tensor:
        """This tensor in one of quantize.FORMATS, without importance; it is made whenever it is touched."""
        from llama2.checkpoint import quantize

        if format in ("F32", self.format):
            return self.in_float32() if format == "F32" else self
        return replace(self, format=format, source=lambda: quantize.quantize(self.dequantize(), format))


@dataclass
class Checkpoint:
    """A model on disk: configuration, tokenizer, named tensors, chat template and licence.

    `tensors` holds every name of `config.tensor_shapes()` and no other. `metadata` is what the file says of itself,
    for display. The tokenizer is built on first use.
    """

    path: Path
    format: str  # "gguf", "huggingface", "meta", "llama2c"
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    template: str | None = None  # Jinja source of the chat template
    licence: str | None = None
    name: str = ""
    _build_tokenizer: Any = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer. Raises TokenizerError when its vocabulary is damaged or unsupported."""
        with self.naming():
            tokenizer: Tokenizer = self._build_tokenizer()
        return tokenizer

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Whatever is wrong with the vocabulary, the message begins with the checkpoint's path, or a file's in it."""
        try:
            yield
        except TokenizerError as error:
            message = str(error)
            raise TokenizerError(message if message.startswith(str(self.path)) else f"{self.path}: {message}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_finite(self) -> None:
        """Raise CheckpointError when a weight is NaN or infinite. Reads every float and every block's scales once."""
        from llama2.checkpoint import quantize

        for tensor in self.tensors.values():
            if not quantize.is_finite(tensor.data, tensor.format):
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} holds weights that are not finite numbers; download it again"
                )

    def close(self) -> None:
        """Let go of the mapping. Views that are still in use keep their pages until they die."""
        self.tensors = {}


def open(path: str | Path, *, vocabulary: Path | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Open a model file or folder, whichever format it has. Raises CheckpointError with the reason when it cannot.

    `vocabulary` is where what was derived from the model's vocabulary is kept, so that the next start is quick.
    `tokenizer` is a file that replaces the model's own (`read_tokenizer`).
    """
    opened = _read(Path(path), vocabulary)
    if tokenizer is not None:
        opened._build_tokenizer = partial(read_tokenizer, tokenizer, opened.config.vocab_size)
    return opened


def _read(path: Path, vocabulary: Path | None) -> Checkpoint:
    from llama2.checkpoint import gguf

    path = _newest(path)
    if not gguf.matches(path):  # the other formats are imported when they are asked: a start must be quick
        from llama2.checkpoint import huggingface, llama2c, meta

        if huggingface.matches(path):
            return huggingface.read(path)
        if meta.matches(path):
            return meta.read(path)
        if llama2c.matches(path):
            return llama2c.read(path)
    return gguf.read(path, vocabulary)


def _newest(path: Path) -> Path:
    """The last model that a training run has saved, if the path is a run's; else the path."""
    saved = (path / records.CHECKPOINTS).glob(f"step-*[0-9]/{records.MODEL}")
    return max(saved, key=lambda model: int(model.parent.name.partition("-")[2]), default=path)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a file of its own: SentencePiece's `tokenizer.model`, or llama2.c's `tokenizer.bin`.

    Raises TokenizerError or CheckpointError when there is none, it is damaged, or it has not `vocab_size` tokens.
    """
    from llama2.checkpoint import llama2c
    from llama2.text import tokenizer as tokenizers

    if not path.is_file():
        raise TokenizerError(f"no tokenizer in {path}; give its file with --tokenizer")
    if llama2c.is_tokenizer(path):
        tokenizer = llama2c.read_tokenizer(path, vocab_size)
    else:
        tokenizer = tokenizers.from_sentencepiece(path)
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"{path}: has {tokenizer.vocab_size} tokens, and the model {vocab_size}; give the model's own tokenizer"
        )
    return tokenizer
