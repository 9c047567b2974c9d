"""How much a runner's arithmetic costs in quality: teacher-forced comparison with the NumPy oracle on real text.

The text is cut into windows of `--window` tokens that start afresh. A window's first token is BOS if the tokenizer
adds one to raw prompts, else the text's next token; every later token is predicted from all before it in the window,
and each prediction is one position of the result. Perplexity is exp of the mean negative log-probability of the text's
own tokens, in nats. One JSON object on stdout.

    python bench/quality.py -m MODEL.gguf --text wikitext-2-test.txt
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from provenance import provenance

from llama2 import checkpoint
from llama2.engine.runner import BLOCK, Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.text.tokenizer import Tokenizer

#: Rows of logits that are compared at once, to bound the memory of their float64 copies.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a candidate's logits compare with a reference's, one value a position (M,)."""

    cosine: NDArray[np.float64]  # between the two rows of logits
    same_top: NDArray[np.bool_]  # both put the same token first
    divergence: NDArray[np.float64]  # KL(reference ‖ candidate) of the two distributions, nats
    loss: NDArray[np.float64]  # −log p(target) under the candidate, nats
    reference_loss: NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence[Agreement]) -> Agreement:
        """All positions of `parts`, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def summary(self) -> dict[str, float]:
        """The figures that are quoted; perplexities are over the same positions."""
        perplexity, reference = float(np.exp(self.loss.mean())), float(np.exp(self.reference_loss.mean()))
        return {
            "positions": len(self.cosine),
            "cosine_min": float(self.cosine.min()),
            "cosine_mean": float(self.cosine.mean()),
            "top1_agreement": float(self.same_top.mean()),
            "kl_mean": float(self.divergence.mean()),
            "kl_max": float(self.divergence.max()),
            "perplexity": perplexity,
            "reference_perplexity": reference,
            "perplexity_change": perplexity / reference - 1,
        }


def compare(candidate: NDArray[np.float32], reference: NDArray[np.float32], targets: NDArray[np.int32]) -> Agreement:
    """Compare logits (M, V) row by row, in float64; `targets` (M,) are the tokens that really came next."""
    q, p = candidate.astype(np.float64), reference.astype(np.float64)
    log_q, log_p = log_softmax(q), log_softmax(p)
    rows = np.arange(len(targets))
    return Agreement(
        cosine=(q * p).sum(axis=1) / (np.linalg.norm(q, axis=1) * np.linalg.norm(p, axis=1)),
        same_top=q.argmax(axis=1) == p.argmax(axis=1),
        divergence=(np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        loss=-log_q[rows, targets],
        reference_loss=-log_p[rows, targets],
    )


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def windows(text: str, tokenizer: Tokenizer, width: int, positions: int) -> Iterator[NDArray[np.int32]]:
    """Token windows of at most `width` that hold `positions` predictions in all; see the module's docstring."""
    ids = tokenizer.encode(text)
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    while positions:
        size = min(width, positions + 1)
        body, ids = ids[: size - len(first)], ids[size - len(first) :]
        if len(body) < size - len(first):
            raise SystemExit(f"the text ends {positions} positions too soon; give a longer one or fewer --positions")
        yield np.array(first + body, np.int32)
        positions -= size - 1


def logits(runner: Runner, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits after each of `tokens` but the last, (T − 1, V), of one sequence that starts afresh."""
    T = len(tokens)
    return runner.forward(
        Batch(
            tokens=tokens,
            positions=np.arange(T, dtype=np.int32),
            sequences=np.zeros(T, np.int32),
            blocks=np.arange(-(-T // BLOCK), dtype=np.int32)[None],
            outputs=np.arange(T - 1, dtype=np.int32),
        )
    )


def measure(model: Path, text: str, *, window: int, positions: int, threads: int) -> dict[str, object]:
    """Compare the native runner with the NumPy runner on `text`."""
    with checkpoint.open(model) as opened:
        blocks = -(-window // BLOCK)
        runners: dict[str, Runner] = {
            "native": NativeRunner(opened, blocks, threads=threads),
            "numpy": NumpyRunner(opened, blocks),
        }
        seconds = dict.fromkeys(runners, 0.0)
        parts = []
        for tokens in windows(text, opened.tokenizer, window, positions):
            rows = {}
            for name, runner in runners.items():
                start = time.perf_counter()
                rows[name] = logits(runner, tokens)
                seconds[name] += time.perf_counter() - start
            for i in range(0, len(tokens) - 1, ROWS):
                part = slice(i, i + ROWS)
                parts.append(compare(rows["native"][part], rows["numpy"][part], tokens[1:][part]))
        return {
            "model": model.name,
            "window": window,
            "bos": opened.tokenizer.add_bos,
            "threads": threads,
            **Agreement.join(parts).summary(),
            "seconds": seconds,
        }


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--window", type=int, default=512, help="tokens of context that start afresh (default 512)")
    parser.add_argument("--positions", type=int, default=20_000, help="predictions to compare (default 20000)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the native runner (default 2)")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    figures = measure(options.model, text, window=options.window, positions=options.positions, threads=options.threads)
    json.dump({**provenance(), "text": options.text.name, **figures}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
