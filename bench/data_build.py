"""What `llama2 data build` finds of what was planted, and how fast it is on one core.

Documents are made of words drawn at random, so that none resembles another by chance, and planted among them are copies
with some words replaced, benchmark samples with some words replaced, and personal information. For speed, text of a
folder goes through the full pipeline with one worker. One JSON object on stdout.

    python bench/data_build.py --text FOLDER --benchmarks FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2.data import personal
from llama2.data.build import build
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Shards
from llama2.records import installed
from llama2.text import trainer

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st", "ld", "mpet", "ving")]
#: Shares of a document's words that are replaced in a copy.
EDITS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def text(draw: random.Random, words: int) -> list[str]:
    """A document of so many words."""
    return draw.choices(WORDS, k=words)


def edited(draw: random.Random, words: list[str], share: float) -> list[str]:
    """A copy in which a share of the words, each at a random place, is another word."""
    copy = list(words)
    for place in draw.sample(range(len(words)), round(share * len(words))):
        copy[place] = "other" + draw.choice(WORDS)
    return copy


def recipe(folder: Path, **settings: Any) -> BuildRecipe:
    """A recipe for JSON lines in a folder, with one task."""
    base: dict[str, Any] = {
        "output": str(folder / "out"),
        "dir": str(folder),
        "sources": {"s": {"files": ["texts.jsonl"]}},
        "tokenizer": {"vocabulary": 700},
        "validation": 0,
        "executor": {"tasks": 1, "workers": 1},
    }
    return BuildRecipe.model_validate(base | settings)


def write(folder: Path, texts: list[str]) -> None:
    """The folder's documents."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))


def left(folder: Path) -> set[str]:
    """The first words of the documents that a corpus has, by which each is known."""
    shards = Shards.open(folder / "out", "train")
    bounds = [*shards.starts(0, shards.tokens).tolist(), shards.tokens]
    tokenizer = shards.load_tokenizer()
    starts = (shards.read(start, min(start + 40, stop)).tolist() for start, stop in pairwise(bounds))
    return {tokenizer.decode(start).split()[0] for start in starts}


def duplicates(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """`count` documents, and as many copies for each share of EDITS; each begins with a name of its own."""
    draw = random.Random(seed)
    originals = [text(draw, draw.randint(100, 600)) for _ in range(count)]
    documents = {f"original{i:05d}": words for i, words in enumerate(originals)}
    copies: dict[float, dict[str, tuple[list[str], list[str]]]] = {share: {} for share in EDITS}
    names = iter(range(10**6))
    part = count // len(EDITS)  # no original has two copies, one of which could betray the other
    for i, share in enumerate(EDITS):
        for words in originals[i * part : (i + 1) * part]:
            copies[share][f"copy{next(names):06d}"] = (words, edited(draw, words, share))
    for share in EDITS:
        documents |= {name: copy for name, (_, copy) in copies[share].items()}
    order = list(documents)
    draw.shuffle(order)
    write(folder, [" ".join([name, *documents[name]]) for name in order])
    build(recipe(folder))
    kept = left(folder)
    originals_of = {id(words): f"original{i:05d}" for i, words in enumerate(originals)}
    found = {
        share: sum(not {name, originals_of[id(words)]} <= kept for name, (words, _) in copies[share].items())
        / len(copies[share])
        for share in EDITS
    }
    copied = {originals_of[id(words)] for each in copies.values() for words, _ in each.values()}
    removed = set(order) - kept
    right = {name for name in removed if name.startswith("copy") or name in copied}
    return {
        "documents": len(order),
        "removed": len(removed),
        "precision": len(right) / len(removed),
        "recall_by_share_of_words_replaced": found,
        "recall_to_expect": {
            share: sum(1 - (1 - _similarity(*pair) ** 8) ** 14 for pair in copies[share].values()) / len(copies[share])
            for share in EDITS
        },
    }


def _similarity(first: list[str], second: list[str]) -> float:
    """Jaccard similarity of the sets of 5-grams."""
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (first, second))
    return len(a & b) / len(a | b)


def contamination(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """`count` samples of 60 words, each planted into a document of its own with so many words replaced; half of all
    documents have none.
    """
    draw = random.Random(seed)
    samples = [text(draw, 60) for _ in range(count)]
    (folder / "benchmark.jsonl").write_text("".join(json.dumps({"q": " ".join(words)}) + "\n" for words in samples))
    settings = {"benchmarks": {"b": {"files": ["benchmark.jsonl"]}}}
    result: dict[str, Any] = {}
    for replaced in (0, 1, 2, 4, 60):
        texts = []
        for words in samples:
            around = text(draw, 400)
            texts.append(" ".join(around[:200] + edited(draw, words, replaced / 60) + around[200:]))
            texts.append(" ".join(text(draw, 400)))
        write(folder, texts)
        build(recipe(folder, decontamination=settings), force=True)
        card = json.loads((folder / "out/card/card.json").read_bytes())["contamination"]
        result[str(replaced)] = {
            "found": card["benchmarks"]["b"]["before"]["not clean"] / count,
            "left": card["benchmarks"]["b"]["after"]["not clean"] / count,
            "documents_cut": card["cut"]["documents"],
            "tokens_cut": card["cut"]["tokens"],
        }
    return {"samples": count, "by_words_replaced": result}


def _luhn(draw: random.Random) -> str:
    digits = [draw.choice([4, 5]), *(draw.randrange(10) for _ in range(14))]
    total = sum(digit if i % 2 else sum(divmod(2 * digit, 10)) for i, digit in enumerate(digits))
    return "".join(map(str, [*digits, -total % 10]))


def _iban(draw: random.Random) -> str:
    account = "".join(str(draw.randrange(10)) for _ in range(18))
    return f"DE{98 - int(account + '131400') % 97:02d}{account}"


PLANTED: dict[str, Callable[[random.Random], str]] = {
    "EMAIL": lambda draw: (
        f"{draw.choice(WORDS)}.{draw.choice(WORDS)}@{draw.choice(WORDS)}.{draw.choice(['com', 'org', 'co.uk'])}"
    ),
    "PHONE": lambda draw: draw.choice(["({}) {}-{}", "{}-{}-{}", "+1 {} {} {}", "{}.{}.{}"]).format(
        draw.randint(201, 989), draw.randint(201, 989), draw.randint(1000, 9999)
    ),
    "IP": lambda draw: f"{draw.randint(11, 99)}.{draw.randint(1, 254)}.{draw.randint(1, 254)}.{draw.randint(1, 254)}",
    "SSN": lambda draw: f"{draw.randint(101, 599)}-{draw.randint(10, 99)}-{draw.randint(1000, 9999)}",
    "CARD": _luhn,
    "IBAN": _iban,
}
#: Numbers that are nobody's.
HARMLESS: dict[str, Callable[[random.Random], str]] = {
    "date": lambda draw: f"{draw.randint(1900, 2030)}-{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}",
    "years": lambda draw: f"{draw.randint(1900, 1960)}-{draw.randint(1961, 2030)}",
    "decimal": lambda draw: f"{draw.random():.12f}",
    "thousands": lambda draw: f"{draw.randrange(10**9, 10**12):,}",
    "private address": lambda draw: f"192.168.{draw.randrange(256)}.{draw.randrange(256)}",
    "ISBN": lambda draw: (
        f"978-{draw.randrange(10)}-{draw.randrange(100, 1000)}-{draw.randrange(10000, 100000)}-{draw.randrange(10)}"
    ),
    "sixteen digits": lambda draw: (card := _luhn(draw))[:-1] + str((int(card[-1]) + 1) % 10),
    "decorator": lambda draw: f"@{draw.choice(WORDS)}.{draw.choice(WORDS)}",
}


def private(count: int, seed: int) -> dict[str, Any]:
    """Each kind `count` times amid words: the share that is replaced, by its right name for what is planted."""
    draw = random.Random(seed)

    def share(make: Callable[[random.Random], str], kind: str | None) -> float:
        hits = 0
        for _ in range(count):
            found = personal.replace(" ".join([*text(draw, 5), make(draw), *text(draw, 5)]))[1]
            hits += found == {kind: 1} if kind else bool(found)
        return hits / count

    return {
        "each": count,
        "replaced": {kind: share(make, kind) for kind, make in PLANTED.items()},
        "replaced_wrongly": {name: share(make, None) for name, make in HARMLESS.items()},
    }


def speed(folder: Path, source: Path, benchmarks: Path | None, megabytes: int) -> dict[str, Any]:
    """MB/s of the full pipeline with one worker, once a vocabulary of 32,000 tokens is there."""
    pieces: list[str] = []
    size = 0
    for file in sorted(source.glob("**/*.txt")):
        for part in file.read_text(encoding="utf-8", errors="replace").split("\n\n\n"):
            pieces.append(part)
            size += len(part.encode())
        if size > megabytes * 1e6:
            break
    model = folder / "tokenizer.model"
    model.write_bytes(trainer.train(pieces, 32000, sample=200_000).model)
    write(folder, pieces)
    decontamination: dict[str, Any] = {}
    if benchmarks:
        decontamination = {
            "dir": str(benchmarks),
            "benchmarks": {"arc": {"files": ["arc/*.jsonl"]}, "gsm8k": {"files": ["gsm8k/test.jsonl"]}},
        }
    sources = {"s": {"files": ["texts.jsonl"], "languages": ["en"], "quality": True}}
    plan = recipe(folder, tokenizer={"file": str(model)}, sources=sources, decontamination=decontamination)
    cpu, wall = time.process_time(), time.perf_counter()
    build(plan, force=True)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    size = (folder / "texts.jsonl").stat().st_size
    return {
        "megabytes": size / 1e6,
        "documents": len(pieces),
        "seconds": wall,
        "processor_seconds": cpu,
        "megabytes_per_second": size / 1e6 / wall,
        "megabytes_per_processor_second": size / 1e6 / cpu,
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "declared_memory_megabytes": plan.executor.memory * 1000,
    }


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a folder of text files for the speed; none: not measured")
    parser.add_argument("--benchmarks", type=Path, help="a folder with arc/ and gsm8k/ to keep out of it")
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--count", type=int, default=600, help="originals, samples, and items of each kind")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "duplicates": lambda place: duplicates(place, options.count, options.seed),
        "contamination": lambda place: contamination(place, options.count // 2, options.seed),
        "personal": lambda _: private(options.count, options.seed),
    }
    if options.text:
        measures["speed"] = lambda place: speed(place, options.text, options.benchmarks, options.megabytes)
    result: dict[str, Any] = {}
    for name, measure in measures.items():
        with tempfile.TemporaryDirectory() as place:
            result[name] = measure(Path(place))
    json.dump({**provenance(), "datatrove": installed("datatrove"), **result}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
