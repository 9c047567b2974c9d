"""Does `llama2 evaluate` find what lm-evaluation-harness's own backends find on the same items, and how fast is it?

The items are drawn as `--limit` draws them, with the harness's own prompts. Each side is a process that answers them:

- `engine`: our engine on the F32 conversion of a model; `quantized`: on the model itself.
- `transformers`: the harness's transformers backend on the F32 conversion, in float32.
- `http`: the harness's local-completions, unmodified, against `llama2 serve` with the remote tokenizer.

Each side's answers are kept beside the output, in FILE.answers, as they come. A run that was ended goes on from them.

Log-likelihoods are compared pair by pair, accuracies item by item. Items on which they differ are listed with the
margin between the two likeliest choices. Answers that differ are listed with the margin between the two tokens where
they part.

With `--speed N`, N items of MMLU with 5 examples and of HellaSwag are divided into slices. The sides run one after the
other on each: our engine on the model with and without prefix sharing, and transformers in float32 and bfloat16. These
have the batch size that was fastest on the first slice. Nothing else may run beside.

    pip install 'whole-llama[evaluate]' 'lm_eval[hf,api]==0.4.13'       # and PyTorch, in an environment of its own
    llama2 convert smollm2-135m-instruct smollm2-f32 --to hf --format F32
    python bench/evaluate_peers.py smollm2-f32 --data DIR --items 500 --answers 100 -o evaluate_peers.json
    python bench/evaluate_peers.py smollm2-f32 --data DIR --items 0 --speed 1000 -o evaluate_speed.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from provenance import provenance

import llama2
from llama2 import native
from llama2.engine.answer import collect
from llama2.engine.request import Request
from llama2.evaluate import rows as sets
from llama2.evaluate import task as tasks
from llama2.evaluate.comparison import compare
from llama2.evaluate.strata import sample

TASKS = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "boolq", "lambada")
SIDES = ("quantized", "transformers", "http")
BATCHES = (1, 8, 32, 128)  # of transformers, that are tried
#: Nats between log-likelihoods that count as equal.
TOLERANCE = 0.02
SLICES = 10

Pairs = Sequence[tuple[str, str]]


# What runs in a side's process.


@contextmanager
def served(folder: str) -> Iterator[int]:
    """The port of a server of a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama2", "serve", "-m", folder, "--port", str(port)]
    server = subprocess.Popen(command, stdout=sys.stderr)
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def backend(side: str, model: str, stack: ExitStack) -> Any:
    """The harness's model of a side."""
    if side.startswith("transformers"):
        from lm_eval.models.huggingface import HFLM

        dtype = side.partition("-")[2] or "float32"
        return HFLM(pretrained=model, dtype=dtype, device="cpu", batch_size=8)
    if side == "http":
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        port = stack.enter_context(served(model))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as found:
            name = json.load(found)["data"][0]["id"]
        return LocalCompletionsAPI(
            model=name, base_url=f"http://127.0.0.1:{port}/v1/completions", tokenizer_backend="remote", max_length=8192
        )
    from llama2.evaluate.harness import EngineLM

    return EngineLM(stack.enter_context(llama2.load(model, sequences=4, cache_type="float16")))


def unshared(lm: Any, pairs: Pairs) -> list[tuple[float, bool]]:
    """Log-likelihoods by a request for each pair, which computes all of its tokens."""
    queries = [lm.likelihood(*pair) for pair in pairs]
    requests = [
        Request(q.context + q.continuation, 0, logprobs=1, score_from=len(q.context), cache_prompt=False)
        for q in queries
    ]
    scores = [answer.prompt_logprobs or () for answer in collect(lm.model.engine.run(*requests), requests)]
    return [(math.fsum(x.logprob for x in row), all(x.top[0][0] == x.token for x in row)) for row in scores]


def work(side: str, model: str) -> None:
    """Answer requests, one JSON object a line, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    from lm_eval.api.instance import Instance

    with ExitStack() as stack:
        lm = backend(side, model, stack)
        print("{}", file=out, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            instances = [Instance(asked["kind"], {}, tuple(each), i) for i, each in enumerate(asked["requests"])]
            if "batch" in asked:
                lm.batch_size_per_gpu = asked["batch"]
            begun = time.perf_counter()
            if side == "unshared":
                answers: Any = unshared(lm, asked["requests"])
            else:
                answers = getattr(lm, asked["kind"])(instances, disable_tqdm=True)
            print(json.dumps({"seconds": time.perf_counter() - begun, "answers": answers}), file=out, flush=True)


# What runs in the process that asks.


class Side:
    """A side's process."""

    def __init__(self, name: str, model: str) -> None:
        command = [sys.executable, __file__, model, "--side", name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        self.name, self.model = name, model
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its errors are above")
        found: dict[str, Any] = json.loads(line)
        return found

    def kept(self, name: str, kind: str, requests: Sequence[Any], folder: Path) -> list[Any]:
        """The answers to requests, from the folder if they are there."""
        isa = "" if self.name.startswith("transformers") else native.module(cache_type="float16").isa
        digest = hashlib.sha256(json.dumps([self.name, self.model, isa, kind, requests]).encode()).hexdigest()
        path = folder / f"{self.name}-{name}-{digest[:12]}.json"
        if not path.exists():
            found, seconds = self.ask(kind, requests)
            print(f"{self.name}: {name}, {len(requests)} requests in {seconds:.1f} s", file=sys.stderr)
            folder.mkdir(exist_ok=True)
            path.write_text(json.dumps(found))
        answers: list[Any] = json.loads(path.read_text())
        return answers

    def ask(self, kind: str, requests: Sequence[Any], batch: int | None = None) -> tuple[list[Any], float]:
        """The answers to requests, and in how many seconds."""
        assert self.process.stdin
        more = {} if batch is None else {"batch": batch}
        print(json.dumps({"kind": kind, "requests": requests, **more}), file=self.process.stdin, flush=True)
        found = self._read()
        return found["answers"], found["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def side(name: str, model: str) -> Iterator[Side]:
    """A side's process, ended on leaving."""
    made = Side(name, model)
    try:
        yield made
    finally:
        made.close()


def drawn(lm: Any, name: str, data: Path, count: int) -> tuple[Any, list[Any]]:
    """The harness's task of a name, and `count` of its items."""
    from llama2.evaluate.items import parts

    task = tasks.load(name)
    splits, _ = sets.read(task, data)
    found = parts(task, splits, "harness")
    rows = [(id, row) for part in found for id, row in zip(part.ids, part.rows, strict=True)]
    strata = [str(row[task.stratum]) for _, row in rows] if task.stratum else None
    wanted = {rows[i][0] for i in sample(len(rows), count, 0, strata)}
    items = [item for part in found for item in part.items(lm, wanted, seed=0, chat=False)]
    return found[0].inner, [item for item in items if item.refused is None]


def values(inner: Any, items: Sequence[Any], answers: Sequence[Sequence[Any]]) -> list[dict[str, float]]:
    """Each item's values by metric, as the harness computes them."""
    waiting = iter([tuple(answer) for answer in answers])
    found = []
    for item in items:
        results = [next(waiting) for _ in item.instances]
        shown = inner.process_results(item.instances[0].doc, results)
        found.append({name: float(value) for name, value in shown.items() if name in ("acc", "acc_norm")})
    return found


def compared(inner: Any, items: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """How far log-likelihoods are apart, and the accuracies with the items on which they differ."""
    apart = [abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]
    rows: dict[str, Any] = {
        "pairs": len(apart),
        "largest difference, nats": max(apart),
        "mean difference, nats": sum(apart) / len(apart),
        "within 0.02 nats": sum(each <= TOLERANCE for each in apart),
    }
    found = [values(inner, items, each) for each in (ours, theirs)]
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item.instances))
    for metric in found[0][0]:
        a, b = ({item.id: value[metric] for item, value in zip(items, each, strict=True)} for each in found)
        differing = [i for i, item in enumerate(items) if a[item.id] != b[item.id]]
        rows[metric] = {
            "paired": compare(a, b).to_json(),
            "differing": {
                items[i].id: margin(ours[ends[i] : ends[i + 1]], theirs[ends[i] : ends[i + 1]]) for i in differing
            },
        }
    return rows


def margin(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Log-likelihoods of an item's choices on both sides, and how far the two likeliest of ours are apart."""
    best = sorted((each[0] for each in ours), reverse=True)
    apart = best[0] - best[1] if len(best) > 1 else None
    return {"margin": apart, "ours": [each[0] for each in ours], "theirs": [each[0] for each in theirs]}


def parting(lm: Any, prompt: str, ours: str, theirs: str) -> dict[str, Any]:
    """Where two answers to a prompt part, and how far the two tokens are apart there, in nats by our engine."""
    from llama2.engine.scoring import score

    encode = lm.model.tokenizer.encode
    context = lm.tok_encode(prompt)
    end = lm.eot_token_id
    a, b = ([*encode(text), end] for text in (ours, theirs))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)) - 1)
    before = [*context, *a[:at]]
    found = {
        each.pair: float(each.logprobs[0]) for each in score(lm.model.engine, [(before, [a[at]]), (before, [b[at]])])
    }
    return {"token": at, "margin": abs(found[0] - found[1]), "ours": ours, "theirs": theirs}


def agreement(lm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Every task by every side, and answers to GSM8K."""
    models = {"engine": options.model}
    models |= {name: options.quantized if name == "quantized" else options.model for name in options.sides}
    chosen = {name: drawn(lm, name, options.data, options.items) for name in options.tasks} if options.items else {}
    answers: dict[str, dict[str, Any]] = {}
    questions = drawn(lm, "gsm8k", options.data, options.answers)[1] if options.answers else []
    asked = [item.instances[0].args for item in questions]
    written: dict[str, list[str]] = {}
    folder = options.output.with_suffix(".answers")
    for name, model in models.items():
        with side(name, model) as each:
            answers[name] = {}
            for task, (_, items) in chosen.items():
                pairs = [instance.args for item in items for instance in item.instances]
                answers[name][task] = each.kept(task, "loglikelihood", pairs, folder)
            if asked and name in ("engine", "transformers"):
                written[name] = each.kept("gsm8k", "generate_until", asked, folder)
    rows: dict[str, Any] = {}
    for task, (inner, items) in chosen.items():
        ours = answers["engine"][task]
        others = {
            name: compared(inner, items, ours, found[task]) for name, found in answers.items() if name != "engine"
        }
        rows[task] = {"items": len(items), "engine beside": others}
    if "transformers" in written:
        both = list(zip(questions, written["engine"], written["transformers"], strict=True))
        differing = {item.id: parting(lm, item.prompt, a, b) for item, a, b in both if a != b}
        rows["gsm8k"] = {"answers": len(asked), "equal": len(asked) - len(differing), "differing": differing}
    return rows


def speed(lm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every side for each slice of each set."""
    models = {"engine": options.quantized, "unshared": options.quantized}
    models |= {"transformers-float32": options.model, "transformers-bfloat16": options.model}
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side(name, model)) for name, model in models.items()}
        for task in ("mmlu", "hellaswag"):
            _, items = drawn(lm, task, options.data, options.speed)
            # Neighbours stay together, as in a whole run: they may have examples in common.
            cuts = [i * len(items) // SLICES for i in range(SLICES + 1)]
            slices = [items[a:b] for a, b in pairwise(cuts) if a < b]
            asked = [[instance.args for item in some for instance in item.instances] for some in slices]
            first = asked[0][:40]
            batches = {
                name: min(BATCHES, key=lambda n, s=each: s.ask("loglikelihood", first, n)[1])  # type: ignore[misc]
                for name, each in sides.items()
                if name.startswith("transformers")
            }
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for turn, pairs in enumerate(asked):
                order = list(sides)
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    seconds[name].append(sides[name].ask("loglikelihood", pairs, batches.get(name))[1])
                    print(f"{task}, slice {turn + 1}: {name} {seconds[name][-1]:.1f} s", file=sys.stderr)
            total = {name: sum(each) for name, each in seconds.items()}
            peer = min(total["transformers-float32"], total["transformers-bfloat16"])
            rows[task] = {
                "items": len(items),
                "batch sizes": batches,
                "seconds of each slice": seconds,
                "items a second": {name: len(items) / each for name, each in total.items()},
                "times the faster transformers": {name: peer / total[name] for name in ("engine", "unshared")},
            }
    return rows


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The record in Markdown."""
    columns = (
        "set",
        "side",
        "pairs",
        "largest difference, nats",
        "within 0.02",
        "accuracy, ours and theirs",
        "differing",
    )
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for task, row in found["agreement"].items():
        for name, each in row.get("engine beside", {}).items():
            acc, apart = each["acc"], each["largest difference, nats"]
            accuracies = f"{acc['paired']['mean_a']:.3f}, {acc['paired']['mean_b']:.3f}"
            cells = (task, name, each["pairs"], f"{apart:.4f}", each["within 0.02 nats"], accuracies)
            yield f"| {' | '.join(map(str, cells))} | {len(acc['differing'])} |"
        if task == "gsm8k":
            margins = ", ".join(f"{each['margin']:.4f}" for each in row["differing"].values())
            yield f"| gsm8k | transformers | {row['answers']} answers, {row['equal']} equal | | | | {margins} |"
    for task, row in found["speed"].items():
        each = ", ".join(f"{name} {value:.1f}" for name, value in row["items a second"].items())
        yield f"\n{task}, items a second: {each}"


def main() -> None:
    """Read the command line, ask every side, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the F32 conversion")
    parser.add_argument("--quantized", default=llama2.hub.DEFAULT, help="the model that was converted")
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--tasks", type=lambda names: names.split(","), default=list(TASKS))
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES, help="what our engine is compared with")
    parser.add_argument("--items", type=int, default=500, help="items of each task")
    parser.add_argument("--answers", type=int, default=0, help="answers to GSM8K")
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="measure speed on N items")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.model)
        return
    if options.data is None or options.output is None:
        parser.error("--data and --output are needed")
    from llama2.evaluate.harness import EngineLM

    with llama2.load(options.model, sequences=4, cache_type="float16") as model:
        lm = EngineLM(model)
        found = {"provenance": provenance(), "agreement": agreement(lm, options)}
        found["speed"] = speed(lm, options) if options.speed else {}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
