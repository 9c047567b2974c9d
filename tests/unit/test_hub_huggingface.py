"""Models of the Hugging Face Hub: names, files of a repository, and a local server that speaks the Hub's routes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama2 import hub
from llama2.errors import HubError
from llama2.hub import huggingface, licence
from llama2.hub.huggingface import Repository
from servers import COMMIT, HuggingFace

MODEL = bytes(range(256)) * 12_000  # 3 MB
CONFIG = json.dumps({"model_type": "llama"}).encode()
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
CHAT = "meta-llama/Llama-2-7b-chat-hf"
GGUF = "TheBloke/Llama-2-7B-Chat-GGUF"
META = "meta-llama/Llama-2-7b"

Process = subprocess.Popen[str]
Run = Callable[..., tuple[str, str]]
Fetch = Callable[[str], Path]

#: Runs `hub` in a process of its own, because huggingface_hub reads its environment when it is imported.
SCRIPT = """
import sys
from llama2 import hub
from llama2.errors import Llama2Error
try:
    print(getattr(hub, sys.argv[1])(sys.argv[2]))
except Llama2Error as error:
    sys.exit(f"error: {error}")
finally:
    print("imported" if "huggingface_hub" in sys.modules else "not imported", file=sys.stderr)
"""


@pytest.fixture
def server() -> Iterator[HuggingFace]:
    server = HuggingFace()
    server.repositories[GGUF] = {
        "README.md": b"#",
        "llama-2-7b-chat.Q4_K_M.gguf": MODEL,
        "llama-2-7b-chat.Q8_0.gguf": MODEL[:-1],
    }
    server.cards[GGUF] = {"license": "llama2"}
    server.repositories[CHAT] = {
        ".gitattributes": b"",
        "config.json": CONFIG,
        "generation_config.json": b"{}",
        "model.safetensors.index.json": INDEX.encode(),
        "pytorch_model-00001-of-00002.bin": b"pickle",
        "tokenizer.model": b"sp",
        "USE_POLICY.md": b"#",
        "original/params.json": b"{}",
        **SHARDS,
    }
    weights = {"consolidated.00.pth": b"abc", "params.json": b""}
    listed = "".join(f"{hashlib.md5(c, usedforsecurity=False).hexdigest()}  {n}\n" for n, c in weights.items())
    server.repositories[META] = {**weights, "tokenizer.model": b"sp", "checklist.chk": listed.encode()}
    yield server
    server.close()


@pytest.fixture
def start(server: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    """Start `hub.NAME(MODEL)` in a process that knows only the test's server."""
    for variable in [v for v in os.environ if v.startswith("HF_") or v.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    started: list[Process] = []

    def start(function: str, name: str, **environment: str) -> Process:
        command = [sys.executable, "-c", SCRIPT, function, name]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start: Callable[..., Process]) -> Run:
    """What `hub.NAME(MODEL)` prints: its result, and standard error."""

    def run(function: str, name: str, **environment: str) -> tuple[str, str]:
        out, err = start(function, name, **environment).communicate(timeout=60)
        assert "Traceback" not in err, err
        return out.strip(), err.strip()

    return run


@pytest.fixture
def fetch(run: Run) -> Fetch:
    """The path that `hub.locate(MODEL)` prints."""

    def fetch(name: str) -> Path:
        out, err = run("locate", name)
        assert out, err
        return Path(out)

    return fetch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("org/name:Q4_K_M", Repository("org/name", "Q4_K_M")),
        ("org/na.me@refs/pr/1", Repository("org/na.me", None, "refs/pr/1")),
        ("org/name@v1:Q8_0", Repository("org/name", "Q8_0", "v1")),
        ("org/name:Q8_0@v1", Repository("org/name", "Q8_0", "v1")),
        ("models/llama.gguf", None),
        ("a/b/c", None),
        ("../name", None),
        ("org/name@../../x", None),
        ("name", None),
    ],
)
def test_parse(name: str, expected: Repository | None) -> None:
    assert huggingface.parse(name) == expected
    if expected:
        assert huggingface.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("llama-2-7b-chat.Q4_K_M.gguf", "Q4_K_M"),
        ("ggml-model-q4_0.gguf", "Q4_0"),
        ("Llama-3.2-1B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("BF16/SmolLM2-135M-bf16-00001-of-00002.gguf", "BF16"),
        ("tinyllama-fp16.gguf", "FP16"),
        ("model.gguf", "model"),
    ],
)
def test_label(file: str, expected: str) -> None:
    assert huggingface.label(file) == expected


def test_weights_are_chosen_in_the_order_in_which_a_folder_is_read() -> None:
    """Safetensors, PyTorch's pickles, Meta's or Mistral's, GGUF; with their own index and no other."""
    pickles = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    own = ["consolidated.safetensors", "params.json"]
    left = ["a.gguf", "config.json", "model.safetensors", "model.safetensors.index.json", *own, *pickles]
    for files in (
        ["config.json", "model.safetensors.index.json", "model.safetensors"],
        ["config.json", "pytorch_model.bin.index.json", pickles[0]],
        ["params.json", own[0]],
        ["a.gguf"],
    ):
        assert huggingface.choose(huggingface.Repository("o/n"), left) == files
        left.remove(files[-1])


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("o/n:Q2_K", ["a-Q4_0.gguf", "a-Q8_0.gguf"], "o/n: no GGUF file Q2_K; there is Q4_0, Q8_0"),
        ("o/n:Q2_K", ["config.json"], "o/n: no GGUF file Q2_K; there is none"),
        ("o/n", ["a-Q4_0.gguf", "a-Q8_0.gguf"], "o/n: several GGUF files; choose one, as in o/n:Q4_0: Q4_0, Q8_0"),
        ("o/n:Q4_0", ["a-Q4_0.gguf", "b-Q4_0.gguf"], "several GGUF files.*a-Q4_0.gguf, b-Q4_0.gguf"),
        ("o/n:F16", ["a-F16-00001-of-00002.gguf"], "o/n:F16: only 1 of the 2 files of this GGUF model are there"),
        ("o/n", ["config.json", "tf_model.h5"], r"o/n: no weights \(GGUF, safetensors, PyTorch's or Meta's\)"),
    ],
)
def test_choose_says_what_there_is(name: str, files: list[str], message: str) -> None:
    with pytest.raises(HubError, match=message):
        huggingface.choose(huggingface.parse(name), files)  # type: ignore[arg-type]


def test_choose_by_file_name_when_formats_repeat() -> None:
    assert huggingface.choose(Repository("o/n", "b-Q4_0.gguf"), ["a-Q4_0.gguf", "b-Q4_0.gguf"]) == ["b-Q4_0.gguf"]


def test_a_split_model_is_all_its_files() -> None:
    parts = [f"q4/a-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert huggingface.choose(Repository("o/n", "Q4_0"), [*parts, "b-Q8_0.gguf"]) == parts
    with pytest.raises(HubError, match="several GGUF files"):
        huggingface.choose(Repository("o/n", "Q4_0"), [*parts, "c-Q4_0.gguf"])


def test_a_split_model_is_fetched_and_removed_whole(server: HuggingFace, fetch: Fetch, run: Run) -> None:
    names = [f"big.Q5_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    server.repositories[GGUF] |= dict(zip(names, (MODEL, MODEL[::-1]), strict=True))
    path = fetch(f"{GGUF}:Q5_K_M")
    assert path.name == names[0]
    assert [(path.parent / name).read_bytes() for name in names] == [MODEL, MODEL[::-1]]
    run("remove", f"{GGUF}:Q5_K_M")
    assert not any((path.parent / name).exists() for name in names)


def test_a_gguf_file(server: HuggingFace, run: Run) -> None:
    out, err = run("locate", f"{GGUF}:q4_k_m")
    path = Path(out)
    assert path.name == "llama-2-7b-chat.Q4_K_M.gguf"
    assert path.parent == huggingface.cache() / "models--TheBloke--Llama-2-7B-Chat-GGUF" / "snapshots" / COMMIT
    assert path.read_bytes() == MODEL
    assert err == f"{GGUF}: {licence.LLAMA2.strip()}\nimported"
    assert "700 million monthly active users" in err

    server.close()  # warm: no network, no huggingface_hub, no licence
    assert run("locate", f"{GGUF}:Q4_K_M") == (out, "not imported")
    out, err = run("locate", f"{GGUF}:Q8_0")
    assert "imported" in err
    assert f"error: {GGUF}:Q8_0: cannot reach {server.url}; check the network and proxy" in err
    assert "HF_HUB_OFFLINE forbids fetching it" in run("locate", f"{GGUF}:Q8_0", HF_HUB_OFFLINE="1")[1]


def test_the_hubs_own_library_finds_what_was_fetched(fetch: Fetch) -> None:
    out = str(fetch(CHAT))
    script = f"import huggingface_hub as h; print(h.snapshot_download({CHAT!r}, local_files_only=True))"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == out
    script = f"import huggingface_hub as h; print(h.hf_hub_download({GGUF!r}, 'llama-2-7b-chat.Q8_0.gguf'))"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert hub.locate(f"{GGUF}:Q8_0") == Path(there)  # and the other way round, here without any network
    assert {m.name: (m.format, m.size) for m in hub.local() if "/" in m.name} == {
        CHAT: ("safetensors", sum(p.stat().st_size for p in Path(out).iterdir())),
        f"{GGUF}:Q8_0": ("gguf", len(MODEL) - 1),
    }
    with pytest.raises(HubError, match="fetched by another program; remove it with `hf cache rm"):
        hub.remove(f"{GGUF}:Q8_0")


def test_a_folder(server: HuggingFace, run: Run) -> None:
    out, err = run("locate", CHAT)
    assert out, err
    files = sorted(p.name for p in Path(out).rglob("*"))
    assert files == [
        "USE_POLICY.md",
        "config.json",
        "generation_config.json",
        *SHARDS,
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    assert "use policy" in err.lower()
    (Path(out) / "model-00002-of-00002.safetensors").unlink()  # incomplete
    assert hub.find(CHAT) is None
    assert run("locate", CHAT)[0] == out
    assert hub.find(CHAT) == Path(out)


def test_metas_folder_is_compared_with_its_checklist(server: HuggingFace, run: Run, fetch: Fetch) -> None:
    server.repositories[META]["params.json"] = b"{}"
    assert "params.json: damaged, its MD5 differs from checklist.chk" in run("pull", META)[1]
    server.repositories[META]["params.json"] = b""
    for folder in huggingface.cache().iterdir():
        for file in (folder / "snapshots").rglob("params.json"):
            file.unlink()
    folder = fetch(META)
    assert hub.locate(META) == folder


def test_an_interrupted_download_is_continued(server: HuggingFace, start: Callable[..., Process], fetch: Fetch) -> None:
    model = server.repositories[GGUF]["llama-2-7b-chat.Q4_K_M.gguf"] = MODEL * 8
    server.stall_after = 20_000_000
    process = start("locate", f"{GGUF}:Q4_K_M")
    blobs = Repository(GGUF).folder / "blobs"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in blobs.glob("*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = blobs.iterdir()
    done = part.stat().st_size
    assert part.name == f"{hashlib.sha256(model).hexdigest()}.part"
    assert 0 < done <= server.stall_after
    server.stall_after = None
    assert fetch(f"{GGUF}:Q4_K_M").read_bytes() == model
    assert server.gets("/store/") == [None, f"bytes={done}-"]


def test_wrong_bytes_never_become_a_model(server: HuggingFace, run: Run, fetch: Fetch) -> None:
    server.lie["llama-2-7b-chat.Q4_K_M.gguf"] = b"\1" + MODEL[1:]
    _, err = run("locate", f"{GGUF}:Q4_K_M")
    assert f"instead of {hashlib.sha256(MODEL).hexdigest()}; the file was thrown away" in err
    assert [p for p in huggingface.cache().rglob("*") if p.is_file() and p.stat().st_size >= len(MODEL)] == []
    server.lie.clear()
    blob = fetch(f"{GGUF}:Q4_K_M").resolve()
    blob.write_bytes(b"\1" + MODEL[1:])
    os.utime(blob, (1, 1))
    assert hub.find(f"{GGUF}:Q4_K_M") is None
    assert fetch(f"{GGUF}:Q4_K_M").read_bytes() == MODEL


@pytest.mark.usefixtures("start")
def test_what_the_hubs_own_library_downloads_is_verified_too(server: HuggingFace) -> None:
    """It downloads files that are too large for plain HTTP."""
    server.lie["llama-2-7b-chat.Q4_K_M.gguf"] = b"\1" + MODEL[1:]
    script = f"from llama2.hub import huggingface\nhuggingface._fetch_blob = lambda *_: None\n{SCRIPT}"
    command = [sys.executable, "-c", script, "locate", f"{GGUF}:Q4_K_M"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "llama-2-7b-chat.Q4_K_M.gguf is damaged; run it again" in run.stderr
    assert hub.find(f"{GGUF}:Q4_K_M") is None


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        (META, {}, r": gated; accept its licence at http://\S+/meta-llama/Llama-2-7b, wait until .* in HF_TOKEN"),
        (META, {"HF_TOKEN": "asked"}, ": gated; accept its licence"),
        (META, {"HF_TOKEN": "wrong"}, r": access refused \(401\): the token is wrong"),
        (f"{GGUF}@v9", {}, r": no revision v9; http://\S+/tree/main lists"),
        (f"{GGUF}", {}, ": several GGUF files; choose one"),
        (f"{GGUF}:Q5_0", {}, "no GGUF file Q5_0; there is Q4_K_M, Q8_0"),
        ("meta-llama/Llama-2-7b-chat-fh", {}, ": no such repository, or a private one"),
        (f"{GGUF}:Q8_0", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ": cannot reach http://127.0.0.1:9; check the network"),
        (f"{GGUF}:Q8_0", {"HF_HOME": "/dev/null/hf"}, r"/dev/null/hf/\S+: cannot be written \(Not a directory\)"),
        ("org/a--b", {}, ": not a valid repository name"),
    ],
)
def test_refusals(name: str, environment: dict[str, str], message: str, server: HuggingFace, run: Run) -> None:
    server.gated.add(META)
    _, err = run("locate", name, **environment)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"^error: .*{message}", line)


def test_a_missing_repository_suggests_what_is_here(run: Run, fetch: Fetch) -> None:
    fetch(CHAT)
    assert f"did you mean {CHAT}?" in run("locate", "meta-llama/Llama-2-7b-chat-fh")[1]


def test_a_granted_token(server: HuggingFace, run: Run) -> None:
    server.gated.add(META)
    assert Path(run("locate", META, HF_TOKEN="granted")[0]).is_dir()


def test_remove(fetch: Fetch) -> None:
    four, eight = (fetch(f"{GGUF}:{form}") for form in ("Q4_K_M", "Q8_0"))
    assert hub.remove(f"{GGUF}:Q4_K_M") == len(MODEL)
    assert not four.exists()
    assert eight.read_bytes() == MODEL[:-1]
    with pytest.raises(HubError, match="not fetched"):
        hub.remove(f"{GGUF}:Q4_K_M")
    assert hub.remove(f"{GGUF}:Q8_0") == len(MODEL) - 1
    assert not Repository(GGUF).folder.exists()


def test_a_full_disk(run: Run, server: HuggingFace) -> None:
    server.repositories[GGUF]["huge.Q2_K.gguf"] = b"x"
    reply = server._information
    server._information = lambda repo, files: _larger(reply(repo, files))  # type: ignore[method-assign]
    assert "1000000.00 GB are needed and" in run("locate", f"{GGUF}:Q2_K")[1]


def _larger(reply):  # type: ignore[no-untyped-def]
    body = json.loads(reply.body)
    body["siblings"][-1]["size"] = 10**15
    reply.body = json.dumps(body).encode()
    return reply


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_cache_is_where_the_hubs_library_has_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert huggingface.cache() == Path(expected)
    script = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == expected
