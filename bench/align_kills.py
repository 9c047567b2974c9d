"""Does each command of alignment that is killed again and again leave what it leaves when nothing kills it?

    python bench/align_kills.py > align_kills.json
    python bench/align_kills.py --kills 3 --stages ppo rounds > align_kills.json

Tiny random models take the place of real ones (bench/align_tiny.py). Each stage runs once without a kill. Then it is
begun again elsewhere, killed with SIGKILL at random moments of that time, `--kills` times, and continued until it ends.
Files that hold results must have the same bytes: stores of answers and rewards, data, weights of the last state. The
record on stdout is one JSON object; exit code 1 says that something differs.
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

import align_tiny
from provenance import provenance

_RUN = ["--runs", "{place}", "--name", "run"]
_DRAWN = ["store={place}/s", "output={place}/o"]
#: Of each stage: its command, and what it leaves. {place} is the folder of its results.
STAGES: dict[str, tuple[list[str], list[str]]] = {
    "sft": (["sft", "sft.toml", *_RUN], ["run/states/*/model/*"]),
    "ppo": (["ppo", "ppo.toml", *_RUN], ["run/states/*/model/*"]),
    "reject": (["reject", "reject.toml", *_DRAWN], ["s/*.jsonl", "o/*.jsonl"]),
    "gatt": (["gatt", "gatt.toml", *_DRAWN], ["s/*.jsonl", "o/*.jsonl"]),
    "distil": (["distil", "distil.toml", "gate=false", *_DRAWN], ["s/*.jsonl", "o/*.jsonl"]),
    "rounds": (
        ["rounds", "rounds.toml", "--out", "{place}"],
        ["*/best/*.jsonl", "*/gatt/*.jsonl", "*/model/*", "*/ppo/states/*/model/*"],
    ),
}


def command(words: Sequence[str], place: str, folder: Path) -> list[str]:
    """What is run in a folder; a run that was begun goes on."""
    given = [word.replace("{place}", place) for word in words]
    begun = "--runs" in given and (folder / place / "run/run.json").exists()
    return [sys.executable, "-m", "llama2", *given, *(["--resume"] if begun else [])]


def digests(place: Path, patterns: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the results. Of states, those of the last."""
    found = {}
    for path in sorted(path for pattern in patterns for path in place.glob(pattern) if path.is_file()):
        found[path.relative_to(place).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    last = max((name.split("step-")[1][:8] for name in found if "step-" in name), default="")
    return {name: digest for name, digest in found.items() if "step-" not in name or f"step-{last}" in name}


def stage(name: str, kills: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """One stage: what it leaves, and after which kills it leaves the same."""
    words, patterns = STAGES[name]
    begun = time.perf_counter()
    subprocess.run(
        command(words, f"whole-{name}", folder), cwd=folder, check=True, stdout=sys.stderr, stderr=sys.stderr
    )
    seconds = time.perf_counter() - begun
    whole = digests(folder / f"whole-{name}", patterns)
    killed: list[float] = []
    same, attempts = bool(whole), 0
    while same and len(killed) < kills:  # an attempt that ends before it is killed is followed by another
        attempts += 1
        place = f"killed-{name}-{attempts}"
        attempt((words, place), seconds, kills, killed, rng, folder)
        same = digests(folder / place, patterns) == whole
    verdict = "are the same" if same else "DIFFER"
    print(f"{name}: {len(killed)} kills, {len(whole)} files {verdict}", file=sys.stderr)
    return {"seconds": seconds, "killed_after": killed, "attempts": attempts, "files": len(whole), "same": same}


def attempt(
    given: tuple[list[str], str],
    seconds: float,
    kills: int,
    killed: list[float],
    rng: random.Random,
    folder: Path,
) -> None:
    """Run a stage until it ends, killed at random moments; `killed` gets how long each process lived."""
    while True:
        wait = rng.uniform(0.2, 1) * seconds if len(killed) < kills else None
        begun = time.perf_counter()
        with subprocess.Popen(command(*given, folder), cwd=folder, stdout=sys.stderr, stderr=sys.stderr) as process:
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                code = process.wait()
        if code == 0:
            return
        if code != -signal.SIGKILL:
            raise SystemExit(f"{given[1]}: ended with exit code {code} after {len(killed)} kills")
        killed.append(round(time.perf_counter() - begun, 2))


def main() -> int:
    """Kill, compare, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each stage")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES], default=[*STAGES])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", LLAMA2_THREADS="1")  # in which order sums are taken is then fixed
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        align_tiny.write(Path(name))
        found = {each: stage(each, options.kills, rng, Path(name)) for each in options.stages}
    good = all(each["same"] for each in found.values())
    print(json.dumps(provenance() | {"kills": options.kills, "met": good, "stages": found}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
