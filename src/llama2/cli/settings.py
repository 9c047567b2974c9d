"""`--settings`: every setting of a command's recipes, as its classes declare them, and the page of the docs likewise.

python -m llama2.cli.settings > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import resolve_name

from llama2.cli import commands
from llama2.console import data, say
from llama2.recipe import Setting, Settings, settings

_HEAD = """# Settings of recipes

A recipe is a TOML file; `table.name=value` on the command line goes before what it says, and `base = "FILE"` takes the
rest from another one. What no class declares is an error, and so is a value out of bounds; both are said before
anything is done. NAME stands for a name of yours. What may differ when a run is resumed is in [runs.md](runs.md).

`llama2 pretrain --settings` prints the same as this page, which is made by
`python -m llama2.cli.settings > docs/settings.md`.
"""

_RULE = "| --- | --- | --- | --- |"


def recipes() -> dict[str, type[Settings]]:
    """The settings class of each command that takes a recipe."""
    modules = (import_module(f"llama2.cli.commands.{name}") for name in commands.names())
    declared = {name: where for module in modules for name, where in getattr(module, "RECIPES", {}).items()}
    return {name: resolve_name(where) for name, where in declared.items()}


def show(command: str) -> None:
    """Print the settings of a command's recipes."""
    for setting in settings(recipes()[command]):
        value = ": required" if setting.required else f" = {setting.default}"
        say(f"{setting.name}{value}   ({setting.kind})\n    {setting.meaning}")


def page() -> Iterator[str]:
    """The lines of docs/settings.md."""
    yield from _HEAD.splitlines()
    for command, recipe in recipes().items():
        yield from (
            "",
            f"## `{command}`",
            "",
            "| setting | default | type and bounds | meaning |",
            "| --- | --- | --- | --- |",
        )
        yield from map(_row, settings(recipe))


def _row(setting: Setting) -> str:
    default = "required" if setting.required else f"`{setting.default}`"
    cells = (f"`{setting.name}`", default, setting.kind, setting.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    data("\n".join(page()))
