"""Files with a watermark's key: TOML, readable by its owner alone."""

from __future__ import annotations

import os
import secrets
import tomllib
from pathlib import Path
from typing import Any, Literal

from llama2 import files
from llama2.engine.watermark import LARGEST_KEY, Kgw, SynthId, Watermark
from llama2.errors import RequestError, SafetyError

#: Layers of a new key's tournament.
LAYERS = 30
_LONGEST = 1 << 16
_FIELDS = {"synthid": {"keys", "ngram"}, "kgw": {"key", "share", "bias"}}


def create(path: Path, scheme: Literal["synthid", "kgw"], layers: int = LAYERS) -> Watermark:
    """Write a new random key. Raises SafetyError where there is a file already, or the system refuses."""
    made: Watermark
    if scheme == "synthid":
        made = SynthId(tuple(secrets.randbelow(LARGEST_KEY) for _ in range(layers)))
        text = f"keys = {[*made.keys]}\nngram = {made.ngram}\n"
    else:
        made = Kgw(1 + secrets.randbelow((1 << 40) - 1))
        text = f"key = {made.key}\nshare = {made.share}\nbias = {made.bias}\n"
    head = "# A watermark's key: who has it can detect the mark, and remove it. Keep it secret.\n"
    write_secret(path, f'{head}scheme = "{scheme}"\n{text}'.encode())
    return made


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone reads. Raises SafetyError where there is one, or the system refuses."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise SafetyError(f"{path}: is there already; a key is never overwritten, since its texts need it") from None
    except OSError as error:
        raise SafetyError(f"{path}: cannot be written ({error.strerror})") from None


def load(path: Path) -> Watermark:
    """Read a key. Raises SafetyError, in one line, for a file of another kind."""
    data = files.read(path, limit=_LONGEST, error=SafetyError)

    def refusal(reason: object) -> SafetyError:
        return SafetyError(f"{path}: is not a watermark's key ({reason}); make one with `llama2 watermark key`")

    try:
        table: dict[str, Any] = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        raise refusal("it is not TOML") from None
    scheme = table.pop("scheme", None)
    if scheme not in _FIELDS:
        raise refusal(f"its scheme is {scheme!r}, and synthid and kgw are known")
    if wrong := sorted(table.keys() ^ _FIELDS[scheme]):
        raise refusal(f"{wrong[0]} is {'unknown' if wrong[0] in table else 'missing'}")
    try:
        if scheme == "synthid":
            return SynthId(tuple(_whole(key) for key in table["keys"]), _whole(table["ngram"]))
        return Kgw(_whole(table["key"]), float(table["share"]), float(table["bias"]))
    except (RequestError, TypeError, ValueError) as error:
        raise refusal(str(error).removeprefix("watermark: ")) from None


def scheme_of(watermark: Watermark) -> str:
    """The name of a watermark's scheme, as key files have it."""
    return "synthid" if isinstance(watermark, SynthId) else "kgw"


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value
