"""Models of the Hugging Face Hub, in its own cache layout (`models--org--name/{blobs,refs,snapshots}`).

huggingface_hub speaks to the server, and is imported only then: it takes long, and what is here needs no server. It
does not continue a download that another process began, nor compare hashes. So large files are streamed here by its
`http_get`. They become blobs of the cache only after their SHA-256 was found right.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llama2.errors import HubError
from llama2.hub import checklist, licence, store
from llama2.hub.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:[:@][^:@]+)*)", re.ASCII)
_FILE = re.compile(r".*\.(gguf|safetensors|bin|pth|pt)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORMAT = re.compile(r"(?:^|[-._])((?:i?q\d|tq\d|b?f(?:p)?\d|mxfp\d|nvfp\d)\w*)$", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_META = re.compile(r"consolidated\.(\d\d\.pth|safetensors)")
_NOTICES = r"(?:LICEN[CS]E|USE_POLICY|NOTICE)(?:\.\w+)?"
_BESIDE = (
    r"(?:config|generation_config|{}\.index|special_tokens_map|added_tokens)\.json|tokenizer.*|chat_template\.\w+|"
    r"additional_chat_templates/[\w-]+\.jinja|"
)
_BESIDE_SAFETENSORS, _BESIDE_PICKLES = (
    re.compile(_BESIDE.format(re.escape(name)) + _NOTICES, re.IGNORECASE)
    for name in ("model.safetensors", "pytorch_model.bin")
)
_BESIDE_META = re.compile(rf"params\.json|tokenizer\.model|\w*checklist\.chk|{_NOTICES}", re.IGNORECASE)
#: Weights in the order in which a repository with several kinds is taken, each with the files beside them.
_WEIGHTS = ((_SAFETENSORS, _BESIDE_SAFETENSORS), (_PICKLES, _BESIDE_PICKLES), (_META, _BESIDE_META))


class NoRepositoryError(HubError):
    """The Hub has no repository of this name, or hides it."""


@dataclass(frozen=True, slots=True)
class Repository:
    """`org/name`, and what of it: `:Q4_K_M` one GGUF file, `@revision` a branch, tag or commit."""

    repo: str
    quantization: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        mark = "" if self.revision == "main" else f"@{self.revision}"
        return self.repo + (f":{self.quantization}" if self.quantization else "") + mark

    @property
    def folder(self) -> Path:
        """The repository's place in the Hub's cache."""
        return cache() / f"models--{self.repo.replace('/', '--')}"

    @property
    def record(self) -> Path:
        """Where it is written down which files were fetched by this program."""
        return store.home() / "fetched" / f"{self.repo.replace('/', '--')}.json"


def parse(name: str) -> Repository | None:
    """The repository that `name` means; None when it does not look like one."""
    match = _NAME.fullmatch(name)
    if match is None or _FILE.fullmatch(name) or ".." in name:
        return None
    marks = re.findall(r"([:@])([^:@]+)", match[2])
    if len({sign for sign, _ in marks}) < len(marks):
        raise HubError(f"{name}: one :FORMAT and one @revision at most, as in org/name:Q4_K_M@main")
    given = dict(marks)
    return Repository(match[1], given.get(":"), given.get("@", "main"))


def cache() -> Path:
    """The Hub's cache folder by its environment variables."""
    variables = os.environ
    base = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or str(Path(base, "huggingface"))
    folder = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE") or str(Path(home, "hub"))
    return store.below_home(os.path.expandvars(folder), "HF_HOME")


def label(file: str) -> str:
    """The number format in a GGUF file's name (`Q4_K_M`), or the whole name where there is none."""
    stem = _PART.sub("", PurePosixPath(file).stem)
    match = _FORMAT.search(stem)
    return match[1].upper() if match else stem


def choose(repository: Repository, files: list[str]) -> list[str]:
    """The files of a repository that make up the model, side files first. Raises HubError with what there is."""
    gguf = sorted(f for f in files if f.lower().endswith(".gguf"))
    if wanted := (repository.quantization or "").lower():
        found = [f for f in gguf if wanted in (label(f).lower(), PurePosixPath(f).name.lower())]
        if not found:
            raise HubError(f"{repository.repo}: no GGUF file {repository.quantization}; there is {_labels(gguf)}")
    else:
        for weights, beside in _WEIGHTS:
            if found := sorted(f for f in files if weights.fullmatch(f)):
                return sorted(f for f in files if beside.fullmatch(f)) + found
        found = gguf
        if not found and (adapter := next((f for f in _ADAPTERS if f in files), None)):
            return [
                *sorted(f for f in files if f == "adapter_config.json" or _BESIDE_SAFETENSORS.fullmatch(f)),
                adapter,
            ]
        if not found:
            raise HubError(
                f"{repository.repo}: no weights (GGUF, safetensors, PyTorch's or Meta's); choose another repository"
            )
    if part := _PART.search(PurePosixPath(found[0]).stem):
        count = int(part[1])
        whole = [f"{found[0][: -len(part[0]) - 5]}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
        if found == whole:
            return found
        if {*found} < {*whole}:
            raise HubError(f"{repository}: only {len(found)} of the {count} files of this GGUF model are there")
    if len(found) > 1:
        raise HubError(
            f"{repository}: several GGUF files; choose one, as in {repository.repo}:{label(found[0])}: {_labels(found)}"
        )
    return found


def _labels(gguf: list[str]) -> str:
    labels = [label(f) for f in gguf]
    names = labels if len(set(labels)) == len(labels) else [PurePosixPath(f).name for f in gguf]
    return ", ".join(names) or "none"


def find(repository: Repository, progress: Progress) -> Path | None:
    """The model in the Hub's cache, verified, no matter who fetched it; None unless all of it is there. No network."""
    snapshot = _snapshot(repository)
    if snapshot is None:
        return None
    try:
        files = choose(repository, present(snapshot))
    except HubError:  # not this format, or not yet
        return None
    model = _model(snapshot, files)
    if model == snapshot and not _required(snapshot, files) <= set(present(snapshot)):
        return None
    for blob in (_blob_of(snapshot / f) for f in files):
        if _SHA256.fullmatch(blob.name) and not store.verified(blob, blob.name, progress):
            return None
    if model == snapshot:
        checklist.verify(snapshot, progress)
    return model


def _model(snapshot: Path, files: list[str]) -> Path:
    """What stands for the model: a GGUF file itself, else the folder."""
    return snapshot / files[0] if files[0].lower().endswith(".gguf") else snapshot


def _blob_of(link: Path) -> Path:
    """Where the bytes of a snapshot's file lie: a blob named by its hash, or the file itself on disks without links."""
    return link.parent / os.readlink(link) if link.is_symlink() else link


def _snapshot(repository: Repository) -> Path | None:
    commit = repository.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (repository.folder / "refs" / commit).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    snapshot = repository.folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def present(snapshot: Path) -> list[str]:
    """The files of a snapshot that can be read, by their path below it."""
    return sorted(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())


def _required(snapshot: Path, files: list[str]) -> set[str]:
    """The files that the lists among a snapshot's `files` name; a download that stopped half-way lacks some."""
    listed = next((name for name in files if name.endswith(".index.json")), None)
    index = (store.read_record(snapshot / listed) if listed else None) or {}
    weights = index.get("weight_map")
    named = weights.values() if isinstance(weights, dict) else ()
    return {n for n in named if isinstance(n, str)} | set(checklist.digests(snapshot))


def pull(repository: Repository, progress: Progress) -> Path:
    """Fetch what is missing of the model, and show its licence the first time. Raises HubError."""
    from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url

    with store.writing(cache()), _explained(repository):
        info = HfApi().model_info(repository.repo, revision=repository.revision, files_metadata=True)
        siblings = {s.rfilename: s for s in info.siblings or () if ".." not in PurePosixPath(s.rfilename).parts}
        files = choose(repository, list(siblings))
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise HubError(f"{repository}: the server names no commit; check HF_ENDPOINT")
        licence.show_once(repository.repo, _terms(repository.repo, info))
        folder = repository.folder
        snapshot = folder / "snapshots" / commit
        with store.locked(store.home() / "locks" / f"{folder.name}.lock"):
            missing = [f for f in files if not (snapshot / f).is_file()]
            store.require_room(cache(), sum(siblings[f].size or 0 for f in missing))
            _remember(repository, commit, missing)
            for file in files:
                large = siblings[file].lfs
                if large is not None:
                    url = hf_hub_url(repository.repo, file, revision=commit, endpoint=constants.ENDPOINT)
                    _fetch_blob(folder / "blobs", url, siblings[file], progress)
                hf_hub_download(repository.repo, file, revision=commit, cache_dir=cache())
                if large is not None and not store.verified(snapshot / file, large.sha256, progress):
                    raise HubError(f"{repository}: {file} is damaged; run it again to fetch it anew")
            if not _COMMIT.fullmatch(repository.revision):
                ref = folder / "refs" / repository.revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit, encoding="utf-8")
    model = _model(snapshot, files)
    if model == snapshot:
        checklist.verify(snapshot, progress)
    return model


def _fetch_blob(blobs: Path, url: str, file: Any, progress: Progress) -> None:
    """Put a large file (a RepoSibling) into the cache's blobs, continuing where an earlier attempt stopped."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    name, size, sha256 = PurePosixPath(file.rfilename).name, int(file.size), str(file.lfs.sha256)
    if not _SHA256.fullmatch(sha256):
        raise HubError(f"{url}: the server gives no SHA-256; check HF_ENDPOINT")
    blob, part = blobs / sha256, blobs / f"{sha256}.part"
    if blob.is_file():
        if store.verified(blob, sha256, progress):
            return
        blob.unlink()
    if size > constants.MAX_HTTP_DOWNLOAD_SIZE:  # only huggingface_hub's Xet protocol serves files of this size
        return
    blobs.mkdir(parents=True, exist_ok=True)
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    with _Reporter(part, lambda done: progress(f"fetching {name}", done, size)) as target, _no_bars():
        http_get(url, target, resume_size=target.tell(), headers=build_hf_headers(), expected_size=size)
    digest = store.digest(part, "sha256", progress)
    if digest != sha256:
        part.unlink()
        raise HubError(f"{url}: SHA-256 {digest} instead of {sha256}; the file was thrown away, run it again")
    part.replace(blob)
    store.trust(blob, sha256)


class _Reporter(io.BufferedWriter):
    """A file to append to that reports how long it is after every write."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._report = report

    def write(self, data: Buffer, /) -> int:
        written = super().write(data)
        self._report(self.tell())
        return written


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """huggingface_hub's own bars are off meanwhile: one bar is enough."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _terms(repo: str, info: Any) -> str:
    card = info.card_data or {}
    name = str(card.get("license_name") or card.get("license") or "")
    if re.sub(r"[\W_]", "", name.lower()).startswith("llama2") or re.match(
        r"meta-llama/llama-2\b", repo, re.IGNORECASE
    ):
        return licence.LLAMA2
    from huggingface_hub import constants

    return f"licence {name or 'not stated'}; read it at {card.get('license_link') or f'{constants.ENDPOINT}/{repo}'}"


@contextlib.contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turn what the Hub answers, or that it does not, into one line with advice."""
    from huggingface_hub import constants, errors

    def refusal(reason: str) -> HubError:
        return HubError(f"{repository}: {reason}")

    page = f"{constants.ENDPOINT}/{repository.repo}"
    token = f"a token of {constants.ENDPOINT}/settings/tokens in HF_TOKEN (or `hf auth login`)"
    try:
        yield
    except errors.GatedRepoError as error:
        raise refusal(f"gated; accept its licence at {page}, wait until access is granted, and put {token}") from error
    except errors.RepositoryNotFoundError as error:
        raise NoRepositoryError(f"{repository}: no such repository, or a private one, which needs {token}") from error
    except errors.RevisionNotFoundError as error:
        raise refusal(f"no revision {repository.revision}; {page}/tree/main lists branches and tags") from error
    except errors.OfflineModeIsEnabled as error:
        raise refusal("not (or not all) in the cache, and HF_HUB_OFFLINE forbids fetching it; unset it once") from error
    except errors.HFValidationError as error:
        raise refusal("not a valid repository name; give org/name") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "nothing")
        if status in {401, 403}:
            raise refusal(
                f"access refused ({status}): the token is wrong or lacks the right to read; put {token}"
            ) from error
        raise refusal(f"{constants.ENDPOINT} answers {status}; try again later") from error
    except Exception as error:
        transport = type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "requests", "urllib3"}
        if transport or isinstance(error, (ConnectionError, errors.LocalEntryNotFoundError)):
            raise refusal(
                f"cannot reach {constants.ENDPOINT}; check the network and proxy, then run it again to continue"
            ) from error
        raise


def local() -> Iterator[tuple[Repository, Path, list[Path]]]:
    """Every complete GGUF file and Llama folder in the Hub's cache, and the files it consists of."""
    for folder in sorted(cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        refs = {p.read_text(encoding="utf-8").strip(): p for p in sorted((folder / "refs").rglob("*")) if p.is_file()}
        for snapshot in sorted((folder / "snapshots").glob("*")):
            ref = refs.get(snapshot.name)
            revision = ref.relative_to(folder / "refs").as_posix() if ref else snapshot.name
            names = present(snapshot)
            gguf = [Repository(repo, label(f), revision) for f in names if f.lower().endswith(".gguf")]
            for repository in [*dict.fromkeys(gguf), Repository(repo, None, revision)]:
                with contextlib.suppress(HubError):
                    files = choose(repository, names)
                    if files[-1] in _ADAPTERS:  # no model by itself
                        continue
                    path = _model(snapshot, files)
                    folder_is_llama = (
                        path == snapshot and _is_llama(snapshot) and _required(snapshot, files) <= {*names}
                    )
                    if folder_is_llama or (path != snapshot and repository.quantization):
                        yield repository, path, [snapshot / f for f in files]


def _is_llama(snapshot: Path) -> bool:
    configuration = store.read_record(snapshot / "config.json") or {}
    return configuration.get("model_type") in ("llama", "mistral") or (snapshot / "params.json").is_file()


def _remember(repository: Repository, commit: str, files: list[str]) -> None:
    record = store.read_record(repository.record) or {}
    record[commit] = sorted({*record.get(commit, ()), *files})
    store.write_record(repository.record, record)


def _unsplit(file: Path) -> Path:
    """What a file of a split model and its neighbours have in common; a whole file itself."""
    return file.with_name(_PART.sub("", file.stem) + file.suffix)


def remove(repository: Repository, path: Path) -> int:
    """Delete the model at `path`, as far as this program fetched it; bytes freed. Raises HubError if it did not."""
    snapshot = next(p for p in (path, *path.parents) if p.parent.name == "snapshots")
    record = store.read_record(repository.record) or {}
    ours = {f for f in record.get(snapshot.name, ()) if path == snapshot or _unsplit(path) == _unsplit(snapshot / f)}
    if not ours:
        raise HubError(
            f"{repository}: fetched by another program; remove it with `hf cache rm model/{repository.repo}`"
        )
    freed = 0
    for link in (snapshot / f for f in ours):
        blob = _blob_of(link).resolve()
        link.unlink(missing_ok=True)
        if blob.is_file() and not any(p.resolve() == blob for p in snapshot.parent.rglob("*")):
            freed += blob.stat().st_size
            blob.unlink()
    record[snapshot.name] = sorted({*record[snapshot.name]} - ours)
    store.write_record(repository.record, record)
    if not present(snapshot.parent):
        shutil.rmtree(repository.folder)
    return freed
