"""A model in fewer bits, as GGUF: written tensor by tensor, and compared with its source on a text.

With an importance matrix, columns with strong inputs count more in the error of a quantized matrix. The error of its
output is Σ (Δw · x)². Over inputs that do not depend on one another, its expectation is Σ Δw² · E x².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2 import checkpoint, files, plan
from llama2.checkpoint import Checkpoint, Tensor, gguf_writer
from llama2.checkpoint.quantization import requantize
from llama2.convert.staging import carry_terms, check_room, staged
from llama2.engine import divergence
from llama2.engine.divergence import DivergenceReport
from llama2.engine.runner_native import NativeRunner
from llama2.engine.scheduler import blocks_for
from llama2.errors import CheckpointError, Llama2Error
from llama2.formats import FORMATS as NUMBER_FORMATS
from llama2.hub.progress import Progress, reporting
from llama2.text.tokenizer import Mode

Importance = Mapping[str, NDArray[np.float32]]  # (columns,) of a matrix, by Meta's name

#: Formats of files that can be requested.
FORMATS = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K", "BF16", "F16", "F32")

#: What every column counts at least, as a share of the mean: a text may leave inputs out that another has.
_LEAST = 1e-3

#: Tokens of a window, of a calibration text at most, and positions that are compared unless asked otherwise. Each of
#: those keeps V float32 logits of the source in memory: 1,024 of them are 131 MB where V is 32,000.
WINDOW = gguf_writer.IMATRIX_CHUNK
CALIBRATION = 1 << 16
POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was written."""

    path: Path
    format: str
    parameters: int
    bytes: int
    source_bytes: int  # of the source's tensors
    tensor_formats: dict[str, str]  # by Meta's name
    errors: dict[str, float]  # of every matrix: the root of Σ (x − y)² / Σ x²
    requantized: int  # matrices that were quantized already, and so have lost twice

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file."""
        return 8 * self.bytes / self.parameters


# 10 parameters: the program's public interface, one for each option of `llama2 quantize`
def quantize(
    source: str | Path,
    target: str | Path,
    format: str = "Q4_K_M",
    *,
    importance: Importance | None = None,
    tokenizer: str | Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write the model at `source`, in any format that can be opened, to the GGUF file `target`.

    `format` is one of FORMATS; each matrix has the number format of `plan.tensor_formats`. `importance` is what
    `imatrix.read` or `calibrate` returns. `tokenizer_mode` decides what is written of spaces in front of text, and
    `adapters` are merged in before, as `checkpoint.open` does. One tensor is in memory at a time. Files with the
    licence and its like are beside `target`, as those of `convert` do. Nothing is left when something goes wrong.
    Raises CheckpointError when `target` is there, without `force`, or when a weight is not finite. The reader and the
    writer raise theirs.
    """
    source, target = files.named(Path(source)), files.named(Path(target))
    if format not in FORMATS:
        raise CheckpointError(f"{format} is not a format of a file; choose one of {', '.join(FORMATS)}")
    own = None if tokenizer is None else Path(tokenizer)
    with (
        reporting(progress) as report,
        checkpoint.open(source, tokenizer=own, tokenizer_mode=tokenizer_mode, adapters=adapters) as model,
        staged(source, target, force=force) as stage,
    ):
        planned, shapes = plan.tensor_formats(model.config, format), model.config.tensor_shapes()
        chosen = {name: planned[name] if len(shape) == 2 else "F32" for name, shape in shapes.items()}
        check_room(stage, model, chosen)
        errors: dict[str, float] = {}
        quantized = _quantized(model, chosen, importance or {}, errors, threads=threads, report=report)
        gguf_writer.write(quantized, stage / target.name)
        carry_terms(source, model, stage / target.name)
        parameters, before = model.config.parameters(), model.tensors.values()
        source_bytes = sum(tensor.nbytes for tensor in before)
        requantized = sum(NUMBER_FORMATS[tensor.format].block > 1 for tensor in before)
    return Quantized(
        path=target,
        format=format,
        parameters=parameters,
        bytes=target.stat().st_size,
        source_bytes=source_bytes,
        tensor_formats=chosen,
        errors=errors,
        requantized=requantized,
    )


def _quantized(
    model: Checkpoint,
    chosen: Mapping[str, str],
    importance: Importance,
    errors: dict[str, float],
    *,
    threads: int | None,
    report: Progress,
) -> Checkpoint:
    """The model with tensors in the `chosen` formats, each made when it is touched; `errors` gets those of matrices."""
    total, done = sum(tensor.nbytes for tensor in model.tensors.values()), 0

    def make(tensor: Tensor, format: str) -> NDArray[np.uint8]:
        nonlocal done
        weights = _weights(importance.get(tensor.name))
        data, error = requantize(tensor.data, tensor.format, tensor.shape, format, weights, threads=threads)
        model.release_pages()
        if not math.isfinite(error):
            raise CheckpointError(
                f"{model.path}: tensor {tensor.name!r} has weights that are not finite numbers, or not in {format}; "
                "download it again, or choose another format"
            )
        if len(tensor.shape) == 2:
            errors[tensor.name] = error
        done += tensor.nbytes
        report("quantizing", done, total)
        return data

    tensors = {
        name: replace(tensor, format=chosen[name], source=partial(make, tensor, chosen[name]))
        for name, tensor in model.tensors.items()
    }
    return replace(model, tensors=tensors)


def _weights(importance: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """What each column counts; None where nothing is known, and all are alike."""
    mean = 0.0 if importance is None else float(importance.mean(dtype=np.float64))
    return None if importance is None or not mean > 0 else (importance / mean + _LEAST).astype(np.float32)


def calibrate(
    source: str | Path,
    text: str,
    *,
    tokenizer: str | Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[NDArray[np.float64], int]]:
    """Run `text` through the model: of every matrix, the sums of squares of each column's inputs, and of how many.

    The text is cut into windows of 512 tokens that start afresh; the first 65,536 tokens count. Raises Llama2Error when
    the text has less than one window.
    """
    own = None if tokenizer is None else Path(tokenizer)
    with (
        reporting(progress) as report,
        checkpoint.open(source, tokenizer=own, tokenizer_mode=tokenizer_mode, adapters=adapters) as model,
    ):
        width = min(WINDOW, model.config.context_length)
        windows = list(divergence.windows(text, model.tokenizer, width, CALIBRATION))
        if not windows or len(windows[0]) < width:
            raise Llama2Error(f"the calibration text has less than {width} tokens; give a longer one")
        runner = NativeRunner(model, blocks_for(width), threads=threads)
        sums = runner.activation_statistics()
        for i, tokens in enumerate(windows):
            divergence.logits(runner, tokens)
            report("calibrating", i + 1, len(windows))
        count = sum(map(len, windows))
        head = "tok_embeddings.weight" if model.config.tied_embeddings else "output.weight"
        return {name: (values, count - len(windows) if name == head else count) for name, values in sums.items()}


def means(sums: Mapping[str, tuple[NDArray[np.float64], int]]) -> dict[str, NDArray[np.float32]]:
    """The importance that `calibrate`'s sums make, as it is read back from a file of them."""
    return {name: values.astype(np.float32) / np.float32(count) for name, (values, count) in sums.items()}


def compare(
    source: str | Path,
    target: str | Path,
    text: str | None = None,
    *,
    tokenizer: str | Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    positions: int = POSITIONS,
    threads: int | None = None,
) -> DivergenceReport:
    """How the model at `target` agrees with the one at `source`, of the same tokenizer, on a text.

    `text` is by default one that comes with the program. One model is in memory at a time, and V float32 logits of the
    source for each of at most `positions` predictions. Raises Llama2Error for a text without any.
    """
    if text is None:
        text = resources.files("llama2.convert").joinpath("quantize_text.txt").read_text("utf-8")
    own = None if tokenizer is None else Path(tokenizer)
    with checkpoint.open(source, tokenizer=own, tokenizer_mode=tokenizer_mode, adapters=adapters) as model:
        width = min(WINDOW, model.config.context_length)
        windows = list(divergence.windows(text, model.tokenizer, width, positions))
        if not windows:
            raise Llama2Error("the text has no two tokens, so that nothing can be predicted; give a longer one")
        reference = _logits(model, windows, threads)
    with checkpoint.open(target) as model:
        runner = _runner(model, windows, threads)
        parts = [
            divergence.compare(divergence.logits(runner, tokens), rows, tokens[1:])
            for tokens, rows in zip(windows, reference, strict=True)
        ]
    return DivergenceReport.join(parts)


def _runner(model: Checkpoint, windows: list[NDArray[np.int32]], threads: int | None) -> NativeRunner:
    return NativeRunner(model, blocks_for(max(map(len, windows))), threads=threads)


def _logits(model: Checkpoint, windows: list[NDArray[np.int32]], threads: int | None) -> list[NDArray[np.float32]]:
    runner = _runner(model, windows, threads)
    return [divergence.logits(runner, tokens) for tokens in windows]
