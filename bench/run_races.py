"""Do two processes that start, resume and list the same run ever lose a state, or leave half of one? Prints JSON.

    python bench/run_races.py -o run_races.json

In each of `--rounds` rounds, two processes at once do one to three things at random with the run of the same name:
begin it, resume it, list it. Half of the trainings are killed with SIGKILL at a random moment. A command ends
well, or is refused because the run is there, is not there, or is another process's; anything else is a fault. After
each round, every state must be whole, the last one no older than before, its model open to the last number, and the
list undamaged. A run that has ended must have the losses and the weights, bit by bit, of one that was alone; then the
name is free for the next. Exit code 1 says that there was a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import resume
from provenance import provenance

from llama2 import checkpoint, records

NAME = "same"
STEPS = 30
#: What a command may be refused with.
REFUSALS = ("holds a run already", "does not hold a run", "has this run since")


class Worker:
    """A process that has imported everything and forks for every command, so that it begins within milliseconds."""

    def __init__(self, folder: Path, number: int, stack: ExitStack) -> None:
        self.output = folder / f"worker-{number}.txt"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(self.output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        stack.enter_context(self._process)
        stack.callback(self._process.kill)

    def run(self, words: Sequence[str], kill: float | None = None) -> tuple[int, str]:
        """Exit code and output of a command; it is killed after some seconds, if it has not ended before."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps({"words": words, "kill": kill}), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, self.output.read_text(errors="replace")


def serve(output: Path) -> None:
    """What a worker does: a line of JSON in, an exit code out."""
    import llama2.train.pretrain
    from llama2.cli import main as program

    assert llama2.train.pretrain
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            try:
                program.run(asked["words"])
            except SystemExit as ended:
                sys.stdout.flush()
                os._exit(int(ended.code or 0))
            os._exit(99)
        if asked["kill"] is not None:
            until = time.monotonic() + asked["kill"]
            while time.monotonic() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Race:
    """The run, what was done to it, and what went wrong."""

    def __init__(self, recipe: Path, seed: int) -> None:
        self.runs = recipe.parent / "runs"
        self.run = self.runs / NAME
        self.train = ["pretrain", str(recipe), "--runs", str(self.runs), "--name"]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.last = 0  # step of the last state
        self._draw = random.Random(seed)

    def acts(self, seconds: float) -> list[tuple[str, list[str], float | None]]:
        """What a process does in a round: a name, words, and after how long it is killed."""
        chosen = self._draw.choices(("start", "resume", "list"), (2, 3, 2), k=self._draw.randint(1, 3))
        words = {
            "start": [*self.train, NAME],
            "resume": [*self.train, NAME, "--resume"],
            "list": ["runs", "--json", "--runs", str(self.runs)],
        }
        killed = {act: act != "list" and self._draw.random() < 0.5 for act in words}
        return [(act, words[act], self._draw.uniform(0, seconds) if killed[act] else None) for act in chosen]

    def do(self, worker: Worker, acts: Sequence[tuple[str, list[str], float | None]]) -> None:
        """Let a worker do its part of a round."""
        for act, words, kill in acts:
            code, output = worker.run(words, kill)
            if code == -signal.SIGKILL and kill is not None:
                self.counts[f"{act}: killed"] += 1
            elif code == 0:
                self.counts[f"{act}: done"] += 1
                if act == "list":
                    self.listed(output)
            elif code == 1 and (refusal := next((each for each in REFUSALS if each in output), None)):
                self.counts[f"{act}: refused, {refusal}"] += 1
            else:
                self.faults.append(f"{act}: exit code {code}: {output[-500:]}")

    def listed(self, output: str) -> None:
        """Judge what `llama2 runs --json` says."""
        try:
            rows = json.loads(output.splitlines()[-1])["runs"]
        except (ValueError, IndexError, KeyError):
            self.faults.append(f"list: {output[-500:]}")
            return
        self.faults += [f"list: {damage}" for row in rows for damage in row["damage"]]

    def judge(self, alone: Path) -> None:
        """Look at the run between two rounds."""
        self.counts["rounds"] += 1
        if not (self.run / records.ORIGIN).exists():
            return
        states = sorted(path for path in (self.run / records.STATES).glob("step-*") if path.suffix != ".part")
        for state in states:
            for part in (".metadata", f"{records.MODEL}/config.json", f"{records.MODEL}/model.safetensors"):
                if not (state / part).is_file():
                    self.faults.append(f"{state.name}: has no {part}")
        steps = [int(match[1]) for state in states if (match := re.fullmatch(records.STATE, state.name))]
        last = max(steps, default=0)
        if last < self.last:
            self.faults.append(f"the last state was of step {self.last}, and is of {last}")
        self.last = last
        if not steps:
            return
        with checkpoint.open(self.run) as opened:
            opened.check_finite()
        if last < STEPS:
            return
        for what, measure in (("losses", resume.losses), ("weights", resume.weights)):
            if measure(self.run) != measure(alone):
                self.faults.append(f"a run that ended has other {what} than one that was alone")
        self.counts["runs that ended"] += 1
        self.run.rename(self.runs / f"ended-{self.counts['runs that ended']}")
        self.last = 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="rounds of two processes (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="what is done when (default 0)")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON (default: standard output)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.worker:
        serve(asked.worker)
        return 0
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        recipe = folder / "recipe.toml"
        recipe.write_text(resume.RECIPE.format(steps=STEPS, corpus=resume.corpus(folder)))
        workers = [Worker(folder, number, stack) for number in range(2)]
        race = Race(recipe, asked.seed)
        code, output = workers[0].run([*race.train, "alone"])
        if code:
            sys.exit(output)
        begun = time.perf_counter()
        workers[1].run([*race.train, "again"])
        seconds = time.perf_counter() - begun
        alone = (race.runs / "alone").rename(folder / "alone")
        (race.runs / "again").rename(folder / "again")
        for _ in range(asked.rounds):
            parts = [race.acts(seconds) for _ in workers]
            threads = [threading.Thread(target=race.do, args=pair) for pair in zip(workers, parts, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            race.judge(alone)
            print(f"\r{race.counts['rounds']} rounds, {len(race.faults)} faults", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    result: dict[str, Any] = {**provenance(), "seconds_of_a_run": round(seconds, 2), "counts": dict(race.counts)}
    text = json.dumps(result | {"faults": race.faults, "good": not race.faults}, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 1 if race.faults else 0


if __name__ == "__main__":
    sys.exit(main())
