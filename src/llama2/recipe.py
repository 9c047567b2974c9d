"""Recipes: TOML files that say what a command is to do, each setting declared once in a class of settings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic

from llama2.errors import RecipeError


class Settings(pydantic.BaseModel):
    """A table of a recipe: unknown settings are refused, and none changes afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


Recipe = TypeVar("Recipe", bound=Settings)


def load(path: Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `overrides` such as `optimizer.rate=1e-3` in place of what stands there.

    What a file leaves out is as in the file, beside it, that its `base` names.
    The value of an override is TOML, or else text as it is. Raises RecipeError, in one line, for a file that cannot be
    read, and for a setting that is unknown, missing or out of range.
    """
    table = _read(path)
    for override in overrides:
        _place(table, override)
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{path}: {_describe(error, kind)}") from None


def _read(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe's file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: is not TOML: {error}") from None
    if "base" not in table:
        return table
    base = table.pop("base")
    if not isinstance(base, str) or path in above:
        raise RecipeError(f"{path}: base: must be the name of another file that is not based on this one")
    return _over(_read(path.parent / base, [*above, path]), table)


def _over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """`base` with what stands in `table` in place of its own, table by table."""
    tables = {k: _over(base[k], v) for k, v in table.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | table | tables


def _place(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *tables, name = key.split(".")
    if not equals or not all([*tables, name]):
        raise RecipeError(f"{override}: is no setting; write it as name=value or table.name=value")
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{override}: {part} is a setting and not a table")
    try:
        table[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text


def _describe(error: pydantic.ValidationError, kind: type[Settings]) -> str:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    where = ".".join(place)
    if first["type"] == "missing":
        return f"{where}: is missing"
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    known = sorted(_names(kind, first["loc"][:-1]))
    close = get_close_matches(place[-1], known, n=1)
    advice = f"did you mean {'.'.join([*place[:-1], close[0]])}?" if close else f"known here: {', '.join(known)}"
    return f"{where}: unknown setting; {advice}"


def _names(kind: type[Settings], place: Iterable[int | str]) -> set[str]:
    """Settings that the table at `place` may have."""
    kinds: list[Any] = [kind]
    for part in place:
        fields = [each.model_fields[str(part)].annotation for each in kinds if str(part) in each.model_fields]
        kinds = [inner for field in fields for inner in _tables(field)] or kinds
    return {name for each in kinds for name in each.model_fields}


def _tables(annotation: Any) -> Iterator[type[Settings]]:
    """The classes of settings in an annotation, such as `dict[str, Source] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _tables(part)
