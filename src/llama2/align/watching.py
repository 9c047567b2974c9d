"""What is watched while a policy learns: rewards, divergence, length, and whether it collapses (paper 3.2.3, 7.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from llama2.align.experience import Experience, RenderedPrompt, measures
from llama2.align.ppo_recipe import CollapseSettings
from llama2.align.surrogate import Surrogate
from llama2.errors import RunError
from llama2.train.loop import Callback, Loop, StepReport

#: A person is warned above these: the mean distance of the engine's log-probabilities from torch's, and that of a ratio
#: from 1 before any step. What draws is then another policy than what learns.
GAP, RATIO = 0.1, 1e-3

_SHOWN = {"reward": "reward {:.3f}", "kl": "KL {:.2f}", "tokens": "{:.0f} tokens", "cut": "{:.0%} cut"}
_SHOWN |= {"helpful": "helpful {:.3f}", "safety": "safety {:.3f}", "watched": "watched {:.3f}"}


class PolicyWatch(Callback):
    """Adds what was measured to each step's report, and ends a run whose policy has collapsed."""

    def __init__(self, experience: Experience, surrogate: Surrogate, rule: CollapseSettings, run: Path) -> None:
        self._experience, self._surrogate, self._rule, self._run = experience, surrogate, rule, run
        self._shown = 0  # the iteration that was reported last

    def after_step(self, loop: Loop, report: StepReport) -> None:
        experience, found = self._experience, self._surrogate.means()
        first = experience.iteration != self._shown
        report.measured = {"iteration": experience.iteration, **found}
        if not first:
            return
        self._shown = experience.iteration
        seconds = {f"seconds_{name}": value for name, value in experience.seconds.items()}
        report.measured |= experience.measured | seconds
        said = ", ".join(text.format(experience.measured[k]) for k, text in _SHOWN.items() if k in experience.measured)
        report.add_note(f"iteration {experience.iteration}: {said}")
        if experience.measured["engine_gap"] > GAP:
            report.add_note(
                f"the engine's log-probabilities are {experience.measured['engine_gap']:.2g} away from torch's on "
                "average: what draws answers is another policy than what learns"
            )
        if found["ratio_away"] > RATIO:
            report.add_note(f"ratios before the first step are {found['ratio_away']:.2g} away from 1")
        self._refuse_collapse(experience)

    def _refuse_collapse(self, experience: Experience) -> None:
        """Raise RunError after `patience` iterations in a row beyond a limit."""
        rule, found, memory = self._rule, experience.measured, experience.memory
        first = memory.setdefault("entropy", found["entropy"])
        limits = {
            f"its KL from the start is {found['kl']:.1f} nats an answer": found["kl"] > rule.kl,
            f"its entropy fell from {first:.3g} to {found['entropy']:.3g} nats": found["entropy"]
            < rule.entropy * first,
            f"{found['distinct']:.0%} of its answers are different": found["distinct"] < rule.distinct,
            f"{found['cut']:.0%} of its answers have no end token": found["cut"] > rule.cut,
            "a measure of it is not a number": any(math.isnan(found[name]) for name in ("kl", "entropy", "reward")),
        }
        wrong = [reason for reason, beyond in limits.items() if beyond]
        memory["beyond"] = memory.get("beyond", 0) + 1 if wrong else 0
        if memory["beyond"] >= rule.patience:
            raise RunError(
                f"{self._run}: iteration {experience.iteration}: the policy has collapsed: {'; '.join(wrong)}; begin "
                "another run with a larger beta or a lower optimizer.lr"
            )


class HeldOutMeasure(Callback):
    """Rewards, length and divergence of answers to held-out prompts, before the first step and now and then.

    After `patience` measurements in a row without a better reward, the run ends, as the paper's did; 0: it does not.
    """

    def __init__(
        self, experience: Experience, prompts: Sequence[RenderedPrompt], every: int, patience: int = 0
    ) -> None:
        self._experience, self._prompts, self._every, self._patience = experience, prompts, every, patience

    def begin(self, loop: Loop) -> None:
        memory = self._experience.memory
        if loop.state.step == 0:
            memory["held_out"] = self._measure()
            memory["best"], memory["worse"] = memory["held_out"]["reward"], 0
        elif self._ends():
            loop.steps = loop.state.step

    def after_step(self, loop: Loop, report: StepReport) -> None:
        if report.step % self._every and report.step != loop.steps:
            return
        memory, found = self._experience.memory, self._measure()
        report.measured = {**report.measured, **{f"held_out_{name}": value for name, value in found.items()}}
        report.add_note(f"held-out reward {found['reward']:.3f}, {memory['held_out']['reward']:.3f} at the start")
        memory["worse"] = 0 if found["reward"] > memory["best"] else memory["worse"] + 1
        memory["best"] = max(memory["best"], found["reward"])
        if self._ends():
            loop.steps = report.step
            report.add_note(f"ends here: no better one in {memory['worse']} measurements")

    def _ends(self) -> bool:
        worse: int = self._experience.memory["worse"]
        return 0 < self._patience <= worse

    def _measure(self) -> dict[str, float]:
        """The same random numbers each time, so that changes are of the policy."""
        experience = self._experience
        rollouts = experience.draw(self._prompts, [1, 0])
        answers = experience.answers(rollouts)
        return measures(answers, experience.judge([each.prompt for each in self._prompts], answers))
