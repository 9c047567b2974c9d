"""Preference pairs as batches: both answers of a pair in one batch, each sequence ending at its answer's end token.

Sequences share rows where they fit, as documents that do not read each other. None is cut.

B pairs  N tokens of all sequences  R rows  T tokens of a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama2.data.comparisons import SAFETY, PairReport, PreferencePair
from llama2.data.dialog_forms import TrainingDialog
from llama2.data.dialogs import pack, render
from llama2.errors import DataError, DialogError, TemplateError, TokenizerError
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Tokenizer

_UNIT = 64  # tokens that a row's length is a multiple of
_UNLABELLED = (np.nan, np.nan)


def scored_tokens(
    dialog: Dialog, tokenizer: Tokenizer, template: str | None, *, neutralise: bool = False
) -> NDArray[np.int32]:
    """A dialog's token ids (n,) up to the end token of its last answer, where a reward model reads the score.

    What a template writes behind it is left out. Raises as Dialog.render does, and DialogError for a dialog without an
    answer at its end.
    """
    if dialog.messages[-1].role != "assistant":
        raise DialogError("the dialog ends without an answer of the assistant; add one")
    example = render(TrainingDialog(dialog), tokenizer, template, neutralise=neutralise)
    return example.tokens[: np.flatnonzero(example.loss_mask)[-1] + 1]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair's sequences, which both end at the answer's end token, its margin, and which sides are safe."""

    chosen: NDArray[np.int32]  # (n,)
    rejected: NDArray[np.int32]  # (m,)
    margin: float
    safe: tuple[float, float]  # 1, 0, or not a number where there is no label

    @property
    def tokens(self) -> int:
        """Tokens of both sequences."""
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs in R rows of T tokens. A pair's loss reads the states at its two `ends`."""

    tokens: NDArray[np.int64]  # (R, T)
    documents: NDArray[np.int32]  # (R, T) numbers of a row's sequences
    ends: NDArray[np.int64]  # (B, 2) places in R × T of the end tokens: chosen, rejected
    margins: NDArray[np.float32]  # (B,)
    safe: NDArray[np.float32]  # (B, 2), as in TokenizedPair
    source: str = ""

    @property
    def count(self) -> int:
        """Losses of the batch, one a pair."""
        return len(self.margins)


def tokenize(
    pairs: Sequence[PreferencePair],
    tokenizer: Tokenizer,
    template: str | None,
    *,
    length: int,
    margins: Mapping[int | None, float],
    neutralise: bool = False,
    report: PairReport,
) -> tuple[list[TokenizedPair], list[PreferencePair]]:
    """Pairs as tokens, and which pairs these are; `margins` by grade.

    `report` counts those that the chat format cannot write, and those of more than `length` tokens.
    """
    found: list[TokenizedPair] = []
    kept: list[PreferencePair] = []
    for pair in pairs:
        try:
            chosen, rejected = (
                scored_tokens(pair.dialog(answer), tokenizer, template, neutralise=neutralise)
                for answer in (pair.chosen, pair.rejected)
            )
        except (DialogError, TemplateError, TokenizerError) as error:
            report.leave_out("the chat format cannot write it", f"{pair.where}: {error}")
            continue
        if max(len(chosen), len(rejected)) > length:
            report.leave_out(f"more than {length:,} tokens, and nothing is cut", pair.where)
            continue
        if np.array_equal(chosen, rejected):
            report.leave_out("both answers are the same tokens", pair.where)
            continue
        labels = SAFETY.get(pair.safety or "")
        safe = _UNLABELLED if labels is None else (float(labels[0]), float(labels[1]))
        found.append(TokenizedPair(chosen, rejected, margins.get(pair.grade, 0.0), safe))
        kept.append(pair)
    return found, kept


def in_rows(
    sequences: Sequence[NDArray[np.int32]], least: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Sequences in as few rows as hold them, each row of `least` tokens or more; what is left over is padding.

    Returns tokens (R, T), numbers of a row's sequences (R, T), and where in R × T each sequence ends (n,).
    """
    sizes = [len(sequence) for sequence in sequences]
    width = -(-max(least, *sizes) // _UNIT) * _UNIT
    rows = pack(sizes, width)
    tokens = np.zeros((len(rows), width), np.int64)
    documents = np.empty((len(rows), width), np.int32)
    ends = np.empty(len(sequences), np.int64)
    for row, held in enumerate(rows):
        documents[row] = len(held)  # what is left over
        at = 0
        for count, number in enumerate(held):
            after = at + sizes[number]
            tokens[row, at:after] = sequences[number]
            documents[row, at:after] = count
            ends[number] = row * width + after - 1
            at = after
    return tokens, documents, ends


class Pairs:
    """Pairs as a loader's RowSource: a row is a pair, and `length` the mean of a pair's tokens.

    With `fixed`, all batches have rows of one length, which torch.compile needs.
    """

    def __init__(self, name: str, pairs: Sequence[TokenizedPair], *, fixed: bool = False) -> None:
        if not pairs:
            raise DataError(f"{name}: no pairs are there to train on; give more, or a larger data.length")
        self.name, self._pairs = name, pairs
        self.tokens = sum(pair.tokens for pair in pairs)
        self.length = round(self.tokens / len(pairs))
        longest = max(max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
        self._least = longest if fixed else 1

    @cached_property
    def sha256(self) -> str:
        """Of every token, margin and label."""
        digest = hashlib.sha256()
        for pair in self._pairs:
            digest.update(f"{len(pair.chosen)} {len(pair.rejected)} {pair.margin} {pair.safe}".encode())
            digest.update(pair.chosen.tobytes() + pair.rejected.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """Pairs by number, in as few rows as hold them: (R, T)."""
        pairs = [self._pairs[number] for number in numbers]
        sequences = [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]
        tokens, documents, ends = in_rows(sequences, self._least)
        margins = np.array([pair.margin for pair in pairs], np.float32)
        safe = np.array([pair.safe for pair in pairs], np.float32)
        return PairBatch(tokens, documents, ends.reshape(-1, 2), margins, safe)
