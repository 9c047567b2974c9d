"""How well a watermark is found, what it costs in quality, and in speed.

Texts of a model, marked and not, are cut to several lengths and then cropped, or have words replaced or deleted. The
detector sees the text alone. Its p-values of unmarked texts, the model's and books', must be uniform, which a
Kolmogorov-Smirnov test checks. Perplexity is the model's own of what it drew. Speed is decoding alone, in rounds of
marked and unmarked answers in turn.

    python bench/watermark.py detect smollm2-135m-instruct --data DIR -o watermark.json
    python bench/watermark.py detect MODEL --data DIR --marked 4 --unmarked 8 --lengths 60 -o tiny.json
    python bench/watermark.py speed smollm2-135m-instruct -o watermark-speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

import llama2
from llama2.api import Model
from llama2.classify.training import proportion
from llama2.engine.answer import Answer, collect
from llama2.engine.request import Request, Sampling
from llama2.engine.watermark import Kgw, SynthId, Watermark
from llama2.safety.detection import binomial_tail, detect_text

#: Answers that the engine has at once.
_BATCH = 32


def watermarks(seed: int) -> dict[str, Watermark]:
    """Both schemes, with keys of a seed."""
    rng = random.Random(seed)
    return {"synthid": SynthId(tuple(rng.getrandbits(62) for _ in range(30))), "kgw": Kgw(rng.getrandbits(39) + 1)}


def openings(data: Path, count: int) -> list[str]:
    """Beginnings of stories to continue: the first words of paragraphs of public books."""
    found: list[str] = []
    for book in sorted((data / "gutenberg").rglob("*.txt")):
        for paragraph in book.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            words = paragraph.split()
            if len(words) > 60:
                found.append(" ".join(words[:12]))
    random.Random(0).shuffle(found)
    return [found[i % len(found)] for i in range(count)]


def paragraphs(data: Path, words: int, count: int) -> list[str]:
    """Runs of so many words of public books, which nobody marked."""
    found: list[str] = []
    for book in sorted((data / "gutenberg").rglob("*.txt")):
        text = book.read_text(encoding="utf-8", errors="replace").split()
        found += [" ".join(text[at : at + words]) for at in range(1000, len(text) - words, words)]
    random.Random(1).shuffle(found)
    return found[:count]


def write(model: Model, starts: Sequence[str], length: int, sampling: Sampling, mark: Watermark | None) -> list[Answer]:
    """Continuations of exactly `length` tokens, each with a seed of its own."""
    never = dict.fromkeys(model.tokenizer.stop_ids, -math.inf)
    answers: list[Answer] = []
    for first in range(0, len(starts), _BATCH):
        requests = [
            Request(
                tuple(model.encode(start)),
                length,
                replace(sampling, seed=first + i, logit_bias=never),
                logprobs=0,
                raw_completion=True,
                watermark=mark,
            )
            for i, start in enumerate(starts[first : first + _BATCH])
        ]
        answers += collect(model.engine.run(*requests), requests)
    return answers


def cropped(text: str, rng: random.Random) -> str:
    """The middle half of a text, by words."""
    words = text.split()
    return " ".join(words[len(words) // 4 : len(words) // 4 + len(words) // 2])


def replaced(text: str, rng: random.Random) -> str:
    """A fifth of the words exchanged for other words of the text."""
    words = text.split()
    for at in rng.sample(range(len(words)), len(words) // 5):
        words[at] = rng.choice(words)
    return " ".join(words)


def deleted(text: str, rng: random.Random) -> str:
    """Without a fifth of the words."""
    words = text.split()
    gone = {*rng.sample(range(len(words)), len(words) // 5)}
    return " ".join(word for at, word in enumerate(words) if at not in gone)


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "clean": lambda text, rng: text,
    "half cropped": cropped,
    "20 % replaced": replaced,
    "20 % deleted": deleted,
}


def p_values(mark: Watermark, texts: Sequence[str], model: Model) -> list[float]:
    """P-values, 1 where nothing can be said."""
    found = (detect_text(mark, text, model.tokenizer).p_value for text in texts)
    return [1.0 if p is None else p for p in found]


def randomised(mark: Watermark, texts: Sequence[str], model: Model) -> list[float]:
    """P-values with ties broken at random, which are uniform also where a sum has few values; scored texts alone."""
    rng, found = random.Random(0), (detect_text(mark, text, model.tokenizer) for text in texts)
    return [
        above + rng.random() * (each.p_value - above)
        for each in found
        if each.p_value is not None
        for above in [binomial_tail(each.set_bits + 1, each.bits, each.expected)]
    ]


def detection(options: argparse.Namespace) -> dict[str, Any]:
    """True and false positives by scheme, length, temperature and edit; uniformity; perplexity."""
    from scipy.stats import kstest

    record: dict[str, Any] = {"rows": [], "uniform": [], "perplexity": []}
    with llama2.load(options.model, sequences=8) as model:
        starts = openings(options.data, max(options.marked, options.unmarked))
        for temperature, top_p in ((1.0, 1.0), (0.6, 0.9)):
            sampling = Sampling(temperature, top_p)
            longest = max(options.lengths)
            plain = write(model, starts[: options.unmarked], longest, sampling, None)
            for name, mark in watermarks(0).items():
                marked = write(model, starts[: options.marked], longest, sampling, mark)
                pair = {"scheme": name, "temperature": temperature, "marked": nats(marked), "plain": nats(plain)}
                record["perplexity"].append(pair)
                for length in options.lengths:
                    texts = [model.tokenizer.decode(each.token_ids[:length]) for each in plain]
                    own = p_values(mark, texts, model)
                    books = paragraphs(options.data, length * 3 // 4, options.unmarked)
                    for source, given in (("the model", texts), ("books", books)):
                        row = {"scheme": name, "temperature": temperature, "length": length, "source": source}
                        positives = proportion(np.array(p_values(mark, given, model)) <= 0.01)
                        values = randomised(mark, given, model)
                        ks = float(kstest(values, "uniform").pvalue)
                        record["uniform"].append({**row, "n": len(values), "false positives": positives, "KS p": ks})
                    limit = float(np.quantile(own, 0.01))  # 1 % false positives, by the unmarked texts themselves
                    whole = [model.tokenizer.decode(each.token_ids[:length]) for each in marked]
                    for edit, change in EDITS.items():
                        rng = random.Random(length)
                        edited = np.array(p_values(mark, [change(text, rng) for text in whole], model))
                        record["rows"].append(
                            {
                                **{"scheme": name, "temperature": temperature, "length": length, "edit": edit},
                                "true positives at p <= 0.01": proportion(edited <= 0.01),
                                "true positives at 1 % false ones": proportion(edited <= limit),
                            }
                        )
    return record


def nats(answers: Sequence[Answer]) -> dict[str, float]:
    """The model's perplexity of what was drawn, and its standard error in nats a token."""
    means = [statistics.fmean(each.logprob for each in answer.logprobs or ()) for answer in answers]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return {"perplexity": math.exp(-statistics.fmean(means)), "standard error, nats": error}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Decoding, tokens a second, without and with each scheme, in turn."""
    rows = []
    with llama2.load(options.model, sequences=8) as model:
        prompt = tuple(model.encode("The history of bread began"))
        never = dict.fromkeys(model.tokenizer.stop_ids, -math.inf)
        for temperature, top_p in ((0.6, 0.9), (1.0, 1.0)):
            for streams in (1, 8):
                rates: dict[str, list[float]] = {}
                for round in range(options.rounds + 1):  # the first warms up
                    for name, mark in {"plain": None, **watermarks(0)}.items():
                        sampling = Sampling(temperature, top_p, logit_bias=never, seed=round)
                        asked = [
                            Request(prompt, options.tokens, sampling, choice=i, watermark=mark, raw_completion=True)
                            for i in range(streams)
                        ]
                        begun = time.perf_counter()
                        count = sum(len(answer.token_ids) for answer in collect(model.engine.run(*asked), asked))
                        if round:
                            rates.setdefault(name, []).append(count / (time.perf_counter() - begun))
                base = rates["plain"]
                for name, values in rates.items():
                    ratios = [value / other for value, other in zip(values, base, strict=True)]
                    row = {"temperature": temperature, "top_p": top_p, "streams": streams, "scheme": name}
                    rows.append({**row, "rates": values, "ratio to plain, median": statistics.median(ratios)})
    return {"rows": rows}


def main() -> None:
    """Read the command line, measure, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("detect", "speed"))
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="folder of the sets, for detect")
    parser.add_argument("--marked", type=int, default=500)
    parser.add_argument("--unmarked", type=int, default=5000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    found = detection(options) if options.what == "detect" else speed(options)
    options.output.write_text(json.dumps({"provenance": provenance(), **found}, indent=1))
    for row in (row for part in found.values() for row in part):
        print(json.dumps({name: value for name, value in row.items() if name != "rates"}))


if __name__ == "__main__":
    main()
