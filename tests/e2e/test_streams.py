"""The program without a standard stream, without a home, and with what strangers wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import typed
from llama2.cli import main
from llama2.cli.conversation import Conversation
from models import write_tiny_gguf

pytestmark = pytest.mark.skipif(os.name == "nt", reason="streams of POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of sh, in which $0 is the program and $1 … are words."""
    script = line.replace("$0", f"{sys.executable} -m llama2")
    command = ["sh", "-c", script, "sh", *map(str, words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$0 generate -m $1 a --max-tokens 1 --temperature 0 <&-", 0, ""),
        (
            "$0 generate -m $1 <&-",
            1,
            "standard input: cannot be read (it is closed); give the text as words, or as @FILE",
        ),
        ("$0 generate -m $1 a --max-tokens 1 >&-", 1, "standard input or output is closed"),
        ("$0 list --json >&-", 1, "standard input or output is closed"),
        ("$0 generate -m $1 a --max-tokens 1 2>&-", 0, ""),
        ("$0 generate -m $1.none a 2>&-", 1, ""),
        ("$0 generate -m $1 a --max-tokens 1 <&- >&- 2>&-", 1, ""),
    ],
)
def test_a_closed_stream(line: str, status: int, said: str, model: Path) -> None:
    done = shell(line, model)
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (status, True, int(said != "")), done


def test_a_user_without_a_home(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys; os.path.expanduser = lambda path: path; from llama2.cli.main import run; run()"
    environment = {k: v for k, v in os.environ.items() if k not in ("LLAMA2_HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", script, "generate", "-m", str(model), "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    expected = "llama2: error: ~/.cache/llama2: this user has no home folder; point LLAMA2_HOME to a folder of yours\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_a_word_with_an_at_sign(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, error = typed(capsys, "generate", "-m", model, "@Peter, hello")
    assert (status, out) == (1, "")
    assert error == (
        "llama2: error: @Peter, hello: cannot be read (No such file or directory); @@ begins a word with @\n"
    )


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(mark: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(mark + "to \ufeff be".encode())
    done = shell(
        '$0 generate -m $1 @"$2" --echo --max-tokens 1 --json; $0 generate -m $1 --echo --max-tokens 1 --json < "$2"',
        model,
        tmp_path / "text",
    )
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert [text[:7] for text in texts] == ["to \ufeff be"] * 2


def test_an_endless_file_is_no_prompt(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, _, error = typed(capsys, "generate", "-m", model, "@/dev/zero")
    assert (status, "@/dev/zero: larger than 64 MB" in error) == (1, True)


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("org/name", []),
        ("smollm2-135m-instruct", []),
        ("a\x1b]0;x\x07\u202e/b", []),
        ("here", ["org/lora:0.5"]),
        ("here", ["here", "org/lora"]),
    ],
)
def test_a_conversation_fetches_nothing_by_itself(
    name: str, adapters: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama2 import hub

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Conversation(name, {}, messages, adapters).save(tmp_path / "talk")
    monkeypatch.setattr(hub, "find", lambda asked: tmp_path if asked == "here" else None)
    monkeypatch.setattr(hub, "locate", lambda *_, **__: pytest.fail("a download began"))
    status, out, error = typed(capsys, "chat", "hello", "--resume", tmp_path / "talk")
    assert (status, out, error.count("\n"), "which is not here; fetch it with `llama2 pull" in error) == (
        1,
        "",
        1,
        True,
    )
    assert error.isprintable() or error[:-1].isprintable()


def test_what_nobody_foresaw_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(asked: str | None) -> None:
        raise ZeroDivisionError("at\x1b[31m\nall")

    monkeypatch.setattr(main, "program", fails)
    line = "llama2: error: unexpected ZeroDivisionError: at␛[31m all; with --debug the whole traceback is shown\n"
    assert typed(capsys, "list") == (1, "", line)
    status, _, error = typed(capsys, "list", "--debug")
    assert (status, error.startswith("Traceback"), error.endswith(line)) == (1, True, True)


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warns(asked: str | None) -> object:
        warnings.simplefilter("always")
        warnings.warn("mind\x07 this", stacklevel=1)
        return lambda *_, **__: 0

    monkeypatch.setattr(main, "program", warns)
    assert typed(capsys, "list") == (0, "", "llama2: mind␇ this\n")
