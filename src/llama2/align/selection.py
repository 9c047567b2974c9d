"""The best answers as data: dialogs for `llama2 sft`, and pairs of answers for methods that learn from preferences."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama2.align.judging import Judged
from llama2.data import comparisons
from llama2.data.comparisons import PreferencePair
from llama2.text.dialog import Message

Rejected = Literal["worst", "median", "random"]


@dataclass
class SelectionReport:
    """What became of prompts and answers."""

    prompts: int = 0
    answers: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # answers by the reason
    without: int = 0  # prompts without a best answer

    def counts(self) -> dict[str, Any]:
        """The report for programs."""
        counted = {"prompts": self.prompts, "answers": self.answers, "without": self.without}
        return {**counted, "left_out": dict(self.left_out)}


def candidates(group: Sequence[Judged], *, keep_cut: bool, report: SelectionReport) -> list[Judged]:
    """Those answers to one prompt that may be chosen, from the best to the worst; of equal ones, the first drawn first.

    Answers that are empty, that repeat another one or, unless `keep_cut`, that the limit of tokens cut, are left out.
    """
    report.prompts += 1
    report.answers += len(group)
    seen: set[str] = set()
    found = []
    for each in group:
        answer = each.sample.answer.strip()
        if not answer:
            report.left_out["empty"] += 1
        elif each.sample.finish == "length" and not keep_cut:
            report.left_out["cut by max_tokens"] += 1
        elif answer in seen:
            report.left_out["repeated"] += 1
        else:
            seen.add(answer)
            found.append(each)
    return sorted(found, key=lambda each: -each.reward)  # stable


def rejected(ordered: Sequence[Judged], kind: Rejected, min_gap: float, seed: int) -> Judged | None:
    """The answer beside the best one of a preference pair, among those that are worse by `min_gap` at least."""
    best = ordered[0]
    worse = [each for each in ordered[1:] if each.reward < best.reward and best.reward - each.reward >= min_gap]
    if not worse:
        return None
    if kind == "worst":
        return worse[-1]
    if kind == "median":
        return worse[len(worse) // 2]
    number = hashlib.sha256(f"{seed} {best.sample.prompt}".encode()).digest()[:8]
    return worse[int.from_bytes(number) % len(worse)]


def last_answer_record(messages: Sequence[Mapping[str, str]], answer: str) -> dict[str, Any]:
    """A dialog that `llama2 sft` reads, with loss on its last answer alone."""
    earlier = [{**m, "weight": 0} if m["role"] == "assistant" else {**m} for m in messages]
    return {"messages": [*earlier, {"role": "assistant", "content": answer.strip()}]}


def tuning_record(messages: Sequence[Mapping[str, str]], best: Judged) -> dict[str, Any]:
    """A dialog with loss on the answer alone, and where the answer comes from."""
    return last_answer_record(messages, best.sample.answer) | {
        "round": best.sample.round,
        "temperature": best.sample.policy.temperature,
        "tokens": best.sample.tokens,
        "reward": best.reward,
        "rewards": dict(best.rewards),
    }


def preference_record(messages: Sequence[Mapping[str, str]], best: Judged, worse: Judged) -> dict[str, Any]:
    """A pair as TRL's trainers for DPO, KTO and reward models read it, and `llama2 reward` (`comparisons`)."""
    prompt = tuple(Message(message["role"], message["content"]) for message in messages)
    return comparisons.to_json(PreferencePair(prompt, best.sample.answer.strip(), worse.sample.answer.strip()))
