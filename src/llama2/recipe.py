"""Recipes: TOML files with the settings of a command. Each setting is declared once, in a class."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from llama2 import files
from llama2.errors import RecipeError

#: The most bytes of a recipe, and files of which one is based on the next.
_LONGEST, _BASES = 1 << 20, 16
#: What no whole number comes to.
_LARGEST = 10**18


class Settings(pydantic.BaseModel):
    """A table of a recipe: unknown settings are refused, and none changes afterwards.

    A number is finite, of at most 18 digits if it is whole, and neither true nor false.
    """

    renamed: ClassVar[Mapping[str, str]] = {}  # old names of a recipe's settings, with their tables → new ones
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kinds = list(_parts(cls.model_fields[str(info.field_name)].annotation))
        numbers = (int in kinds or float in kinds) and bool not in kinds
        for each in value if numbers and isinstance(value, list) else [value] if numbers else []:
            if isinstance(each, bool):
                raise ValueError("is a number, and neither true nor false")
            if isinstance(each, int) and abs(each) >= _LARGEST:
                raise ValueError("is a number of more than 18 digits")
        return value


Recipe = TypeVar("Recipe", bound=Settings)


def load(path: Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `overrides` such as `optimizer.lr=1e-3` in place of its own settings.

    What a file leaves out is as in the file, beside it, that its `base` names.
    The value of an override is TOML, or else text as it is. Raises RecipeError, in one line, for a file that cannot be
    read, and for a setting that is unknown, missing or out of range.
    """
    return make(_read(path), kind, overrides, where=str(path))


def make(table: dict[str, Any], kind: type[Recipe], overrides: Sequence[str] = (), *, where: str) -> Recipe:
    """The recipe in a table, changed by `overrides` as `load` does it. Messages begin with `where`."""
    for override in overrides:
        _place(table, override)
    try:
        _refuse_nul(table)
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {_describe(error, kind)}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: {error}") from None


def with_new_names(table: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """A recipe's table with the new names of settings that `kind` renamed."""
    table = {name: dict(value) if isinstance(value, dict) else value for name, value in table.items()}
    for old, new in kind.renamed.items():
        place, _, name = old.rpartition(".")
        inner = table.get(place) if place else table
        if isinstance(inner, dict) and name in inner:
            inner[new.rpartition(".")[2]] = inner.pop(name)
    return table


def leaves(table: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Settings of a table and of those in it, by the names that overrides have for them."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= leaves(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return found


def _read(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    if not files.exists(path):
        raise RecipeError(f"{path}: cannot be read (No such file or directory); give a recipe's file")
    with files.open_file(path, error=RecipeError) as file:
        text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise RecipeError(f"{path}: has more than {_LONGEST >> 20} MB, which no recipe has")
    try:
        table = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # what is not UTF-8, not TOML, or a number of too many digits
        raise RecipeError(f"{path}: is not TOML: {error}") from None
    if "base" not in table:
        return table
    base = table.pop("base")
    if not isinstance(base, str) or path in above:
        raise RecipeError(f"{path}: base: must be the name of another file that is not based on this one")
    if len(above) == _BASES:
        raise RecipeError(f"{path}: base: {_BASES} files are based on one another already; put some of them together")
    return _over(_read(path.parent / base, [*above, path]), table)


def _refuse_nul(value: Any, place: str = "") -> None:
    """Raise ValueError for a text with a NUL character, which no path may have."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_nul(inner, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            _refuse_nul(inner, place)
    elif isinstance(value, str) and "\0" in value:
        raise ValueError(f"{place}: holds a NUL character")


def _over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `table` in place of its own, table by table."""
    tables = {k: _over(base[k], v) for k, v in table.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | table | tables


def _place(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *tables, name = key.split(".")
    if not equals or not all([*tables, name]):
        raise RecipeError(f"{override}: is not a setting; write it as name=value or table.name=value")
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{override}: {part} is a setting and not a table")
    try:
        table[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{key}: is not TOML: {error}") from None


def _describe(error: pydantic.ValidationError, kind: type[Settings]) -> str:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    where = ".".join(place)
    if first["type"] == "missing":
        return f"{where}: is missing"
    if first["type"] != "extra_forbidden":
        reason = str(first["ctx"]["error"] if first["type"] == "value_error" else first["msg"])
        return f"{where}: {reason}" if where else reason
    if new := kind.renamed.get(where):
        return f"{where}: unknown setting; did you mean {new}?"
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
    return (part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, Settings))


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a class, described."""

    name: str  # with its tables, as in an override
    kind: str  # type and bounds
    default: str  # in TOML
    required: bool  # there is no default
    meaning: str


def settings(kind: type[Settings], place: str = "") -> Iterator[Setting]:
    """Every setting of a class, those of its tables in their places."""
    for name, field in kind.model_fields.items():
        where = f"{place}{name}"
        inner = next(_tables(field.annotation), None)
        if inner is None:
            required = field.is_required()
            default = "" if required else _toml(field.get_default(call_default_factory=True))
            where += ".NAME" * (get_origin(field.annotation) is dict)
            yield Setting(where, _kind(field), default, required, field.description or "")
        elif any(get_origin(part) is dict for part in _parts(field.annotation)):
            yield from settings(inner, f"{where}.NAME.")
        else:
            yield from settings(inner, f"{where}.")


def _kind(field: FieldInfo) -> str:
    """A field's type and bounds."""
    bounds = []
    for each in field.metadata:
        for sign, attribute in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
            if (bound := getattr(each, attribute, None)) is not None:
                bounds.append(f"{sign} {bound:g}" if bound == float(f"{bound:g}") else f"{sign} {bound:,}")
        if (least := getattr(each, "min_length", None)) is not None:
            bounds.append(f"at least {least}")
        if pattern := getattr(each, "pattern", None):
            bounds.append(f"as {pattern}")
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """A type, for people."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(FieldInfo.from_annotation(annotation))
    if origin is Literal:
        return " or ".join(map(_toml, parts))
    if origin in (Union, UnionType):
        return ", or ".join(_words(part) for part in parts if part is not type(None))
    if origin is dict:
        return _words(parts[1])
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} × ({_words(parts[0])})"
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


_TYPES: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}


def _toml(value: Any) -> str:
    """A value in TOML; `none` for None."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value if isinstance(value, bool | int | str | list | tuple) else str(value), ensure_ascii=False)
