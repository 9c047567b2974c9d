"""Groups of commands of which one is run where none is named."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def with_default(name: str) -> type[TyperGroup]:
    """A group in which `llama2 GROUP …` is `llama2 GROUP NAME …`."""

    class WithDefault(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if args and args[0] not in (*self.commands, "--help"):
                args = [name, *args]
            return super().parse_args(ctx, args)

    return WithDefault
