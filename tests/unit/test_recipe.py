"""Recipes: what is read, what an override changes, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
        ("optimizer.rate=inf", "optimizer.rate: Input should be a finite number"),
        ("optimizer.rate=nan", "optimizer.rate: Input should be"),
        ("optimizer.rate=true", "optimizer.rate: is a number, and neither true nor false"),
        ("optimizer.betas=[0.9, true]", "optimizer.betas: is a number, and neither true nor false"),
        ("optimizer.betas=[0.9, -inf]", "optimizer.betas.1: Input should be a finite number"),
        ("optimizer.betas=[1, -1000000000000000000]", "optimizer.betas: is a number of more than 18 digits"),
        ("sources.books.weight=false", "sources.books.weight: is a number, and neither true nor false"),
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


class Many(recipe.Settings):
    """All kinds of settings."""

    share: float = Field(0.5, gt=0, le=1, description="a share")
    size: int | None = Field(None, ge=3)
    big: int = Field(1, lt=1 << 32, ge=1)
    kind: Literal["a", "b"] = "a"
    pair: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (1, 0.5)
    files: list[Path] = Field(min_length=1)
    name: Annotated[str, Field(pattern="^x")] = "x"
    fast: bool = False
    optimizer: Optimizer = Optimizer()
    sources: dict[str, Source] = Field({})


def test_settings_tell_what_they_are() -> None:
    listed = [
        (each.name, each.kind, "required" if each.required else each.default, each.meaning)
        for each in recipe.settings(Many)
    ]
    assert listed == [
        ("share", "number, > 0, ≤ 1", "0.5", "a share"),
        ("size", "whole number, ≥ 3", "none", ""),
        ("big", "whole number, ≥ 1, < 4,294,967,296", "1", ""),
        ("kind", '"a" or "b"', '"a"', ""),
        ("pair", "2 × (number, ≥ 0)", "[1, 0.5]", ""),
        ("files", "list of path, at least 1", "required", ""),
        ("name", "text, as ^x", '"x"', ""),
        ("fast", "true or false", "false", ""),
        ("optimizer.rate", "number, > 0", "0.001", ""),
        ("optimizer.betas", "2 × (number)", "[0.9, 0.95]", ""),
        ("sources.NAME.path", "text", "required", ""),
        ("sources.NAME.weight", "number", "none", ""),
    ]


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 50_000, "is not TOML"),
        ("a = " + "9" * 5000, "is not TOML"),
        ('name = "a\\u0000b"', "name: holds a NUL character"),
        ('sources.books.path = "a\\u0000b"', "sources.books.path: holds a NUL character"),
        ('base = "/dev/zero"', "/dev/zero: is not a regular file"),
        ('base = "a\\u0000"', "cannot be read"),
        ('base = "/"', "is a folder"),
        ("#" * (1 << 20) + "#", "has more than 1 MB"),
        ('"\\u001b]0;x" = 1', "unknown setting"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.load(tmp_path / "run.toml", Run)
    assert "\n" not in str(caught.value)


def test_files_that_are_based_on_too_many(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.toml").write_text(f'base = "{number + 1}.toml"')
    (tmp_path / "1500.toml").write_text('name = "last"')
    with pytest.raises(RecipeError, match="16 files are based on one another already"):
        recipe.load(tmp_path / "0.toml", Run)
    assert recipe.load(tmp_path / "1484.toml", Run).name == "last"


def test_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfname = "a"')
    assert recipe.load(tmp_path / "run.toml", Run).name == "a"


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_an_override_that_is_too_much(file: Path, value: str) -> None:
    with pytest.raises(RecipeError, match="name: is not TOML"):
        recipe.load(file, Run, [f"name={value}"])
