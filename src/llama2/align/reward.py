"""Scores of a reward model, by the engine: a scalar for each dialog, whose last message is judged (paper 3.2.2).

D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.api import Model
from llama2.checkpoint import SCORE_HEAD, Checkpoint
from llama2.data.pairs import scored_tokens
from llama2.engine.answer import collect
from llama2.engine.embedding import pieces
from llama2.engine.request import Request, answer_limit
from llama2.errors import CheckpointError, ContextError, DialogError, EngineError
from llama2.text.dialog import Dialog, Message

#: Messages in order, the last of which is the answer to score.
Conversation = Dialog | Sequence[Message | Mapping[str, Any]]


def score_head(checkpoint: Checkpoint) -> NDArray[np.float64]:
    """The scalar head (D,) of a reward model. Raises CheckpointError for a model without one."""
    head = checkpoint.extras.get(SCORE_HEAD)
    if head is None:
        raise CheckpointError(
            f"{checkpoint.path}: is not a reward model, since it has no tensor {SCORE_HEAD}; "
            "train one with `llama2 reward`"
        )
    if head.shape != (1, checkpoint.config.dim):
        raise CheckpointError(
            f"{checkpoint.path}: {SCORE_HEAD} has shape {head.shape}, not (1, {checkpoint.config.dim})"
        )
    return np.asarray(head.dequantize()[0], np.float64)


def score(
    model: Model, dialogs: Iterable[Conversation], *, sigmoid: bool = False, neutralise: bool = False
) -> NDArray[np.float64]:
    """Rewards (n,) of n dialogs, each read at the end token of its last answer; with `sigmoid`, in (0, 1).

    A reward is the same, bit for bit, whatever is scored beside it. Raises CheckpointError for a model without a scalar
    head, and EngineError when the model fails. Raises DialogError for a dialog that does not end with the assistant,
    and ContextError for one that the model cannot read whole.
    """
    return score_tokens(model, tokens_of(model.checkpoint, dialogs, neutralise=neutralise), sigmoid=sigmoid)


def tokens_of(
    checkpoint: Checkpoint, dialogs: Iterable[Conversation], *, neutralise: bool = False
) -> Iterator[NDArray[np.int32]]:
    """What the model reads of each dialog. Raises DialogError with the dialog's number, from 0 on."""
    template = checkpoint.template_for(tools=False)
    for number, given in enumerate(dialogs):
        try:
            dialog = given if isinstance(given, Dialog) else Dialog(given)
            yield scored_tokens(dialog, checkpoint.tokenizer, template, neutralise=neutralise)
        except DialogError as error:
            raise DialogError(f"dialog {number}: {error}") from None


def score_tokens(
    model: Model,
    sequences: Iterable[NDArray[np.int32]],
    *,
    sigmoid: bool = False,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Rewards (n,) at the last token of each of n sequences; raises as `score`. `progress` gets the number done."""
    head = score_head(model.checkpoint)
    requests = []
    for number, tokens in enumerate(sequences):
        if len(tokens) > model.engine.context:
            raise ContextError(
                f"dialog {number} has {len(tokens)} tokens, and the context is {model.engine.context}; leave it out"
            )
        requests.append(Request(tuple(tokens.tolist()), max_tokens=0, pooling="last"))
        answer_limit(requests[-1], model.engine.context, model.config.vocab_size)
    scores = np.empty(len(requests))
    done = 0
    for piece in pieces(requests):
        for answer in collect(model.engine.run(*piece), piece):
            if answer.embedding is None:
                raise EngineError("scoring was cancelled")
            scores[done] = answer.embedding.astype(np.float64) @ head
            done += 1
        if progress:
            progress(done)
    return sigmoid_of(scores) if sigmoid else scores


def sigmoid_of(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^−score), also of large scores."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -scores)))
