"""Recipes: what is read, what an override changes, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from llama2 import recipe
from llama2.data import read
from llama2.data.settings import STDLIB, BuildRecipe
from llama2.errors import RecipeError


class Optimizer(recipe.Settings):
    rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Source(recipe.Settings):
    path: str
    weight: float | None = None


class Run(recipe.Settings):
    name: str = "run"
    optimizer: Optimizer = Optimizer()
    sources: dict[str, Source] = Field(default_factory=dict)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[optimizer]\nrate = 0.5\n[sources.books]\npath = "b"\n')
    return path


def test_reads_and_overrides(file: Path) -> None:
    run = recipe.load(
        file, Run, ["name=x y", "optimizer.betas=[0.8, 0.9]", "sources.books.weight=2", "sources.web.path=w=1"]
    )
    assert run == Run(
        name="x y",
        optimizer=Optimizer(rate=0.5, betas=(0.8, 0.9)),
        sources={"books": Source(path="b", weight=2.0), "web": Source(path="w=1")},
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rates=1", "optimizer.rates: unknown setting; did you mean optimizer.rate?"),
        ("optimizer.xyz=1", "optimizer.xyz: unknown setting; known here: betas, rate"),
        ("sources.books.wieght=1", "sources.books.wieght: unknown setting; did you mean sources.books.weight?"),
        ("nmae=1", "nmae: unknown setting; did you mean name?"),
        ("sources.web.weight=1", "sources.web.path: is missing"),
        ("optimizer.rate=-1", "optimizer.rate: Input should be greater than 0"),
        ("optimizer.rate=fast", "optimizer.rate: Input should be a valid number"),
    ],
)
def test_a_mistake_is_named_with_its_place(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(file, Run, [override])
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["name", "=1", ".name=1", "optimizer.=1", "name.of=1"])
def test_what_is_no_setting(file: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="^" + override):
        recipe.load(file, Run, [override])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "none.toml", Run)
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(RecipeError, match="is not TOML"):
        recipe.load(tmp_path / "broken.toml", Run)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="is not TOML"):
        recipe.load(tmp_path / "bytes.toml", Run)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/data/*.toml")), ids=lambda path: path.stem
)
def test_recipes_of_corpora_are_in_order(path: Path) -> None:
    asked = recipe.load(path, BuildRecipe)
    weights = [source.weight for source in asked.sources.values()]
    assert all(weights) or not any(weights)
    if asked.dir == STDLIB:
        assert read.find(asked)
