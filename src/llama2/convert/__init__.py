"""Any model format → any other, with a receipt that nothing was lost on the way."""

from __future__ import annotations

from llama2.convert.conversion import FORMATS, convert

__all__ = ["FORMATS", "convert"]
