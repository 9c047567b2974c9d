"""llama2 beside its peers: one table of speed, start and memory, what is required of each row, and whether it is met.

Every row's programs run in interleaved rounds (bench/rounds.py), and ratios are medians over the rounds of the ratio
within one. The machine's limits are measured by `llama2 bench` in the same runs. The table goes to stderr as it grows;
at the end it goes to stdout in Markdown, and the JSON file has every single value. The file is written after each
round, and --resume continues it.

    python bench/table.py --peers PEERS --models MODELS -o table.json > table.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from provenance import provenance
from rounds import Figures, MeasurementError, Round, Run, add_rounds, run

LLAMA2, LLAMA_CPP, IK, OPENVINO = PROGRAMS = ("llama2", "llama.cpp", "ik_llama.cpp", "OpenVINO GenAI")
#: Texts whose first answer token is a whole word.
PROMPT, QUESTION = "The capital of France is", "What is the capital of France?"
#: Share of the threads that must have a core of their own.
REAL = 0.9

#: llama2's speeds as shares of the machine's limits.
READ, INT8 = "decode / read bandwidth", "prefill / int8 rate"
#: Contests of one sequence, each on a model of its own.
Q4_1, Q4_0, Q8_0, SMALL, LARGE_0, LARGE_K = MODELS = (
    "default model Q4_1",
    "default model Q4_0",
    "default model Q8_0",
    "1.1B shape Q4_0",
    "7B shape Q4_0",
    "7B shape Q4_K_M",
)


@dataclass(frozen=True, slots=True)
class Program:
    """How a program is run, and how its run becomes figures."""

    command: list[str]
    read: Callable[[Run], Figures]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contest:
    """Programs that do the same work on one model, llama2 among them."""

    model: Path
    programs: dict[str, Program]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one figure of a contest.

    `required` holds by peer the least ratio of llama2 to it where more is better, and the largest where less is.
    `share` names the figure that is llama2's share of the machine's limit, if any, and `goal` is what it is to reach.
    """

    title: str
    contest: str
    figure: str
    required: dict[str, float]
    share: str = ""
    goal: float | None = None

    @property
    def unit(self) -> str:
        """Of the figure."""
        return self.figure.split()[-1]

    @property
    def more_is_better(self) -> bool:
        """Whether it is a speed, not a time or a size."""
        return self.unit == "tokens/s"


@dataclass(frozen=True, slots=True)
class Summary:
    """What the rounds that count say of a row. `met` is True when every requirement is."""

    medians: dict[str, float]
    ratios: dict[str, float]  # medians of `each`
    each: dict[str, list[float]]  # llama2 / peer, round by round
    met: bool
    share: float | None


def read_llama2(run: Run) -> Figures:
    """Figures of `llama2 bench --json`, which tells its own peak memory, before it measures the machine's limits."""
    answer = json.loads(run.stdout)
    return {
        **read_driver(run),
        "peak memory MiB": answer["peak_memory_bytes"] / 2**20,
        READ: answer["decode_share_of_read"],
        INT8: answer["prefill_share_of_int8"],
        "read GB/s": answer["read_bytes_per_second"] / 1e9,
        "int8 G/s": answer["int8_operations_per_second"] / 1e9,
    }


def read_driver(run: Run) -> Figures:
    """Figures of bench/drivers."""
    answer = json.loads(run.stdout)
    return {f"{phase} tokens/s": answer[f"{phase}_tokens_per_second"] for phase in ("prefill", "decode")}


def read_llama_bench(run: Run) -> Figures:
    """Figures of `llama-bench -o json`: one test of the prompt alone, one of generation alone."""
    figures = {
        f"{'prefill' if test['n_prompt'] else 'decode'} tokens/s": test["avg_ts"] for test in json.loads(run.stdout)
    }
    return {**figures, "peak memory MiB": run.peak}


def read_batched_bench(run: Run) -> Figures:
    """Figures of `llama-batched-bench --output-format jsonl`, whose one object stands among empty lines."""
    answer = json.loads(run.stdout)
    return {"prefill tokens/s": answer["speed_pp"], "decode tokens/s": answer["speed_tg"]}


def read_start(run: Run) -> Figures:
    """Figures of a run that prints one token."""
    return {"first token s": run.first_byte, "peak memory MiB": run.peak}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the peers and models are, and how many threads every program gets."""

    peers: Path
    models: Path
    threads: int

    def model(self, name: str) -> Path:
        """A file of bench/models.py."""
        return self.models / f"{name}.gguf"

    def llama2(self, command: str, model: str, context: int, *words: object) -> list[str]:
        """A command of llama2."""
        start = [sys.executable, "-m", "llama2", command, "-m", str(self.model(model)), "--threads", str(self.threads)]
        return [*start, "--context", str(context), *map(str, words)]

    def bench(
        self, model: str, prompt: int, generate: int, *, depth: int = 1, batch: int = 1, isa: str = ""
    ) -> Program:
        """`llama2 bench`, with no longer a context than the work needs, as llama.cpp's programs have."""
        # While a batch begins, its first sequences are a few steps ahead of its last.
        context = max(prompt, depth + generate) + (32 if batch > 1 else 1)
        words = ["--prompt", prompt, "--generate", generate, "--depth", depth, "--batch", batch, "--repeat", 1]
        command = self.llama2("bench", model, context, *words, "--json")
        return Program(command, read_llama2, {"LLAMA2_ISA": isa} if isa else {})

    def llama_cpp(self, program: str, model: str, *words: object, folder: str = "llama.cpp") -> list[str]:
        """A command of llama.cpp."""
        start = [str(self.peers / folder / "bin" / program), "-m", str(self.model(model)), "-t", str(self.threads)]
        return [*start, *map(str, words)]

    def llama_bench(self, model: str, prompt: int, generate: int, folder: str = "llama.cpp") -> Program:
        """`llama-bench`."""
        words = ["-p", prompt, "-n", generate, "-r", 1, "-o", "json"]
        return Program(self.llama_cpp("llama-bench", model, *words, folder=folder), read_llama_bench)

    def driver(self, environment: str, model: str, prompt: int, generate: int) -> Program:
        """A script of bench/drivers in a peer's own environment."""
        script = Path(__file__).parent / "drivers" / f"{environment}.py"
        command = [str(self.peers / environment / "bin" / "python"), str(script), str(self.model(model))]
        words = ["--prompt", prompt, "--generate", generate, "--threads", self.threads]
        return Program([*command, *map(str, words)], read_driver)

    def single(self, model: str, prompt: int, generate: int, *, all_peers: bool) -> Contest:
        """One sequence: prefill of a prompt, and decode after an empty one."""
        programs = {
            LLAMA2: self.bench(model, prompt, generate),
            LLAMA_CPP: self.llama_bench(model, prompt, generate),
        }
        if all_peers:
            programs[IK] = self.driver("ik", model, prompt, generate)
            programs[OPENVINO] = self.driver("ov", model, prompt, generate)
        return Contest(self.model(model), programs)

    def batch(self, model: str, batch: int, tokens: int) -> Contest:
        """Several sequences, each of a prompt and an answer of so many tokens."""
        words = ["-c", 2 * tokens * batch, "-npp", tokens, "-ntg", tokens, "-npl", batch, "--output-format", "jsonl"]
        programs = {
            LLAMA2: self.bench(model, tokens, tokens, depth=tokens, batch=batch),
            LLAMA_CPP: Program(self.llama_cpp("llama-batched-bench", model, *words), read_batched_bench),
        }
        return Contest(self.model(model), programs)

    def start(self, model: str, command: str, text: str, *words: object) -> Contest:
        """One token. llama-completion goes without its warm-up, which would only delay it."""
        context, ours, theirs = 2048, ["--max-tokens", 1, "--temperature", 0], ["-n", 1, "--temp", 0]
        theirs += ["-c", context, "--no-warmup", "--no-display-prompt", "--simple-io", *words, "-p", text]
        programs = {
            LLAMA2: Program(self.llama2(command, model, context, *ours, text), read_start),
            LLAMA_CPP: Program(self.llama_cpp("llama-completion", model, *theirs), read_start),
        }
        return Contest(self.model(model), programs)

    def avx2(self, model: str, prompt: int, generate: int) -> Contest:
        """Both without AVX-512."""
        programs = {
            LLAMA2: self.bench(model, prompt, generate, isa="avx2"),
            LLAMA_CPP: self.llama_bench(model, prompt, generate, folder="llama.cpp-avx2"),
        }
        return Contest(self.model(model), programs)


def contests(setting: Setting) -> dict[str, Contest]:
    """All that is measured, by title."""
    default = "default-q4_1"
    return {
        Q4_1: setting.single(default, 512, 128, all_peers=True),
        Q4_0: setting.single("default-q4_0", 512, 128, all_peers=True),
        Q8_0: setting.single("default-q8_0", 512, 128, all_peers=True),
        SMALL: setting.single("1.1b-q4_0", 512, 128, all_peers=True),
        LARGE_0: setting.single("7b-q4_0", 512, 32, all_peers=False),
        LARGE_K: setting.single("7b-q4_k_m", 512, 32, all_peers=False),
        "batch of 8": setting.batch(default, 8, 64),
        "batch of 32": setting.batch(default, 32, 64),
        "long prompt": setting.single(default, 4096, 1, all_peers=False),
        "generate": setting.start(default, "generate", PROMPT, "--no-conversation"),
        "chat": setting.start(default, "chat", QUESTION, "--jinja", "--conversation", "--single-turn"),
        "AVX2": setting.avx2(default, 512, 128),
    }


def rows() -> list[Row]:
    """The table, from top to bottom."""

    def prefill(contest: str, tokens: int, required: dict[str, float], goal: float | None = None) -> Row:
        return Row(f"{contest}, prefill {tokens}", contest, "prefill tokens/s", required, INT8, goal)

    def decode(contest: str, tokens: int, required: dict[str, float], goal: float | None = None) -> Row:
        return Row(f"{contest}, decode {tokens}", contest, "decode tokens/s", required, READ, goal)

    table = [
        decode(Q4_1, 128, {LLAMA_CPP: 1.8, IK: 1.3}, 0.65),
        prefill(Q4_1, 512, {LLAMA_CPP: 5.0, OPENVINO: 1.15}, 0.45),
    ]
    for model in (Q4_0, Q8_0):
        every_peer = {LLAMA_CPP: 1.0, IK: 1.0, OPENVINO: 1.0}
        table += [decode(model, 128, every_peer), prefill(model, 512, every_peer)]
    table += [decode(SMALL, 128, {LLAMA_CPP: 1.2}, 0.85), prefill(SMALL, 512, {OPENVINO: 1.15}, 0.55)]
    for model in (LARGE_0, LARGE_K):
        table += [decode(model, 32, {LLAMA_CPP: 1.05}, 0.92), prefill(model, 512, {LLAMA_CPP: 2.0}, 0.55)]
    table += [decode(f"batch of {batch}", 64, {LLAMA_CPP: 3.0}) for batch in (8, 32)]
    table += [prefill("long prompt", 4096, {LLAMA_CPP: 3.0})]
    for command in ("generate", "chat"):
        table += [Row(f"{command}, start to first token", command, "first token s", {LLAMA_CPP: 1.2})]
    for contest in (*MODELS, "generate"):
        table += [Row(f"{contest}, peak memory", contest, "peak memory MiB", {LLAMA_CPP: 1.15})]
    return [*table, decode("AVX2", 128, {LLAMA_CPP: 1.0}), prefill("AVX2", 512, {LLAMA_CPP: 1.0})]


def summary(row: Row, rounds: Iterable[Round]) -> Summary:
    """What the rounds that count, of which there must be one, say of a row."""
    counting = [one.figures for one in rounds if one.counts]
    values = {
        program: [figures[program][row.figure] for figures in counting]
        for program in PROGRAMS
        if row.figure in counting[0].get(program, {})
    }
    each = {
        peer: [ours / theirs for ours, theirs in zip(values[LLAMA2], values[peer], strict=True)]
        for peer in values
        if peer != LLAMA2
    }
    ratios = {peer: statistics.median(some) for peer, some in each.items()}
    met = all(
        ratios[peer] >= bound if row.more_is_better else ratios[peer] <= bound for peer, bound in row.required.items()
    )
    return Summary(
        medians={program: statistics.median(some) for program, some in values.items()},
        ratios=ratios,
        each=each,
        met=met,
        share=statistics.median(figures[LLAMA2][row.share] for figures in counting) if row.share else None,
    )


HEADINGS = ["", *PROGRAMS, "required", "met", "share of the limit", "goal"]


def cells(row: Row, found: Summary | None) -> list[str]:
    """A row as text, by HEADINGS; None where it was not measured."""
    sign = "≥" if row.more_is_better else "≤"
    title = f"{row.title}, {row.unit}"
    required = ", ".join(f"{sign} {bound:g} × {peer}" for peer, bound in row.required.items())
    goal = "" if row.goal is None else f"{row.goal:.0%}"
    if found is None:
        return [title, *[""] * len(PROGRAMS), required, "not measured", "", goal]
    ours = f"{found.medians[LLAMA2]:.4g}"
    theirs = [
        f"{found.medians[peer]:.4g} (× {found.ratios[peer]:.2f})" if peer in found.medians else ""
        for peer in PROGRAMS
        if peer != LLAMA2
    ]
    share = "" if found.share is None else f"{found.share:.0%} of {row.share.partition(' / ')[2]}"
    if row.goal is not None and found.share is not None:
        goal += ", reached" if found.share >= row.goal else ", not reached"
    return [title, ours, *theirs, required, "yes" if found.met else "no", share, goal]


def as_text(lines: list[list[str]]) -> str:
    """Lines of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{text.rstrip()}\n" for text in texts)


def as_markdown(lines: list[list[str]]) -> str:
    """Lines of cells, of which the first has the headings, as a table."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


class Record:
    """The JSON file: where the measurement comes from, and every round of every contest."""

    def __init__(self, path: Path, origin: dict[str, Any], *, wanted: int, resume: bool) -> None:
        """Begin a file, or continue one; `wanted` rounds of a contest must count.

        Raises SystemExit when there is a file that shall not or cannot be continued.
        """
        self.path, self.origin, self.wanted = path, origin, wanted
        self.commands: dict[str, dict[str, str]] = {}
        self.rounds: dict[str, list[Round]] = {}
        self.seconds, self._written = 0.0, time.monotonic()  # spent until then
        if not path.exists():
            return
        if not resume:
            raise SystemExit(f"{path} is there; --resume continues it, or name another file with -o")
        before = json.loads(path.read_text())
        for name in ("commit", "cpu", "threads", "real"):
            if before[name] != origin[name]:
                raise SystemExit(f"{path}: {name} was {before[name]} and is {origin[name]}; name another file with -o")
        self.seconds = before["seconds"]
        for title, contest in before["contests"].items():
            self.commands[title] = contest["commands"]
            self.rounds[title] = [Round(**one) for one in contest["rounds"]]

    def begin(self, title: str, commands: dict[str, str]) -> list[Round]:
        """The rounds so far of a contest, to be added to. Raises SystemExit when its commands were others."""
        if self.commands.setdefault(title, commands) != commands:
            raise SystemExit(f"{self.path}: the commands of {title} were others; name another file with -o")
        return self.rounds.setdefault(title, [])

    def complete(self, title: str) -> bool:
        """Whether as many rounds of a contest count as are wanted."""
        return sum(one.counts for one in self.rounds.get(title, [])) >= self.wanted

    def found(self, row: Row) -> Summary | None:
        """A row's summary, if its contest is complete."""
        return summary(row, self.rounds[row.contest]) if self.complete(row.contest) else None

    def write(self) -> None:
        """Replace the file by one with all there is."""
        now = time.monotonic()
        self.seconds, self._written = self.seconds + now - self._written, now
        found = [(row, self.found(row)) for row in rows()]
        content = {
            **self.origin,
            "seconds": round(self.seconds),
            "rows": [{**asdict(row), **asdict(summary)} for row, summary in found if summary],
            "contests": {
                title: {"commands": self.commands[title], "rounds": [asdict(one) for one in rounds]}
                for title, rounds in self.rounds.items()
            },
        }
        temporary = self.path.with_name(f"{self.path.name}.part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self.path)

    def limits(self) -> dict[str, float]:
        """Medians of the machine's limits over all rounds that count, where they were measured."""
        ours = [one.figures[LLAMA2] for rounds in self.rounds.values() for one in rounds if one.counts]
        names = ("read GB/s", "int8 G/s")
        measured = {name: [figures[name] for figures in ours if name in figures] for name in names}
        return {name: statistics.median(values) for name, values in measured.items() if values}


def shown(program: Program, setting: Setting) -> str:
    """A program's command for readers, who have other folders."""
    folders = {str(setting.peers): "PEERS", str(setting.models): "MODELS", str(Path(__file__).parent): "bench"}
    words = [Path(sys.executable).name if word == sys.executable else word for word in program.command]
    for folder, name in folders.items():
        words = [word.replace(f"{folder}/", f"{name}/", 1) if word.startswith(f"{folder}/") else word for word in words]
    return shlex.join([*(f"{name}={value}" for name, value in program.environment.items()), *words])


def check(contest: Contest) -> None:
    """Raise SystemExit when a file is missing that the contest needs."""
    if not contest.model.exists():
        raise SystemExit(f"{contest.model} is not there; bench/models.py writes it")
    for program in contest.programs.values():
        if not Path(program.command[0]).exists():
            raise SystemExit(f"{program.command[0]} is not there; bench/peers.sh builds it")


def warm(contest: Contest, setting: Setting) -> None:
    """Bring what the first round reads into the page cache: the model's file, and llama2's packed form of it.

    Programs that are timed from their start run once.
    """
    with contest.model.open("rb") as file:
        while file.read(1 << 24):
            pass
    one = setting.llama2("generate", contest.model.stem, 64, "--max-tokens", 1, PROMPT)
    run(one, contest.programs[LLAMA2].environment)
    for program in contest.programs.values():
        if program.read is read_start:
            run(program.command, program.environment)
    os.sync()


def main() -> None:
    """Parse the command line, measure, print. Exit code 1 when a contest could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, required=True, help="the folder of bench/peers.sh")
    parser.add_argument("--models", type=Path, required=True, help="the folder of bench/models.py")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose title matches (default all)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that must count, of each row (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every program (default 2)")
    parser.add_argument("--real", type=float, default=REAL, help=f"share of them that needs a real core ({REAL})")
    parser.add_argument("-o", "--output", type=Path, default=Path("table.json"), help="JSON file (default table.json)")
    parser.add_argument("--resume", action="store_true", help="keep the rounds that the file has")
    options = parser.parse_args()

    setting = Setting(options.peers, options.models, options.threads)
    table = [row for row in rows() if re.search(options.rows, row.title)]
    if not table:
        titles = "; ".join(row.title for row in rows())
        raise SystemExit(f"--rows {options.rows} matches none of: {titles}")
    chosen = {title: contest for title, contest in contests(setting).items() if title in {row.contest for row in table}}
    for contest in chosen.values():
        check(contest)
    origin = {**provenance(), "threads": options.threads, "real": options.real, "pairs": options.pairs}
    record = Record(options.output, origin, wanted=options.pairs, resume=options.resume)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the program that is running is ended too
    try:
        complete = [measure(title, contest, setting, record, options.real) for title, contest in chosen.items()]
    except KeyboardInterrupt:
        print(f"\nstopped; --resume continues {options.output}", file=sys.stderr)
        sys.exit(130)
    lines = [HEADINGS, *(cells(row, record.found(row)) for row in table)]
    limits = "".join(f"{value:.4g} {name}; " for name, value in record.limits().items())
    notes = f"{options.threads} threads; medians of {options.pairs} rounds; {limits}{record.seconds / 60:.0f} minutes"
    print(f"{as_text(lines)}{notes}", file=sys.stderr)
    print(f"{as_markdown(lines)}\n{notes}")
    sys.exit(not all(complete))


def measure(title: str, contest: Contest, setting: Setting, record: Record, real: float) -> bool:
    """Add rounds of a contest to the record until as many count as are wanted. False, and a line on stderr, if not."""

    def figures(program: Program) -> Figures:
        return program.read(run(program.command, program.environment))

    rounds = record.begin(title, {name: shown(program, setting) for name, program in contest.programs.items()})
    if record.complete(title):
        return True
    print(f"{title} ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        warm(contest, setting)
        programs = {name: partial(figures, program) for name, program in contest.programs.items()}
        add_rounds(rounds, programs, wanted=record.wanted, threads=setting.threads, real=real, added=record.write)
    except MeasurementError as error:
        print(f"\n{title}: {error}", file=sys.stderr)
        return False
    print(f" {time.monotonic() - start:.0f} s", file=sys.stderr)
    return True


if __name__ == "__main__":
    main()
