"""The commands, one file each: whatever is in this folder is a command of its file's name.

A file has either `command`, a function whose parameters typer understands, and `EXAMPLE`; or `group`, a typer
application of several commands. Parameters that are dataclasses become options (`options.expand`). `RECIPES` names the
settings class of each command that takes a recipe: `{"llama2 pretrain": "llama2.train.settings:PretrainRecipe"}`.
Functions import heavy libraries, since `llama2 --help` imports every file.
"""

from __future__ import annotations

from pkgutil import iter_modules

#: The order of `llama2 --help`; others follow by name.
_ORDER = (
    *("chat", "generate", "embed", "serve", "bench", "plan", "convert", "quantize", "export", "pretrain", "evaluate"),
    *("pull", "list", "show", "rm", "data", "tokenizer", "sft", "runs"),
)


def names() -> list[str]:
    """Every command's name."""
    found = sorted(module.name for module in iter_modules(__path__))
    return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
