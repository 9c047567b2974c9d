"""A runner and a tokenizer that a test can work out by hand."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llama2.config import ModelConfig
from llama2.engine.request import Event
from llama2.engine.runner import BLOCK, Batch

END = 256  # the end token of ByteTokenizer
VOCABULARY = 257


class ByteTokenizer:
    """A token is a byte of UTF-8, but token 1 is `!` and the first byte of an emoji; and one more ends the answer."""

    kind = "bpe"
    pre = None
    vocab_size = VOCABULARY
    bos_id = None
    eos_id = END
    add_bos = False
    stop_ids = frozenset({END})
    control: dict[str, int] = {}  # noqa: RUF012

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return b"!\xf0" if token == 1 else bytes([token]) if token < END else b""

    def stream(self) -> ByteStream:
        return ByteStream(self)


class ByteStream:
    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class HistoryRunner:
    """Keeps the token ids themselves in its cache, and asks `logits` for the row that follows the history found there.

    So an answer is right only if every token was given once, at its position, in the sequence's own blocks.
    """

    arithmetic = "none"

    def __init__(
        self, logits: Callable[[list[int]], NDArray[np.float32]], *, n_blocks: int = 8, context: int = 8 * BLOCK
    ) -> None:
        self.config = ModelConfig(
            dim=2, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=2, vocab_size=VOCABULARY, head_dim=2,
            context_length=context,
        )  # fmt: skip
        self.n_blocks = n_blocks
        self.logits = logits
        self.cache = np.full(n_blocks * BLOCK, -1)
        self.steps: list[int] = []  # tokens of each step
        self.rows: list[int] = []  # of logits of each step

    def forward(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits; a token's hidden state is itself and its position."""
        for array in (batch.tokens, batch.positions, batch.sequences, batch.blocks, batch.outputs):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert (np.diff(batch.sequences) >= 0).all()
        same = np.diff(batch.sequences) == 0
        assert (np.diff(batch.positions)[same] == 1).all()
        assert sorted(set(batch.sequences.tolist())) == list(range(len(batch.blocks)))
        self.steps.append(len(batch.tokens))
        self.rows.append(len(batch.outputs))
        if hidden is not None:
            hidden[:] = np.stack([batch.tokens, batch.positions], axis=1)

        blocks = batch.blocks[batch.sequences, batch.positions // BLOCK]
        assert (blocks >= 0).all()
        self.cache[blocks * BLOCK + batch.positions % BLOCK] = batch.tokens
        rows = []
        for i in batch.outputs:
            slots = (batch.blocks[batch.sequences[i]][:, None] * BLOCK + np.arange(BLOCK)).ravel()
            rows.append(self.logits(self.cache[slots[: batch.positions[i] + 1]].tolist()))
        return np.array(rows, np.float32).reshape(-1, VOCABULARY)


def one(token: int) -> NDArray[np.float32]:
    """Logits that leave no choice but `token`."""
    row = np.full(VOCABULARY, -1e4, np.float32)
    row[token] = 0
    return row


def saying(text: str, prompt: int = 1) -> Callable[[list[int]], NDArray[np.float32]]:
    """A network that continues any prompt of `prompt` tokens with `text` and the end token, for ever."""
    answer = [*text.encode(), END]
    return lambda history: one(answer[min(len(history) - prompt, len(answer) - 1)])


def plain(events: Sequence[Event]) -> list[Event]:
    """What was told, without whose request it was and what was saved on the way."""
    return [event._replace(request=0, cached_tokens=0, drafted_tokens=0, accepted_tokens=0) for event in events]
