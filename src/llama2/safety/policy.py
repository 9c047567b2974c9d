"""A deployment's policy: what is judged, how strictly, and what is done. One TOML file."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from llama2 import recipe
from llama2.recipe import Settings
from llama2.safety.categories import CATEGORIES

Side = Literal["input", "output"]
Action = Literal["log", "warn", "refuse", "stop"]
#: Weakest first.
ACTIONS: tuple[Action, ...] = ("log", "warn", "refuse", "stop")

#: Tokens of a window of an answer, and of what two windows have in common.
WINDOW = 32


class Rule(Settings):
    """What is done about one category."""

    action: Action = Field(description="log, warn, refuse in the policy's words, or stop without a word.")
    threshold: float = Field(0.5, gt=0, le=1, description="Score from which on the rule applies.")
    where: Literal["input", "output", "both"] = Field("both", description="What is judged: prompts, answers, or both.")
    phrases: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        [], max_length=10_000, description="Phrases that have the score 1, whatever the judge says."
    )


class Policy(Settings):
    """What a deployment judges, and what it does about it."""

    judge: str = Field("classifiers", min_length=1, description="`classifiers`, or a Llama Guard's name or path.")
    refusal: str = Field("I cannot help with that.", min_length=1, description="What is said in place of an answer.")
    hold_back: bool = Field(
        True, description="Whether text waits until it is judged; else up to half a window of it is ahead."
    )
    window: int = Field(WINDOW, ge=2, le=4096, multiple_of=2, description="Tokens that are judged together.")
    unjudged: Literal["pass", "stop"] = Field(
        "pass", description="What is done where the judge fails, or cannot judge a text: let it pass, or stop."
    )
    categories: dict[str, Rule] = Field(min_length=1, description="The rules, by category.")

    @field_validator("categories", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in CATEGORIES:
                near = get_close_matches(str(name), CATEGORIES, n=1)
                advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(CATEGORIES)}"
                raise ValueError(f"{name} is an unknown category; {advice}")
        return value


def load(path: Path) -> Policy:
    """The policy in a TOML file. Raises RecipeError, in one line, for what is unknown, missing or out of range."""
    return recipe.load(path, Policy)


def default() -> Policy:
    """The policy where none is given: the one category that the small classifiers judge, at a high threshold."""
    return Policy(categories={"harassment": Rule(action="refuse", threshold=0.9)})
