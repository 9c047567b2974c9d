"""Policies, judges and verdicts: what a policy may say, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2.cli.main import program
from llama2.errors import RecipeError
from llama2.safety import policy as policies
from llama2.safety.categories import CATEGORIES, LLAMA_GUARD, MLCOMMONS, OPENAI, ours_of, table, to_openai
from llama2.safety.judges import Scores, windows
from llama2.safety.moderation import Moderator, Verdict
from llama2.safety.policy import Policy, Rule

INSULT = "You are a stupid idiot."


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[categories.harasment]\naction = "log"', "harasment is an unknown category; did you mean harassment?"),
        ('[categories.harassment]\naction = "log"\nthreshold = 2', "categories.harassment.threshold: "),
        ("[categories.harassment]\nthreshold = 0.5", "categories.harassment.action: is missing"),
        ('[categories.harassment]\naction = "ban"', "categories.harassment.action: "),
        ('judge = "classifiers"', "categories: is missing"),
        ('windw = 3\n[categories.spam]\naction = "log"', "windw: unknown setting; did you mean window?"),
        ('window = 7\n[categories.spam]\naction = "log"', "window: "),
        ("[categories", "is not TOML"),
    ],
)
def test_a_bad_policy_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as found:
        policies.load(path)
    assert str(path) in str(found.value)
    assert problem in str(found.value)
    assert "\n" not in str(found.value)


def test_every_foreign_category_is_mapped_or_said_to_have_no_equal() -> None:
    """The lists have as many entries as their makers publish, and name only categories that exist."""
    assert (len(LLAMA_GUARD), len(MLCOMMONS), len(OPENAI)) == (6, 14, 13)
    named = {ours for _, categories in (*LLAMA_GUARD.values(), *MLCOMMONS.values()) for ours in categories}
    assert named <= set(CATEGORIES)
    assert {category.openai for category in CATEGORIES.values()} - {None} <= set(OPENAI)
    rows = {name: rest for name, *rest in table()}
    assert rows["spam"] == ["none", "none", "none", "none"]
    assert rows["self_harm"] == ["hateful and harmful", "O6 Self-Harm", "S11 Suicide & Self-Harm", "self-harm"]


def test_the_guide_has_the_table() -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/safeguard.md").read_text(encoding="utf-8")
    for name, *rest in table():
        assert f"| `{name}` | {' | '.join(rest)} |" in guide


def test_names_are_found_in_any_spelling_and_unknown_ones_survive() -> None:
    assert ours_of("Violent Crimes.") == ours_of("violent crime") == ("violence_terrorism",)
    assert ours_of("Suicide and Self Harm") == ("self_harm",)
    assert ours_of("Espionage by Balloons") == ("other",)


def test_what_was_not_judged_is_null_and_not_zero() -> None:
    theirs = to_openai({"drugs": 0.2, "weapons": 0.7, "fraud": 0.4, "spam": 0.9})
    assert (theirs["illicit"], theirs["illicit/violent"], theirs["hate"]) == (0.4, 0.7, None)
    result = Moderator(policies.default()).result(Moderator(policies.default()).moderate(said(INSULT), "input"))
    judged = {name for name, score in result["category_scores"].items() if score is not None}
    assert judged == {"harassment"}
    assert (result["flagged"], result["categories"]["harassment"], result["categories"]["hate"]) == (True, True, None)
    assert len(result["not_judged"]) == 12


def test_the_strictest_rule_wins_on_the_side_where_it_applies() -> None:
    rules = {
        "harassment": Rule(action="log", threshold=0.5),
        "drugs": Rule(action="warn", where="input", phrases=["white powder"]),
        "fraud": Rule(action="stop", where="output", phrases=["white powder"]),
    }
    moderator = Moderator(Policy(categories=rules))
    text = said(f"{INSULT} Give me the white\n  POWDER!")
    assert moderator.moderate(text, "input").action == "warn"
    verdict = moderator.moderate(text, "output")
    assert (verdict.action, verdict.category, verdict.ends) == ("stop", "fraud", True)
    assert moderator.moderate(said("Give me white powders."), "output") == Verdict(
        None, None, moderator.moderate(said("Give me white powders."), "output").scores
    )
    assert moderator.unjudgeable == []
    assert Moderator(Policy(categories={"spam": Rule(action="log")})).unjudgeable == ["spam"]


def test_a_phrase_is_not_seen_in_half_a_word() -> None:
    moderator = Moderator(Policy(categories={"drugs": Rule(action="stop", phrases=["meth"])}))
    assert moderator.window(said("This is a meth"), 0, "output").ends
    assert not moderator.window(said("This is a meth"), 0, "output", whole=False).ends  # it may become "method"
    assert not moderator.window(said("x" * 60 + "meth od"), 60, "output").ends  # which the window cut


class Broken:
    name, judges, windowed = "broken", frozenset({"spam"}), True

    def judge(self, dialog: Any, start: int = 0) -> Scores:
        raise RuntimeError("out of order")


@pytest.mark.parametrize(("unjudged", "action"), [("pass", None), ("stop", "stop")])
def test_a_failing_judge_lets_pass_or_stops(unjudged: Any, action: str | None) -> None:
    rules = {"spam": Rule(action="log")}
    broken = Moderator(Policy(categories=rules, unjudged=unjudged), Broken())
    verdict = broken.moderate(said("anything"), "output")
    assert (verdict.action, verdict.category) == (action, None)
    assert "out of order" in str(verdict.reason)
    unknown = Moderator(Policy(categories=rules, unjudged=unjudged)).moderate(said("这 是 中文 文本"), "input")
    assert unknown.action == action
    assert Moderator(Policy(categories=rules, unjudged=unjudged)).moderate(said("…!"), "input").action is None


def test_a_long_text_is_judged_in_windows_that_overlap() -> None:
    """One insult among 200 harmless words is found, as it is alone; the windows cover every word, each border twice."""
    text = " ".join(["The train leaves at nine and arrives at ten."] * 20)
    half = len(text) // 2
    moderator = Moderator(Policy(categories={"harassment": Rule(action="refuse", threshold=0.6)}))
    assert moderator.moderate(said(f"{text[:half]} {INSULT} {text[half:]}"), "input").action == "refuse"
    assert moderator.moderate(said(text), "input").action is None
    parts = list(windows("w " * 100, 32))
    assert [start // 2 for start, _ in parts] == [0, 16, 32, 48, 64, 80]
    assert [end // 2 for _, end in parts] == [32, 48, 64, 80, 96, 100]
    assert list(windows("", 32)) == [(0, 0)]


def test_the_command_judges_lines_and_shows_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> list[str]:
        program("moderate")(["moderate", *words], prog_name="llama2", standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    lines = run("Have a nice day.", INSULT, "これ は 日本語 です")
    assert [line.split("\t")[0] for line in lines] == ["pass", "refuse", "not judged"]
    (answer,) = run("--json", INSULT)
    assert json.loads(answer)["policy"]["action"] == "refuse"
    assert len(run("--categories")) == len(CATEGORIES)
    assert json.loads(run("--categories", "--json")[0])["openai"] == "illicit/violent"
