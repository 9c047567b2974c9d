"""`--settings`, and the page of the documentation that is made of the same classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import typed
from llama2.cli.settings import page, recipes
from llama2.recipe import settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == "\n".join(page()) + "\n", "python -m llama2.cli.settings > docs/settings.md"


@pytest.mark.parametrize("command", recipes())
def test_every_setting_has_a_meaning(command: str) -> None:
    assert [each.name for each in settings(recipes()[command]) if not each.meaning] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretrain"], "optimizer.betas = [0.9, 0.95]   (2 × (number, ≥ 0, < 1))\n    decay of the means"),
        (["pretrain"], "steps: required   (whole number, ≥ 1, ≤ 1e+12)\n"),
        (["sft"], "start: required   (text)\n    the model to begin with"),
        (["data", "build"], "sources.NAME.weight = none   (number, > 0)\n    its share of the corpus"),
    ],
)
def test_every_setting_is_printed(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    code, out, error = typed(capsys, *words, "--settings")
    assert (code, error) == (0, "")
    assert told in out
