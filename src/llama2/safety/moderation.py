"""A policy and its judges: from a text to what is done about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama2.safety.categories import CATEGORIES, OPENAI, to_openai
from llama2.safety.judges import Classifiers, Dialog, Judge, Phrases, Scores, windows
from llama2.safety.policy import ACTIONS, Action, Policy, Side

log = logging.getLogger("llama2.safety")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy says of a text: the action, None where nothing is to be done, and the category that caused it."""

    action: Action | None = None
    category: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None  # why the judge did not judge
    codes: tuple[str, ...] = ()

    @property
    def ends(self) -> bool:
        """Whether the text does not pass."""
        return self.action in ("refuse", "stop")


class Moderator:
    """A policy with its judge. Safe to use from several threads."""

    def __init__(self, policy: Policy, judge: Judge | None = None) -> None:
        self.policy = policy
        self.judge: Judge = Classifiers() if judge is None else judge
        self._phrases = Phrases(policy)
        self.judged = self.judge.judges | self._phrases.judges

    @property
    def unjudgeable(self) -> list[str]:
        """Categories of the policy that neither its judge knows nor a phrase is given for."""
        return [name for name in self.policy.categories if name not in self.judged]

    def moderate(self, dialog: Dialog, side: Side) -> Verdict:
        """The verdict on the whole last message of a dialog: the strictest of its windows."""
        text = dialog[-1]["content"]
        if not self.judge.windowed:
            return self.window(dialog, 0, side)
        worst = Verdict()
        for start, end in windows(text, self.policy.window):
            part = [*dialog[:-1], {**dialog[-1], "content": text[:end]}]
            worst = _worse(worst, self.window(part, start, side, whole=end == len(text)))
        return worst

    def window(self, dialog: Dialog, start: int, side: Side, *, whole: bool = True) -> Verdict:
        """The verdict on the last message's text from `start` on, which ends there if it is `whole`.

        A judge's failure is a verdict too, as the policy says.
        """
        try:
            found = self.judge.judge(dialog, start)
        except Exception as error:
            log.exception("the judge failed")
            found = Scores(reason=f"the judge failed: {type(error).__name__}: {error}")
        scores = _highest(found.by_category, self._phrases.judge(dialog, start, whole=whole).by_category)
        hits = [
            (ACTIONS.index(rule.action), scores[name], name)
            for name, rule in self.policy.categories.items()
            if rule.where in ("both", side) and scores.get(name, -1.0) >= rule.threshold
        ]
        if hits:
            strength, _, name = max(hits)
            return Verdict(ACTIONS[strength], name, scores, found.reason, found.codes)
        blind = found.reason is not None and any(c.isalnum() for c in dialog[-1]["content"][start:])
        action: Action | None = "stop" if blind and self.policy.unjudged == "stop" else None
        return Verdict(action, None, scores, found.reason, found.codes)

    def result(self, verdict: Verdict) -> dict[str, Any]:
        """A verdict in the form of OpenAI's moderations, whose categories that were not judged are null.

        `policy` has our categories. `flagged` is by the policy's thresholds; without a rule, a score of 0.5 counts.
        """
        theirs = to_openai(verdict.scores)
        limits = {name: rule.threshold for name, rule in self.policy.categories.items()}
        over = {name for name, score in verdict.scores.items() if score >= limits.get(name, 0.5)}
        flagged = {CATEGORIES[name].openai for name in over}
        return {
            "flagged": bool(over),
            "categories": {name: None if theirs[name] is None else name in flagged for name in OPENAI},
            "category_scores": theirs,
            "category_applied_input_types": {name: [] if theirs[name] is None else ["text"] for name in OPENAI},
            "not_judged": [name for name in OPENAI if theirs[name] is None],
            "reason": verdict.reason,
            "policy": {
                "action": verdict.action,
                "category": verdict.category,
                "scores": {name: verdict.scores.get(name) for name in CATEGORIES},
                "codes": list(verdict.codes),
            },
        }


def _worse(a: Verdict, b: Verdict) -> Verdict:
    """The stricter of two windows' verdicts, with the highest scores of both."""

    def strength(verdict: Verdict) -> int:
        return -1 if verdict.action is None else ACTIONS.index(verdict.action)

    strict = b if strength(b) > strength(a) else a
    codes = tuple(dict.fromkeys((*a.codes, *b.codes)))
    return Verdict(strict.action, strict.category, _highest(a.scores, b.scores), a.reason or b.reason, codes)


def _highest(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: max(scores[name] for scores in (a, b) if name in scores) for name in {**a, **b}}
