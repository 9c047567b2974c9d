"""Does a run that is killed again and again end as one that never was? Prints JSON; exit code 1 says that it does not.

    python bench/resume.py -o resume.json

A run of `llama2 pretrain` is begun, killed with SIGKILL at random moments, and continued with --resume until it ends.
The losses of all its steps, and the weights at its end, must be bitwise those of an uninterrupted run. A save comes
every other step, so that some kills hit one.

With --processes, a run of one process is continued with two from its middle, and the other way round, by torchrun, and
compared with what went before: sums are then taken in another order, and losses may differ by `--tolerance`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2 import records
from llama2.records import Run

RECIPE = """
steps = {steps}
seed = 5
compile = false
evaluate = 10
[model]
dim = 64
n_layers = 2
n_heads = 4
n_kv_heads = 2
hidden_dim = 128
[data]
corpus = "{corpus}"
length = 64
validation = 4
[batch]
size = 8
micro_size = 4
[optimizer]
lr = 3e-3
warmup = 10
[save]
every = 2
"""

#: When a process was killed, and what it left.
Kill = dict[str, Any]


def corpus(folder: Path) -> Path:
    """A small corpus of this project's own sources."""
    sources = folder / "texts"
    sources.mkdir()
    for path in sorted(Path(records.__file__).parent.rglob("*.py")):
        name = "-".join(path.relative_to(Path(records.__file__).parent).with_suffix(".txt").parts)
        (sources / name).write_bytes(path.read_bytes())
    recipe = folder / "corpus.toml"
    recipe.write_text(
        f'output = "{folder / "corpus"}"\ndir = "{sources}"\nvalidation = 0.1\n[tokenizer]\nvocabulary = 512\n'
        '[sources.text]\nfiles = ["*.txt"]\n[executor]\ntasks = 1\n'
    )
    _finish([*_program(1), "data", "build", str(recipe)])
    return folder / "corpus"


def _program(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "llama2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "llama2"]


def command(recipe: Path, name: str, *settings: str, resume: bool = False, processes: int = 1) -> list[str]:
    """What begins or continues a run."""
    words = ["pretrain", str(recipe), *settings, "--name", name, "--runs", str(recipe.parent / "runs")]
    return [*_program(processes), *words, *(["--resume"] if resume else [])]


def _finish(words: list[str]) -> float:
    """Run a program to its end, and return the seconds it took."""
    begun = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def kill_at(words: list[str], seconds: float) -> bool:
    """Kill a program and all its processes after some seconds; False when it had ended before. Exits if it failed."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with exit code {process.returncode}:\n{said.decode(errors='replace')}")
    return False


def losses(run: Path) -> dict[int, tuple[float, float | None]]:
    """Loss of every step, and validation loss where there is one."""
    return {line["step"]: (line["loss"], line.get("validation")) for line in Run.open(run).metrics()}


def weights(run: Path) -> str:
    """A hash of the last model."""
    last = max((run / records.STATES).glob(f"step-*[0-9]/{records.MODEL}/model.safetensors"))
    return hashlib.sha256(last.read_bytes()).hexdigest()


def killed(recipe: Path, kills: int, start: float, seconds: float, seed: int) -> tuple[list[Kill], Path]:
    """A run that was killed so often and then ended, of processes that take `start` seconds until the first step.

    Each is killed at a moment between half its start and its share of half the `seconds` that the run takes, so that
    the last kill comes before the run ends, also on a machine that has become faster meanwhile.
    """
    draw = random.Random(seed)
    runs = recipe.parent / "runs"
    found: list[Kill] = []
    while len(found) < kills:
        begun = (runs / "killed" / records.ORIGIN).exists()
        after = draw.uniform(start / 2, start + (seconds - start) / 2 / kills)
        if not kill_at(command(recipe, "killed", resume=begun), after):
            break
        parts = [path.name for path in (runs / "killed").glob(f"{records.STATES}/*.part")]
        last = max([*losses(runs / "killed")], default=0) if (runs / "killed" / records.ORIGIN).exists() else None
        found.append({"after": round(after, 3), "last_step": last, "unfinished": parts})
        print(f"kill {len(found)}: after {after:.2f} s, step {last}, unfinished {parts}", file=sys.stderr)
    _finish(command(recipe, "killed", resume=(runs / "killed" / records.ORIGIN).exists()))
    return found, runs / "killed"


def changed(recipe: Path, first: int, then: int, half: int) -> float:
    """How far the losses of a run by `first` processes change, relatively, when `then` continue from step `half`."""
    name = f"{first}-{then}"
    run = recipe.parent / "runs" / name
    # The schedule of a run goes by its steps, so the first part is the whole run, and what follows is taken away.
    _finish(command(recipe, name, f"save.every={half}", "save.keep_last=9", processes=first))
    before = losses(run)
    for path in (run / records.STATES).glob("step-*"):
        if int(path.name.removeprefix("step-")) > half:
            _remove(path)
    _finish(command(recipe, name, f"save.every={half}", "save.keep_last=9", resume=True, processes=then))
    after = losses(run)
    if after.keys() != before.keys():
        sys.exit(f"{name}: steps are missing or twice there")
    return max(abs(after[step][0] - loss) / loss for step, (loss, _) in before.items())


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--processes", action="store_true", help="also change between one and two processes")
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="relative, between losses of one and two processes"
    )
    parser.add_argument("-o", "--output", type=Path, help="a file for the JSON, instead of standard output")
    asked = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(steps=asked.steps, corpus=corpus(folder)))
        start = _finish(command(recipe, "one", "steps=1", "optimizer.warmup=0"))
        seconds = _finish(command(recipe, "whole"))
        whole = losses(folder / "runs" / "whole")
        kills, run = killed(recipe, asked.kills, start, seconds, asked.seed)
        result: dict[str, Any] = {
            **provenance(),
            "steps": asked.steps,
            "kills": kills,
            "seconds_of_one_step": round(start, 2),
            "seconds_uninterrupted": round(seconds, 2),
            "losses_equal": losses(run) == whole,
            "weights_equal": weights(run) == weights(folder / "runs" / "whole"),
        }
        good = result["losses_equal"] and result["weights_equal"] and len(kills) == asked.kills
        if asked.processes:
            for first, then in ((1, 2), (2, 1)):
                worst = changed(recipe, first, then, asked.steps // 4 * 2)
                result[f"{first} to {then} processes"] = {"largest_relative_difference": worst}
                good = good and worst <= asked.tolerance
            result["tolerance"] = asked.tolerance
        result["good"] = good
    text = json.dumps(result, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
