"""Reward against K, the number of answers, and against the temperature (paper 3.2.3, figures 7 and 8).

P prompts  N answers to each  K = 1 … N
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2.align.judging import Judged
from llama2.align.order_statistics import best_of, kl_bound, median_of
from llama2.errors import DataError
from llama2.evaluate.intervals import mean_interval

#: A point of a curve, as `curve` describes it.
Point = dict[str, Any]

_EVERY = 20  # up to so many answers each K is a point; beyond, powers of 2


def curve(groups: Sequence[Sequence[Judged]], conversations: Sequence[str]) -> list[Point]:
    """Points by K, from as many answers to each of some prompts, in the order of drawing.

    `maximum` and `median` are the expected best reward and median reward of K answers, means over prompts.
    `maximum_interval` is of 95 %, clustered by `conversations`, which names each prompt's. `tokens` is the best's
    length. `rewards` are each reward model's of the best, mean and median over prompts. `kl_bound` is in nats, from
    the policy that drew.
    """
    rewards = np.array([[each.reward for each in group] for group in groups])  # (P, N)
    lengths = np.array([[each.sample.tokens for each in group] for group in groups])  # (P, N)
    each_model = {
        name: best_of(rewards, [[each.rewards[name] for each in group] for group in groups])  # (P, K)
        for name in groups[0][0].rewards
    }
    best, medians, tokens = best_of(rewards), median_of(rewards), best_of(rewards, lengths)  # (P, K)
    return [
        {
            "k": k,
            "maximum": float(best[:, k - 1].mean()),
            "maximum_interval": _interval(best[:, k - 1], conversations),
            "median": float(medians[:, k - 1].mean()),
            "tokens": float(tokens[:, k - 1].mean()),
            "kl_bound": kl_bound(k),
            "rewards": {
                name: {"mean": float(values[:, k - 1].mean()), "median": float(np.median(values[:, k - 1]))}
                for name, values in each_model.items()
            },
        }
        for k in _points(rewards.shape[1])
    ]


def _interval(values: NDArray[np.float64], conversations: Sequence[str]) -> list[float] | None:
    """None where one conversation says nothing about the spread."""
    found = mean_interval(values.tolist(), conversations, proportion=False)
    return [found.low, found.high] if math.isfinite(found.se) else None


def _points(n: int) -> list[int]:
    if n <= _EVERY:
        return [*range(1, n + 1)]
    return sorted({n, *(1 << power for power in range(n.bit_length()))})


def summary(groups: Sequence[Sequence[Judged]], conversations: Sequence[str]) -> dict[str, Any]:
    """Answers in numbers: their mean reward and length, how many were cut or empty, and the curve."""
    judged = [each for group in groups for each in group]
    return {
        "prompts": len(groups),
        "answers": len(judged),
        "reward": float(np.mean([each.reward for each in judged])),
        "tokens": float(np.mean([each.sample.tokens for each in judged])),
        "cut": sum(each.sample.finish == "length" for each in judged),
        "empty": sum(not each.sample.answer.strip() for each in judged),
        "curve": curve(groups, conversations),
    }


def choose_temperature(sweep: Sequence[Mapping[str, Any]], by: Literal["maximum", "spread"]) -> tuple[float, float]:
    """The best temperature of some (`temperature`, `curve`), and its worth at the largest K.

    That is the expected best reward, or how far it is above the median. Of equal ones, the first is the best.
    """

    def worth(row: Mapping[str, Any]) -> float:
        last = row["curve"][-1]
        return float(last["maximum"] - (last["median"] if by == "spread" else 0))

    best = max(sweep, key=worth)
    return best["temperature"], worth(best)


def draw_rounds(curves: Mapping[str, Sequence[Point]], file: Path) -> None:
    """Figure 7: maximum and median reward against K, a colour for each round's model; beside it the length."""
    _draw(curves, file, "expected best of K (line) and median (dashed)", median=True)


def draw_temperatures(curves: Mapping[str, Sequence[Point]], file: Path) -> None:
    """Figure 8: maximum reward against K, a colour for each temperature; beside it the length."""
    _draw(curves, file, "expected best of K", median=False)


def _draw(curves: Mapping[str, Sequence[Point]], file: Path, title: str, *, median: bool) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("drawing needs matplotlib: pip install 'whole-llama[train]', or set plots=false") from None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    reward, length = figure.subplots(1, 2)
    for number, (name, points) in enumerate(curves.items()):
        colour, label = f"C{number % 10}", name.replace("$", r"\$")
        k = [point["k"] for point in points]
        reward.plot(k, [point["maximum"] for point in points], "o-", markersize=3, color=colour, label=label)
        if median:
            reward.plot(k, [point["median"] for point in points], "--", color=colour)
        length.plot(k, [point["tokens"] for point in points], "o-", markersize=3, color=colour, label=label)
    reward.set(title=title, ylabel="reward")
    length.set(title="length of the best of K", ylabel="tokens")
    for panel in (reward, length):
        panel.set(xlabel="K, answers to a prompt")
        panel.grid(alpha=0.3)
        panel.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name may have letters that the font lacks
        figure.savefig(file, dpi=150)
