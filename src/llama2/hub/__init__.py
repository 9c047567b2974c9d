"""A model's name becomes a verified local file: the package index, the Hugging Face Hub, or a path."""

from __future__ import annotations

from llama2.hub.hub import find, locate, pull
from llama2.hub.registry import DEFAULT
from llama2.hub.store import home

__all__ = ["DEFAULT", "find", "home", "locate", "pull"]
