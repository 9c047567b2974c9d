"""Meta's `checklist.chk`: the MD5 of every file of a downloaded folder, as `md5sum` writes it (spec 1.4a)."""

from __future__ import annotations

import re
from pathlib import Path

from llama2.errors import HubError
from llama2.hub import store
from llama2.hub.progress import Progress

FILE = "checklist.chk"
_LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](?:\./)?(\S.*)")
_LIMIT = 1 << 20  # bytes; Meta's has some hundred


def digests(folder: Path) -> dict[str, str]:
    """MD5 by file name; empty when the folder has no list. Raises HubError for a list that is not one."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file.read(_LIMIT).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: cannot be read ({error}); fetch the folder again") from error
    found = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line.strip())
        if match is None or Path(match[2]).name != match[2]:
            raise HubError(f"{path}:{number}: not an MD5 and the name of a file beside it; fetch the folder again")
        found[match[2]] = match[1].lower()
    return found


def verify(folder: Path, progress: Progress) -> None:
    """Compare every listed file with its MD5, once. Raises HubError with the first that is missing or different."""
    for name, md5 in digests(folder).items():
        file = folder / name
        if not file.is_file():
            raise HubError(f"{file}: missing, though {FILE} lists it; fetch it again")
        if not store.verified(file, md5, progress, "md5"):
            raise HubError(f"{file}: damaged, its MD5 differs from {FILE}; fetch it again")
