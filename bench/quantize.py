"""`llama2 quantize` beside llama.cpp's llama-quantize: time, peak memory, size, and the error of each tensor.

SRC is a GGUF file in F32, F16 or BF16, or a Hugging Face folder. For a folder llama.cpp's way has two steps, its
convert_hf_to_gguf.py and then llama-quantize, and both count. One JSON object on stdout.

    python bench/quantize.py SRC --peers peers --format Q4_K_M > quantize.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import rounds as measuring
from provenance import provenance
from rounds import Figures, MeasurementError

from llama2 import checkpoint
from llama2.checkpoint import quantize

#: Rows of a tensor that are compared at once, to bound the memory of their float32 copies.
ROWS = 1024
SOURCES = Path("llama_cpp_python-0.3.36/vendor/llama.cpp")


def errors(source: Path, output: Path) -> dict[str, float]:
    """Of every matrix √(Σ (x − y)² / Σ x²), of what is read back from both files."""
    found = {}
    with checkpoint.open(source) as before, checkpoint.open(output) as after:
        for name, tensor in before.tensors.items():
            if len(tensor.shape) != 2:
                continue
            lost = total = 0.0
            a, b = tensor.data.reshape(tensor.shape[0], -1), after.tensors[name].data.reshape(tensor.shape[0], -1)
            for start in range(0, len(a), ROWS):
                rows = slice(start, start + ROWS)
                shape = (len(a[rows]), tensor.shape[1])
                x = quantize.dequantize(a[rows].reshape(-1), tensor.format, shape).astype(float)
                y = quantize.dequantize(b[rows].reshape(-1), after.tensors[name].format, shape)
                lost += float(((x - y) ** 2).sum())
                total += float((x**2).sum())
            found[name] = math.sqrt(lost / total) if total else lost
    return found


def programs(source: Path, peers: Path, scratch: Path, format: str, threads: int) -> dict[str, Callable[[], Figures]]:
    """Each program's way from `source` to a quantised file in `scratch`."""

    def timed(*steps: tuple[list[str], dict[str, str]]) -> Figures:
        start = time.perf_counter()
        small = ["/bin/sh", "-c", 'echo; exec "$@"', "sh"]  # `run` wants output
        peaks = [measuring.run([*small, *command], environment).peak for command, environment in steps]
        return {"seconds": time.perf_counter() - start, "peak MiB": max(peaks)}

    def ours() -> Figures:
        words = ["quantize", str(source), str(scratch / "ours.gguf"), "--format", format, "--report", "none", "--force"]
        return timed(([sys.executable, "-m", "llama2", *words, "--threads", str(threads)], {}))

    def theirs() -> Figures:
        steps = []
        floats = source
        if source.is_dir():
            floats = scratch / "floats.gguf"
            script = peers / SOURCES / "convert_hf_to_gguf.py"
            path = {"PYTHONPATH": str(peers / SOURCES / "gguf-py"), "OMP_NUM_THREADS": str(threads)}
            steps.append(
                ([sys.executable, str(script), str(source), "--outfile", str(floats), "--outtype", "auto"], path)
            )
        tool = peers / "llama.cpp" / "bin" / "llama-quantize"
        steps.append(([str(tool), str(floats), str(scratch / "theirs.gguf"), format, str(threads)], {}))
        return timed(*steps)

    return {"llama2": ours, "llama.cpp": theirs}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="a GGUF file of floats, or a Hugging Face folder")
    parser.add_argument("--peers", type=Path, required=True, help="what bench/peers.sh made")
    parser.add_argument("--format", default="Q4_K_M", help="of the output (default Q4_K_M)")
    parser.add_argument("--threads", type=int, default=2, help="of both programs (default 2)")
    parser.add_argument("--pairs", type=int, default=3, help="rounds that must count (default 3)")
    parser.add_argument("--real", type=float, default=0.9, help="share of the cores that must be real (default 0.9)")
    parser.add_argument("--scratch", type=Path, help="folder for what is written (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        done: list[measuring.Round] = []
        ways = programs(options.source.resolve(), options.peers.resolve(), scratch, options.format, options.threads)
        try:
            measuring.add_rounds(done, ways, wanted=options.pairs, threads=options.threads, real=options.real)
        except MeasurementError as error:
            raise SystemExit(str(error)) from error
        files = {"llama2": scratch / "ours.gguf", "llama.cpp": scratch / "theirs.gguf"}
        lost = {name: errors(options.source, file) for name, file in files.items()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
    counting = [one.figures for one in done if one.counts]
    ratios = {
        name: lost["llama2"][name] / lost["llama.cpp"][name] for name in lost["llama2"] if lost["llama.cpp"][name]
    }
    figures = {
        "source": options.source.name,
        "format": options.format,
        "threads": options.threads,
        "medians": {
            name: {key: median(one[name][key] for one in counting) for key in ("seconds", "peak MiB")} for name in ways
        },
        "times_faster": median(one["llama.cpp"]["seconds"] / one["llama2"]["seconds"] for one in counting),
        "bytes": sizes,
        "error_ratio_worst": max(ratios.values(), default=None),
        "error_ratio_mean": sum(ratios.values()) / len(ratios) if ratios else None,
        "errors": lost,
        "rounds": [asdict(one) for one in done],
    }
    json.dump({**provenance(), **figures}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
