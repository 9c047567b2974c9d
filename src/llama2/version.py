"""The version of this package."""

from __future__ import annotations


def package_version() -> str:
    """The version of the installed distribution `whole-llama`, read when it is needed."""
    from importlib import metadata

    return metadata.version("whole-llama")
