"""Two models on the same items: the paired difference, whether chance explains it, and what a set this size can show.

The models answer the same questions, so their scores correlate. The difference of each item has less variance than the
scores have. Its standard error is what counts (Miller, *Adding Error Bars to Evals*, 2024, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from llama2.errors import EvaluationError
from llama2.evaluate.intervals import Z, finite_fields, standard_error
from llama2.evaluate.scores import read_record, read_samples, score

#: The two-sided level of significance, and the power of the smallest difference.
ALPHA, POWER = 0.05, 0.8
#: The fewest items on which right-or-wrong scores must differ, all in one direction, before McNemar's exact p is
#: below 0.05.
_FEWEST = 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of two models, a and b, on the same items.

    `difference` is a - b, with its standard error and 95 % interval. `correlation` is of the items' scores, None where
    all scores of a model are equal. `only_a` counts the items on which a scores higher, `only_b` those on which b does.
    `smallest` is the smallest true difference that would be found with 80 % power at this standard error.
    """

    n: int
    clusters: int | None
    mean_a: float
    mean_b: float
    difference: float
    se: float
    low: float
    high: float
    correlation: float | None
    only_a: int
    only_b: int
    p: float
    test: str
    smallest: float

    def to_json(self) -> dict[str, Any]:
        """Its fields; null for what is not finite."""
        return finite_fields(self)


def compare(a: Mapping[str, float], b: Mapping[str, float], clusters: Mapping[str, str] | None = None) -> Comparison:
    """Compare scores by item id; `clusters` names each item's cluster.

    p is McNemar's exact where scores are zeros and ones and items are independent, and otherwise the normal one of the
    difference. Raises ValueError for no items, or where the two do not have the same.
    """
    if a.keys() != b.keys() or not a:
        raise ValueError("a paired comparison needs the same items, at least one, on both sides")
    ids = sorted(a)
    x, y = np.array([a[i] for i in ids], np.float64), np.array([b[i] for i in ids], np.float64)  # (n,)
    d = x - y
    groups: Sequence[str] | None = None if clusters is None else [clusters[i] for i in ids]
    difference = math.fsum(d) / len(d)
    se = standard_error(d.tolist(), groups)
    only_a, only_b = int((d > 0).sum()), int((d < 0).sum())
    binary = bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
    exact = binary and groups is None
    varied = len(d) > 1 and x.std() > 0 and y.std() > 0
    return Comparison(
        n=len(d),
        clusters=None if groups is None else len(set(groups)),
        mean_a=math.fsum(x) / len(d),
        mean_b=math.fsum(y) / len(d),
        difference=difference,
        se=se,
        low=difference - Z * se,
        high=difference + Z * se,
        correlation=float(np.corrcoef(x, y)[0, 1]) if varied else None,
        only_a=only_a,
        only_b=only_b,
        p=mcnemar(only_a, only_b) if exact else _normal_p(difference, se),
        test="McNemar, exact" if exact else "normal",
        smallest=max(smallest_difference(se), _FEWEST / len(d) if binary else 0.0),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p: the binomial test of one half on the items that one model alone gets right."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail, term = 0, 1
    for k in range(fewer + 1):
        tail += term  # whole numbers: the sum of n over k
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))


def _normal_p(difference: float, se: float) -> float:
    if not se:
        return 1.0 if not difference else 0.0
    return math.erfc(abs(difference) / se / math.sqrt(2))


def smallest_difference(se: float, *, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true difference that a two-sided test at level `alpha` finds with this power (Miller, section 5)."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * se


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each p, adjusted for all of them by Holm's step-down method, in the order given."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compare_runs(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare the tasks that two runs share, on the same items, with p adjusted over these tasks by Holm's method.

    Raises EvaluationError where the runs share none, and for a task of another version, prompt or set of items.
    """
    here, there = read_record(ours), read_record(theirs)
    tasks: dict[str, dict[str, Any]] = {}
    for label, task in here["tasks"].items():
        if score(task) is not None and label in there["tasks"] and score(there["tasks"][label]) is not None:
            refuse_other_task(label, task, there["tasks"][label], theirs)
            tasks[label] = _compare_samples(label, task["metric"], ours, theirs).to_json()
    if not tasks:
        raise EvaluationError(f"{theirs}: does not have a score of the same task; compare runs that share one")
    adjusted = holm({label: task["p"] for label, task in tasks.items()})
    return {
        "against": there["model"],
        "weights": there["weights"],
        "tasks": {label: task | {"p_holm": adjusted[label]} for label, task in tasks.items()},
        "not_compared": sorted(({*here["tasks"]} | {*there["tasks"]}) - {*tasks}),
    }


#: What scores that are compared must have in common, as fields of a record's task, with their names for people.
_SAME = {"version": "version", "task": "settings", "protocol": "protocol", "shots": "examples", "chat": "chat template"}


def refuse_other_task(label: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    """Raise EvaluationError where two records' tasks differ in what must be the same, as far as ours says it."""
    for name, what in _SAME.items():
        if name in ours and ours[name] != theirs.get(name):
            shown = "" if name == "task" else f" {theirs.get(name)} there and {ours[name]} here"
            raise EvaluationError(f"{run}: {label} has another {what}{shown}; evaluate both models the same way")


def _question(sample: Mapping[str, Any]) -> str:
    """The hash of what was asked, before the model's own chat template."""
    return str(sample.get("question", sample["prompt"]))


def _compare_samples(label: str, metric: str, ours: Path, theirs: Path) -> Comparison:
    """The comparison of a task's items by its metric. Raises EvaluationError for other items or prompts."""
    a, b = ({sample["id"]: sample for sample in read_samples(run, label)} for run in (ours, theirs))
    scores = [{name: each["values"][metric] for name, each in some.items() if "values" in each} for some in (a, b)]
    if different := scores[0].keys() ^ scores[1].keys():
        raise EvaluationError(
            f"{theirs}: {label} has other items ({len(different)} are in one run only); evaluate both models with the "
            "same --limit and --seed"
        )
    if asked := [name for name in scores[0] if _question(a[name]) != _question(b[name])]:
        raise EvaluationError(
            f"{theirs}: {label} has another prompt at item {asked[0]} and {len(asked) - 1} more; evaluate both models "
            "the same way"
        )
    clusters = {name: str(a[name]["cluster"]) for name in scores[0]} if "cluster" in next(iter(a.values())) else None
    return compare(scores[0], scores[1], clusters)
