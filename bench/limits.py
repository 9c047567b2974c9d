"""The machine's limits as `llama2 bench` measures them, beside an opinion that shares nothing with it.

Read bandwidth against bench/bandwidth.c, compiled here by $CC or cc, and the int8 rate against PyTorch's product of two
matrices of 2048 x 2048. The two take turns in one run (bench/rounds.py). The table goes to stderr, one JSON object with
every round to stdout. Needs PyTorch, as the tests do.

    python bench/limits.py > limits.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from provenance import provenance
from rounds import Figures, MeasurementError, Round, add_rounds, run

from llama2 import native
from llama2.records import installed

#: Seconds of each measurement.
SECONDS = 0.5
#: Rows, columns and depth of PyTorch's product.
SIZE = 2048


def compile_probe(folder: Path) -> Path:
    """The program of bandwidth.c. Raises SystemExit with the compiler's words when it fails."""
    program = folder / "bandwidth"
    source = Path(__file__).with_name("bandwidth.c")
    command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-500:]}")
    return program


def believed(threads: int) -> Figures:
    """What `llama2 bench` divides by."""
    machine = native.module()
    return {
        "read GB/s": machine.read_bandwidth(threads, SECONDS) / 1e9,
        "int8 G/s": machine.int8_gemm_rate(threads, SECONDS) / 1e9,
    }


def independent(threads: int, probe: Path) -> Figures:
    """The same by other means. PyTorch must have been told of the threads."""
    return {
        "read GB/s": float(run([str(probe), str(threads), str(SECONDS)]).stdout) / 1e9,
        "int8 G/s": int8_product() / 1e9,
    }


def int8_product() -> float:
    """Operations a second of PyTorch's int8 product; a multiplication and an addition are two."""
    a, b = (torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))
    torch._int_mm(a, b)
    products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        torch._int_mm(a, b)
        products += 1
    return products * 2 * SIZE**3 / elapsed


def agreement(rounds: list[Round]) -> dict[str, float]:
    """By figure, the median over the rounds that count of llama2's opinion divided by the other."""
    counting = [one.figures for one in rounds if one.counts]
    return {
        name: statistics.median(figures["llama2"][name] / figures["independent"][name] for figures in counting)
        for name in counting[0]["llama2"]
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default 2)")
    parser.add_argument("--pairs", type=int, default=9, help="rounds that must count (default 9)")
    parser.add_argument("--real", type=float, default=0.9, help="share of the threads that needs a real core (0.9)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = compile_probe(Path(folder))
        programs = {
            "llama2": lambda: believed(options.threads),
            "independent": lambda: independent(options.threads, probe),
        }
        try:
            add_rounds(rounds, programs, wanted=options.pairs, threads=options.threads, real=options.real)
        except MeasurementError as error:
            raise SystemExit(f"\n{error}") from None
    ratios = agreement(rounds)
    print(f"\n{'':10}{'llama2':>10}{'independent':>13}{'ratio':>7}", file=sys.stderr)
    for name, ratio in ratios.items():
        ours, theirs = (
            statistics.median(one.figures[who][name] for one in rounds if one.counts)
            for who in ("llama2", "independent")
        )
        print(f"{name:10}{ours:10.1f}{theirs:13.1f}{ratio:7.2f}", file=sys.stderr)
    origin = {**provenance(), "torch": installed("torch"), "threads": options.threads, "real": options.real}
    json.dump({**origin, "ratios": ratios, "rounds": [asdict(one) for one in rounds]}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
