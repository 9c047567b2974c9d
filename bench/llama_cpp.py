"""llama2 beside llama.cpp on one GGUF model: prefill, decode, start to first token, peak memory.

A shared machine changes speed from second to second, above all when its host runs two virtual cores on one real one.
So the two programs run in pairs, one right after the other and each first in turn; the cores are probed before, between
and after; and a pair during which they were less than 90 % real is dropped and run again. The table goes to stderr,
one JSON object with every pair to stdout.

    python bench/llama_cpp.py -m MODEL.gguf --llama-bench llama.cpp/bin/llama-bench
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from provenance import provenance

from llama2 import native

PROGRAMS = ("llama2", "llama.cpp")
#: A pair counts when this share of its threads ran on cores of their own.
REAL = 0.9
#: Seconds to wait for such cores before a pair, and how many pairs are tried for one that counts.
PATIENCE, TRIES = 60.0, 4
#: Texts whose first answer token is a whole word.
PROMPT, QUESTION = "The capital of France is", "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class Run:
    """What a finished process showed."""

    stdout: str
    first_byte: float  # seconds from its start to the first byte on stdout
    peak: float  # MiB of resident memory


#: "decode tokens/s": 120.0 and so on; the last word of a name is its unit.
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Contest:
    """What each program is told to do, and how its run becomes figures of the same names."""

    commands: dict[str, list[str]]
    read: dict[str, Callable[[Run], Figures]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Figures by program of two neighbouring runs, and the cores found before, between and after them."""

    figures: dict[str, Figures]
    cores: list[float]
    counts: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. llama2's advantage is above 1 where it is faster, sooner or smaller."""

    figure: str
    medians: dict[str, float]
    advantage: float  # median of `advantages`
    advantages: list[float]  # pair by pair


def run(command: list[str]) -> Run:
    """Run a program to its end. Raises SystemExit with its last words when it fails or prints nothing."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout
            stdout = os.read(process.stdout.fileno(), 1)
            first_byte = time.perf_counter() - start
            stdout += process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not stdout:
            errors.seek(0)
            words = errors.read()[-500:].decode(errors="replace")
            raise SystemExit(f"{shlex.join(command)} ended with exit code {process.returncode}:\n{words}")
    return Run(
        stdout.decode(errors="replace"), first_byte, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    )


def read_llama2_bench(run: Run) -> Figures:
    """Figures of `llama2 bench --json`."""
    answer = json.loads(run.stdout)
    return {f"{phase} tokens/s": answer[f"{phase}_tokens_per_second"] for phase in ("prefill", "decode")}


def read_llama_bench(run: Run) -> Figures:
    """Figures of `llama-bench -o json`: one test of the prompt alone, one of generation alone."""
    return {
        f"{'prefill' if test['n_prompt'] else 'decode'} tokens/s": test["avg_ts"] for test in json.loads(run.stdout)
    }


def read_start(run: Run) -> Figures:
    """Figures of a run that prints one token."""
    return {"first token s": run.first_byte, "peak memory MiB": run.peak}


def contests(options: argparse.Namespace) -> dict[str, Contest]:
    """What is compared. llama-completion goes without its warm-up, which would only delay its first token."""
    model, threads, prompt, generate = (
        str(o) for o in (options.model, options.threads, options.prompt, options.generate)
    )
    llama2 = [sys.executable, "-m", "llama2"]
    bench = [*llama2, "bench", "-m", model, "--prompt", prompt, "--generate", generate, "--threads", threads]
    llama_bench = [str(options.llama_bench), "-m", model, "-p", prompt, "-n", generate, "-t", threads]
    context = str(options.context)
    one_token = ["-m", model, "--threads", threads, "--context", context, "--max-tokens", "1", "--temperature", "0"]
    completion = [str(options.llama_bench.with_name("llama-completion")), "-m", model, "-t", threads, "-c", context]
    completion += ["-n", "1", "--temp", "0", "--no-warmup", "--no-display-prompt", "--simple-io"]
    return {
        f"prefill {prompt}, decode {generate}": Contest(
            {"llama2": [*bench, "--repeat", "1", "--json"], "llama.cpp": [*llama_bench, "-r", "1", "-o", "json"]},
            {"llama2": read_llama2_bench, "llama.cpp": read_llama_bench},
        ),
        "generate": Contest(
            {
                "llama2": [*llama2, "generate", *one_token, PROMPT],
                "llama.cpp": [*completion, "--no-conversation", "-p", PROMPT],
            },
            dict.fromkeys(PROGRAMS, read_start),
        ),
        "chat": Contest(
            {
                "llama2": [*llama2, "chat", *one_token, QUESTION],
                "llama.cpp": [*completion, "--jinja", "--conversation", "--single-turn", "-p", QUESTION],
            },
            dict.fromkeys(PROGRAMS, read_start),
        ),
    }


def real_cores(threads: int) -> float:
    """How many cores' worth of arithmetic `threads` threads do at this moment."""
    rate = native.module().int8_gemm_rate
    return round(float(rate(threads, 0.05) / rate(1, 0.05)), 2)


def one_pair(contest: Contest, threads: int, order: tuple[str, ...]) -> Pair:
    """Wait for real cores, then run both programs in `order` with probes around them."""
    deadline = time.monotonic() + PATIENCE
    while (first := real_cores(threads)) < REAL * threads and time.monotonic() < deadline:
        time.sleep(0.5)
    cores, figures = [first], {}
    for program in order:
        figures[program] = contest.read[program](run(contest.commands[program]))
        cores.append(real_cores(threads))
    return Pair(figures, cores, counts=min(cores) >= REAL * threads)


def all_pairs(contest: Contest, threads: int, wanted: int) -> list[Pair]:
    """Pairs until `wanted` of them count, after one run of each program that only fills the caches.

    Progress on stderr: a dot for a pair that counts, an x for one that does not.
    """
    for program in PROGRAMS:
        run(contest.commands[program])
    pairs: list[Pair] = []
    while sum(pair.counts for pair in pairs) < wanted:
        if len(pairs) == TRIES * wanted:
            raise SystemExit(f"{threads} threads seldom had {threads} real cores; try again when the machine is quiet")
        pairs.append(one_pair(contest, threads, PROGRAMS if len(pairs) % 2 == 0 else PROGRAMS[::-1]))
        print("." if pairs[-1].counts else "x", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return pairs


def summary(pairs: list[Pair]) -> list[Row]:
    """One row a figure, over the pairs that count."""
    counting = [pair.figures for pair in pairs if pair.counts]
    rows = []
    for name in counting[0]["llama2"]:
        values = {program: [figures[program][name] for figures in counting] for program in PROGRAMS}
        ratios = [a / b for a, b in zip(values["llama2"], values["llama.cpp"], strict=True)]
        advantages = ratios if name.endswith("tokens/s") else [1 / ratio for ratio in ratios]
        medians = {program: statistics.median(values[program]) for program in PROGRAMS}
        rows.append(Row(name, medians, statistics.median(advantages), advantages))
    return rows


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--llama-bench", type=Path, required=True, help="llama-bench, with llama-completion beside it")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill (default 512)")
    parser.add_argument("--generate", type=int, default=128, help="tokens of decode (default 128)")
    parser.add_argument("--context", type=int, default=2048, help="of the runs that print one token (default 2048)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both programs (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs that must count, of each contest (default 5)")
    options = parser.parse_args()

    results = {}
    print(f"{'':32}{'llama2':>10}{'llama.cpp':>11}{'advantage':>11}   pair by pair", file=sys.stderr)
    for title, contest in contests(options).items():
        pairs = all_pairs(contest, options.threads, options.pairs)
        rows = summary(pairs)
        results[title] = {
            "commands": {program: shlex.join(command) for program, command in contest.commands.items()},
            "summary": [asdict(row) for row in rows],
            "pairs": [asdict(pair) for pair in pairs],
        }
        print(title, file=sys.stderr)
        for row in rows:
            ours, theirs = row.medians.values()
            each = " ".join(f"{advantage:.2f}" for advantage in row.advantages)
            print(f"  {row.figure:30}{ours:10.4g}{theirs:11.4g}{row.advantage:11.2f}   {each}", file=sys.stderr)
    json.dump({**provenance(), "model": options.model.name, "contests": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
