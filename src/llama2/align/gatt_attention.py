"""The attention figure of Ghost Attention (paper 3.3, figure 10): how much later tokens still read an instruction.

T tokens  H heads  K key/value heads  E head size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.data.dialog_forms import TrainingDialog
from llama2.data.dialogs import render
from llama2.errors import ContextError, DataError, DialogError
from llama2.model.transformer import Transformer, attention
from llama2.text.dialog import Dialog

_BINS = 64  # of each side of the figure, at most


@torch.no_grad()
def strongest_attention(network: Transformer, tokens: Sequence[int]) -> NDArray[np.float32]:
    """The largest weight by which token t reads token s, over all layers and heads: (T, T), 0 where s is after t."""
    found = torch.zeros(len(tokens), len(tokens))

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        heads = q.shape[2] // k.shape[2]
        keys = k.repeat_interleave(heads, 2).transpose(1, 2)  # (1, H, T, E)
        scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5  # (1, H, T, T)
        allowed = (
            torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if visible is None else visible.view(len(q[0]), -1)
        )
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)[0]  # (H, T, T)
        torch.maximum(found, weights.amax(0).float().cpu(), out=found)
        return attention(q, k, v, visible)

    network.hidden_states(torch.tensor([list(tokens)], device=network.norm.weight.device), None, None, attend)
    return found.numpy()


def look(checkpoint: Checkpoint, dialog: Dialog) -> dict[str, Any]:
    """How each answer of a dialog reads its first message: the map, in bins, and a mean for each answer.

    The first message is the system's, or the first user's. Raises DialogError for a dialog without an answer, and
    ContextError for one that the model cannot read whole.
    """
    template, tokenizer = checkpoint.template_for(tools=False), checkpoint.tokenizer
    example = render(TrainingDialog(dialog), tokenizer, template)
    tokens = example.tokens.tolist()
    if len(tokens) > checkpoint.config.context_length:
        raise ContextError(
            f"the dialog has {len(tokens)} tokens, and the model reads {checkpoint.config.context_length}"
        )
    weights = strongest_attention(Transformer.load(checkpoint), tokens)
    start, end = instruction_span(checkpoint, dialog, tokens)
    edges = np.flatnonzero(np.diff(example.loss_mask, prepend=False, append=False)).reshape(-1, 2)
    means = [float(weights[a:b, start:end].max(1).mean()) for a, b in edges]
    return {"answers": means, "instruction": [start, end], "tokens": len(tokens), "bins": binned(weights).tolist()}


def instruction_span(checkpoint: Checkpoint, dialog: Dialog, tokens: Sequence[int]) -> tuple[int, int]:
    """Where the first message's own tokens are: those that change with it."""
    first, *others = dialog.messages
    other = Dialog([type(first)(first.role, "x"), *others])
    changed = render(TrainingDialog(other), checkpoint.tokenizer, checkpoint.template_for(tools=False)).tokens.tolist()
    before = next((i for i, (a, b) in enumerate(zip(tokens, changed, strict=False)) if a != b), 0)
    after = next((i for i, (a, b) in enumerate(zip(tokens[::-1], changed[::-1], strict=False)) if a != b), 0)
    if len(tokens) - after <= before:
        raise DialogError("the first message is too short to be found among the tokens; give a longer one")
    return before, len(tokens) - after


def binned(weights: NDArray[np.float32], bins: int = _BINS) -> NDArray[np.float32]:
    """The largest weight in each cell of a coarser map, as the paper bins neighbouring tokens."""
    size = -(-len(weights) // min(bins, len(weights)))
    count = -(-len(weights) // size)
    padded = np.zeros((count * size, count * size), weights.dtype)
    padded[: len(weights), : len(weights)] = weights
    coarse: NDArray[np.float32] = padded.reshape(count, size, count, size).max((1, 3))
    return coarse


def draw(found: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """The maps side by side, and below them the mean of each answer."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("drawing needs matplotlib: pip install 'whole-llama[train]'") from None
    figure = Figure(figsize=(5 * len(found), 7), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, height_ratios=(3, 1))
    for column, (name, each) in enumerate(found.items()):
        panels[0, column].imshow(np.array(each["bins"]), vmin=0, vmax=1, cmap="viridis")
        size = each["tokens"] / len(each["bins"])
        panels[0, column].axvspan(*(at / size - 0.5 for at in each["instruction"]), fill=False, edgecolor="red")
        panels[0, column].set(title=name.replace("$", r"\$"), xlabel="read (bins of tokens)", ylabel="reads")
        panels[1, column].plot(range(1, len(each["answers"]) + 1), each["answers"], "o-")
        panels[1, column].set(xlabel="answer", ylabel="weight on the instruction", ylim=(0, 1))
    figure.savefig(file, dpi=150)
