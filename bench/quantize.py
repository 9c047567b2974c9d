"""`llama2 quantize` beside llama.cpp's llama-quantize: time, peak memory, size, and the error of each tensor.

SRC is a GGUF file in F32, F16 or BF16, or a Hugging Face folder. For a folder llama.cpp's way has two steps, its
convert_hf_to_gguf.py and then llama-quantize, and both count. One JSON object on stdout.

    python bench/quantize.py SRC --peers peers --format Q4_K_M > quantize.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import rounds as measuring
from numpy.typing import NDArray
from provenance import provenance
from rounds import Figures, MeasurementError

from llama2 import checkpoint
from llama2.checkpoint import quantization

#: Rows of a tensor that are compared at once, to bound the memory of their float32 copies.
ROWS = 256
#: Where the peers' folder has llama.cpp's scripts.
SOURCES = Path("llama_cpp_python-0.3.36/vendor/llama.cpp")

Way = Callable[[], Figures]


def errors(source: Path, outputs: Mapping[str, Path], wanted: int) -> dict[str, dict[str, float]]:
    """Of every matrix √(Σ (x − y)² / Σ x²), of what is read back from the files, over `wanted` rows or a few more.

    These are runs of ROWS, evenly apart.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in outputs}
    with ExitStack() as stack:
        before = stack.enter_context(checkpoint.open(source)).tensors
        after = {name: stack.enter_context(checkpoint.open(path)).tensors for name, path in outputs.items()}
        for matrix, tensor in before.items():
            if len(tensor.shape) != 2:
                continue
            rows, columns = tensor.shape
            data = tensor.data.reshape(rows, -1)
            runs = min(-(-rows // ROWS), -(-wanted // ROWS))
            total, lost = 0.0, dict.fromkeys(outputs, 0.0)
            for run in range(runs):
                some = slice(start := run * max(rows - ROWS, 0) // max(runs - 1, 1), min(start + ROWS, rows))
                x = floats(data[some], tensor.format, columns)
                total += float((x.astype(float) ** 2).sum())
                for name in outputs:
                    y = after[name][matrix]
                    off = x.astype(float) - floats(y.data.reshape(rows, -1)[some], y.format, columns)
                    lost[name] += float((off**2).sum())
            for name in outputs:
                found[name][matrix] = math.sqrt(lost[name] / total) if total else lost[name]
            for file in {file for each in (tensor, *(after[name][matrix] for name in outputs)) for file in each.mapped}:
                file.release_pages()
    return found


def floats(data: NDArray[np.uint8], format: str, columns: int) -> NDArray[np.float32]:
    """Rows (n, bytes of a row) in float32."""
    return quantization.dequantize(np.ascontiguousarray(data).reshape(-1), format, (len(data), columns))


def programs(source: Path, peers: Path | None, folder: Path, format: str, threads: int) -> dict[str, Way]:
    """Each program's way from `source` to a quantised file in `folder`, named after the program."""

    def timed(steps: Mapping[str, tuple[list[str], dict[str, str]]]) -> Figures:
        figures: Figures = {"seconds": 0.0, "peak MiB": 0.0, "anonymous MiB": 0.0}
        for name, (command, environment) in steps.items():
            os.sync()  # or a program would wait for what another one wrote
            start = time.perf_counter()
            run = measuring.run(["/bin/sh", "-c", 'echo; exec "$@"', "sh", *command], environment)  # wants output
            figures[f"{name} seconds"] = time.perf_counter() - start
            figures["seconds"] += figures[f"{name} seconds"]
            figures["peak MiB"] = max(figures["peak MiB"], run.peak)
            figures["anonymous MiB"] = max(figures["anonymous MiB"], run.anonymous)
        return figures

    def ours() -> Figures:
        words = ["quantize", str(source), str(folder / "llama2.gguf"), "--format", format, "--report", "none"]
        words += ["--force", "--threads", str(threads)]
        return timed({"quantize": ([sys.executable, "-m", "llama2", *words], {})})

    def theirs(peers: Path) -> Figures:
        steps = {}
        wide = source
        if source.is_dir():
            wide = folder / "wide.gguf"
            script = peers / SOURCES / "convert_hf_to_gguf.py"
            environment = {"PYTHONPATH": str(peers / SOURCES / "gguf-py"), "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, str(script), str(source), "--outfile", str(wide), "--outtype", "auto"]
            steps["convert"] = (command, environment)
        tool = peers / "llama.cpp" / "bin" / "llama-quantize"
        steps["quantize"] = ([str(tool), str(wide), str(folder / "llama.cpp.gguf"), format, str(threads)], {})
        return timed(steps)

    return {"llama2": ours} | ({} if peers is None else {"llama.cpp": partial(theirs, peers)})


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="a GGUF file of floats, or a Hugging Face folder")
    parser.add_argument("--peers", type=Path, help="what bench/peers.sh made (default: measure llama2 alone)")
    parser.add_argument("--only", choices=("llama2", "llama.cpp"), help="measure one program, not all")
    parser.add_argument("--format", default="Q4_K_M", help="of the output (default Q4_K_M)")
    parser.add_argument("--threads", type=int, default=2, help="of both programs (default 2)")
    parser.add_argument("--pairs", type=int, default=3, help="rounds that must count (default 3; 0 compares errors)")
    parser.add_argument("--real", type=float, default=0.9, help="share of the cores that must be real (default 0.9)")
    parser.add_argument("--rows", type=int, default=1 << 62, help="rows of each matrix to compare (default all)")
    parser.add_argument("--keep", type=Path, help="folder for what is written, and stays (default: a temporary one)")
    options = parser.parse_args()
    peers = options.peers and options.peers.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        done: list[measuring.Round] = []
        ways = programs(options.source.resolve(), peers, folder, options.format, options.threads)
        ways = {name: way for name, way in ways.items() if options.only in (None, name)}
        try:
            measuring.add_rounds(done, ways, wanted=options.pairs, threads=options.threads, real=options.real)
        except MeasurementError as error:
            raise SystemExit(str(error)) from error
        files = {name: folder / f"{name}.gguf" for name in ways}
        lost = errors(options.source, files, options.rows) if options.rows else {}
        sizes = {name: file.stat().st_size for name, file in files.items()}
    counting = [one.figures for one in done if one.counts]
    figures = {
        "source": options.source.name,
        "format": options.format,
        "threads": options.threads,
        "medians": {
            name: {key: median(one[name][key] for one in counting) for key in counting[0][name]}
            for name in ways
            if counting
        },
        "bytes": sizes,
        "errors": lost,
        "rounds": [asdict(one) for one in done],
    }
    if counting and len(ways) == 2:
        figures["times_faster"] = median(one["llama.cpp"]["seconds"] / one["llama2"]["seconds"] for one in counting)
    if len(lost) == 2:
        ratios = [lost["llama2"][name] / other for name, other in lost["llama.cpp"].items() if other]
        figures |= {"error_ratio_worst": max(ratios), "error_ratio_mean": sum(ratios) / len(ratios)} if ratios else {}
    json.dump({**provenance(), **figures}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
