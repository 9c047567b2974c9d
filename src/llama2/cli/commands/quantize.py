"""`llama2 quantize`: a model in fewer bits, and what it lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from llama2.cli.local_models import FileOptions, Name, local_path
from llama2.cli.options import Json, Threads, read_text
from llama2.cli.output import one_line, size, warn
from llama2.cli.signals import exit_on_signals
from llama2.console import data, say
from llama2.engine.runtime import Runtime
from llama2.speed import Workload, decode, prefill

if TYPE_CHECKING:
    from llama2.engine.engine import Engine

EXAMPLE = "Example: llama2 quantize org/model model-Q4_K_M.gguf --format Q4_K_M --calibrate text.txt"
_PROMPT, _ANSWER = 256, 32  # tokens that the speed is measured with


@dataclass(frozen=True)
class ImportanceOptions:
    """Where the importance matrix comes from."""

    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix: llama.cpp's GGUF or .dat, or a saved one.")
    ] = None
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="A text file to make an importance matrix of.")
    ] = None
    save_imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save that matrix, as GGUF that llama.cpp reads too.")
    ] = None

    def __post_init__(self) -> None:
        if self.imatrix is not None and self.calibrate is not None:
            raise typer.BadParameter("--imatrix and --calibrate exclude each other; give one")
        if self.save_imatrix is not None and self.calibrate is None:
            raise typer.BadParameter("--save-imatrix saves what --calibrate makes; give that too")

    def matrix(self, path: Path, files: dict[str, Any], threads: int | None) -> Any:
        """The importance matrix for the model at `path`, or None."""
        from llama2.checkpoint import gguf_writer, imatrix
        from llama2.checkpoint import open as open_checkpoint
        from llama2.convert import quantize as quantizing

        if self.imatrix is not None:
            with open_checkpoint(path, adapters=files["adapters"]) as model:
                return imatrix.read(self.imatrix, model.config)
        if self.calibrate is None:
            return None
        sums = quantizing.calibrate(path, read_text(self.calibrate), **files, threads=threads)
        if self.save_imatrix is not None:
            with open_checkpoint(path, adapters=files["adapters"]) as model:
                gguf_writer.write_imatrix(sums, model.config, self.calibrate.name, self.save_imatrix)
        return quantizing.means(sums)


@dataclass(frozen=True)
class ReportOptions:
    """How the output is compared with the source."""

    report: Annotated[
        Literal["full", "none"], typer.Option(help="full runs both models and compares them; none only writes.")
    ] = "full"
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to compare on.", show_default="one that comes with it")
    ] = None
    positions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Predictions to compare at most; each keeps a row of logits.")
    ] = 1024


def command(  # 9 parameters: one for each option, or group of them
    *,
    source: Name,
    target: Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file to write.")],
    format: Annotated[str, typer.Option("--format", "-f", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, ...")] = "Q4_K_M",
    importance: ImportanceOptions,
    files: FileOptions,
    threads: Threads = None,
    report: ReportOptions,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model in fewer bits, as GGUF.

    The relative error of a tensor is the root of sum((x - y)^2) / sum(x^2), x its weights and y what was written.

    The full report compares both models on a text: perplexity, KL(source || output) per token in nats, and how often
    both put the same token first. It also measures the speed of both.
    """
    from llama2.convert import quantize as quantizing
    from llama2.convert import staging

    format = format.upper()
    if format not in quantizing.FORMATS:
        raise typer.BadParameter(f"--format {format} is not one of {', '.join(quantizing.FORMATS)}")
    path, opened = local_path(source), files.arguments()
    if importance.calibrate is not None:
        staging.check(path, target, force)  # before a long calculation
    matrix = importance.matrix(path, opened, threads)
    with exit_on_signals():
        written = quantizing.quantize(path, target, format, importance=matrix, **opened, threads=threads, force=force)
    if written.requantized:
        warn(f"{source} was quantized already, so its matrices lost twice; quantize from F16 or BF16 if you can")
    receipt: dict[str, Any] = {
        "source": source,
        "path": str(target),
        "format": format,
        "parameters": written.parameters,
        "bytes": written.bytes,
        "source_bytes": written.source_bytes,
        "bits_per_weight": written.bits_per_weight,
        "importance": None if matrix is None else str(importance.imatrix or importance.calibrate),
        "without_importance": [] if matrix is None else sorted(set(written.errors) - set(matrix)),
        "tensor_formats": written.tensor_formats,
        "errors": written.errors,
    }
    if report.report == "full":
        text = None if report.text is None else read_text(report.text)
        compared = quantizing.compare(path, target, text, **opened, positions=report.positions, threads=threads)
        given = {"tokenizer": files.tokenizer, "tokenizer_mode": files.tokenizer_mode, "adapter": files.adapter or ()}
        speeds = {"source": _speed(path, threads, **given), "output": _speed(target, threads)}
        receipt |= {"agreement": compared.summary(), "speed": speeds}
    data(json.dumps(receipt)) if as_json else say("\n".join(_table(receipt)))


def _speed(path: Path, threads: int | None, **options: Any) -> dict[str, float]:
    """Tokens a second, after a short run to wake the processor."""
    from llama2 import api

    context = _PROMPT + _ANSWER
    with api.load(path, Runtime(threads=threads), **options) as model:
        context = min(context, model.config.context_length)
        work = Workload(prompt=max(1, context - _ANSWER), generate=max(1, min(_ANSWER, context - 2)))
        checkpoint, engine = model.checkpoint, cast("Engine", model.engine)
        prefill(checkpoint, engine, work)
        return {
            "prefill_tokens_per_second": prefill(checkpoint, engine, work),
            "decode_tokens_per_second": decode(checkpoint, engine, work),
        }


def _table(receipt: dict[str, Any]) -> list[str]:
    from collections import Counter

    errors = receipt["errors"]
    worst = max(errors, key=lambda name: errors[name])
    mixed = ", ".join(f"{name} × {count}" for name, count in Counter(receipt["tensor_formats"].values()).most_common())
    rows = {
        "path": f"{receipt['path']} in {receipt['format']}",
        "size": f"{size(receipt['bytes'])}, {receipt['bits_per_weight']:.2f} bits a weight; "
        f"{size(receipt['source_bytes'])} before",
        "formats": mixed,
        "importance": receipt["importance"] or "every column alike",
        "error": f"{sum(errors.values()) / len(errors):.4f} on average, at most {errors[worst]:.4f} ({worst})",
    }
    if receipt["without_importance"]:
        rows["importance"] += f", but not of {', '.join(receipt['without_importance'][:3])}"
    if "agreement" in receipt:
        a, s = receipt["agreement"], receipt["speed"]
        rows |= {
            "perplexity": f"{a['perplexity']:.3f}, source {a['reference_perplexity']:.3f} "
            f"({a['perplexity_change']:+.2%}), over {a['positions']:,} positions",
            "KL divergence": f"{a['kl_mean']:.5f} nats a token, at most {a['kl_max']:.3f}",
            "same token": f"first in {a['top1_agreement']:.2%} of the positions",
        }
        for what in ("prefill", "decode"):
            ours, theirs = (s[model][f"{what}_tokens_per_second"] for model in ("output", "source"))
            rows[what] = f"{ours:,.1f} tokens/s, source {theirs:,.1f}"
    return [f"{title:14} {one_line(value)}" for title, value in rows.items()]
