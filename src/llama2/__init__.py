"""Llama 2, whole: run, change, train, align, measure and serve Llama-family models.

    import llama2

    with llama2.load() as model:
        print(model.chat("Why is the sky blue?").text)

Importing the package loads none of its parts; each comes with the first use of its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2 import checkpoint as checkpoint
    from llama2 import convert as convert
    from llama2 import engine as engine
    from llama2 import errors as errors
    from llama2 import hub as hub
    from llama2 import text as text
    from llama2.api import Model as Model
    from llama2.api import load as load
    from llama2.engine.answer import Answer as Answer
    from llama2.engine.request import Event as Event
    from llama2.engine.request import Request as Request
    from llama2.engine.request import Sampling as Sampling
    from llama2.engine.runtime import Runtime as Runtime
    from llama2.errors import Llama2Error as Llama2Error
    from llama2.reference import Llama as Llama
    from llama2.text.dialog import Dialog as Dialog
    from llama2.text.dialog import Message as Message

    __version__: str

_ROOMS = ("checkpoint", "convert", "engine", "errors", "hub", "text")
_HOMES = {
    "Answer": "engine.answer",
    "Dialog": "text.dialog",
    "Event": "engine.request",
    "Llama": "reference",
    "Llama2Error": "errors",
    "Message": "text.dialog",
    "Model": "api",
    "Request": "engine.request",
    "Runtime": "engine.runtime",
    "Sampling": "engine.request",
    "load": "api",
}
__all__ = ["__version__", *_ROOMS, *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"llama2.{name}")
    if name in _HOMES:
        return getattr(import_module(f"llama2.{_HOMES[name]}"), name)
    if name == "__version__":
        from llama2.version import package_version

        return package_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
