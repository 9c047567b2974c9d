"""How far two models diverge on a text: perplexity, Kullback–Leibler divergence, and which token they put first.

The text is cut into windows that start afresh. A window's first token is BOS if the tokenizer adds one to raw prompts,
else the text's next token. Every later token is predicted from all before it in the window. Each prediction is one
position. T tokens  M positions  V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama2.engine.runner import Batch, Runner
from llama2.engine.scheduler import blocks_for
from llama2.text.tokenizer import Tokenizer

#: Rows of logits that are compared at once, to bound the memory of their float64 copies.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class DivergenceReport:
    """How a candidate's logits compare with a reference's, one value a position (M,)."""

    cosine: NDArray[np.float64]  # between the two rows of logits
    same_top: NDArray[np.bool_]  # both put the same token first
    divergence: NDArray[np.float64]  # KL(reference ‖ candidate) of the two distributions, nats
    loss: NDArray[np.float64]  # −log p(target) under the candidate, nats
    reference_loss: NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence[DivergenceReport]) -> DivergenceReport:
        """All positions of `parts`, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def summary(self) -> dict[str, float]:
        """The figures that are quoted. Perplexity is exp of the mean loss; both are over the same positions."""
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


def compare(
    candidate: NDArray[np.float32], reference: NDArray[np.float32], targets: NDArray[np.int32]
) -> DivergenceReport:
    """Compare logits (M, V) row by row, in float64; `targets` (M,) are the tokens that really came next."""
    parts = []
    for start in range(0, len(targets), _ROWS):
        some = slice(start, start + _ROWS)
        q, p = candidate[some].astype(np.float64), reference[some].astype(np.float64)
        log_q, log_p = log_softmax(q), log_softmax(p)
        rows = np.arange(len(q))
        part = DivergenceReport(
            cosine=(q * p).sum(axis=1) / (np.linalg.norm(q, axis=1) * np.linalg.norm(p, axis=1)),
            same_top=q.argmax(axis=1) == p.argmax(axis=1),
            divergence=kl_divergence(log_p, log_q),
            loss=-log_q[rows, targets[some]],
            reference_loss=-log_p[rows, targets[some]],
        )
        parts.append(part)
    return DivergenceReport.join(parts)


def kl_divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(P ‖ Q) of each row of log-probabilities, in nats."""
    result: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def windows(text: str, tokenizer: Tokenizer, width: int, positions: int) -> Iterator[NDArray[np.int32]]:
    """Token windows of at most `width` that hold `positions` predictions in all, or as many as the text has."""
    ids = tokenizer.encode(text)
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    while positions > 0 and len(first) + len(ids) > 1:
        size = min(width, positions + 1, len(first) + len(ids))
        yield np.array(first + ids[: size - len(first)], np.int32)
        ids = ids[size - len(first) :]
        positions -= size - 1


def logits(runner: Runner, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits after each of `tokens` but the last, (T − 1, V), of one sequence that starts afresh."""
    length = len(tokens)
    return runner.forward(
        Batch(
            tokens=tokens,
            positions=np.arange(length, dtype=np.int32),
            sequences=np.zeros(length, np.int32),
            blocks=np.arange(blocks_for(length), dtype=np.int32)[None],
            outputs=np.arange(length - 1, dtype=np.int32),
        )
    )
