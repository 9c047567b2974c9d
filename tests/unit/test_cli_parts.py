"""The pieces of the command line that need no model."""

import io
import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from commands import typed
from llama2.cli import commands, options, terminal
from llama2.cli.answer import Reply
from llama2.cli.conversation import Conversation
from llama2.cli.options import AnswerOptions
from llama2.cli.output import one_line
from llama2.console import stream
from llama2.errors import Llama2Error
from models import write_tiny_gguf


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["one", "two"], "one two"),
        ([""], ""),
        ([], "from\nstdin"),
        (["-"], "from\nstdin"),
        (["Sum", "up:", "@{file}"], "Sum up:\n\nnötes\n"),
        (["@{file}", "-", "and", "answer"], "nötes\n\n\nfrom\nstdin\n\nand answer"),
        (["@@home"], "@home"),
        (["a", "@@", "-b"], "a @ -b"),
    ],
)
def test_prompt_sources(words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes("nötes\n\r\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from\nstdin\n")))
    assert options.prompt([word.format(file=file) for word in words]) == text


def test_prompt_refuses_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(Llama2Error, match="latin: not UTF-8 text at byte 0"):
        options.prompt([f"@{tmp_path / 'latin'}"])
    with pytest.raises(Llama2Error, match="@@ begins a word with @"):
        options.prompt([f"@{tmp_path / 'none'}"])


def test_answer_options() -> None:
    chosen = AnswerOptions(max_tokens=7, stop=["a", "b"], lookup=3, temperature=0.0, logit_bias=["5=-inf", "6=1.5"])
    assert chosen.limits() == {"max_tokens": 7, "stop": ("a", "b"), "lookup": 3}
    assert chosen.sampling() == {"temperature": 0.0, "logit_bias": {5: -float("inf"), 6: 1.5}}
    assert AnswerOptions().sampling() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 1 << 64},
        {"max_tokens": 0},
        {"lookup": -1},
        {"stop": [""]},
        {"logit_bias": ["x=1"]},
        {"logit_bias": ["1=nan"]},
        {"logit_bias": ["1"]},
    ],
)
def test_answer_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(typer.BadParameter, match=next(iter(wrong))):
        AnswerOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "summary"),
    [
        (Reply(3), "0 tokens"),
        (Reply(3, token_ids=[5], seconds=1.0), "1 token"),
        (Reply(3, token_ids=[5] * 9, first_token_seconds=2.0, seconds=4.0), "9 tokens, 4.0 tokens/s"),
        (
            Reply(3, token_ids=[5] * 9, first_token_seconds=2.0, seconds=4.0, drafted_tokens=6, accepted_tokens=5),
            "9 tokens, 4.0 tokens/s, 5 of 6 drafts accepted",
        ),
    ],
)
def test_summary_of_an_answer(reply: Reply, summary: str) -> None:
    assert reply.summary() == summary


def _conversation() -> Conversation:
    return Conversation(
        "some-model",
        {"temperature": 0.5, "logit_bias": {3: -float("inf")}},
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße\nan alle"},
            {"role": "assistant", "content": "🙂"},
        ],
    )


def test_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    _conversation().save(path)
    assert Conversation.load(path) == _conversation()
    assert {"format", "version", "model", "sampling", "messages", "adapters"} == set(json.loads(path.read_text()))
    _conversation().save(path)  # replaces its own kind
    assert os.listdir(tmp_path) == ["talk.json"]

    other = tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(Llama2Error, match="not a saved conversation"):
        _conversation().save(other)
    assert other.read_text() == "precious"


def test_adapters_of_a_conversation(tmp_path: Path) -> None:
    """They are part of what answered; conversations that were saved before there were any have none."""
    path = tmp_path / "talk.json"
    replace(_conversation(), adapters=["tuned:0.5"]).save(path)
    assert Conversation.load(path).adapters == ["tuned:0.5"]
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "adapters": [1]}))
    with pytest.raises(Llama2Error, match="damaged conversation: adapters are not all text"):
        Conversation.load(path)
    del record["adapters"]
    path.write_text(json.dumps(record))
    assert Conversation.load(path).adapters == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    _conversation().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Llama2Error, match="cannot be written"):
        Conversation("other", {}, _conversation().messages).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["talk.json"]


def test_system_prompt_of_a_conversation() -> None:
    talk = _conversation()
    assert (talk.system, len(talk.turns)) == ("Be brief.", 2)
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.system = "Be long."
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    talk.system = None
    assert (talk.messages, talk.system) == ([], None)


def _record(**changes: object) -> bytes:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"format": "llama2 conversation 1", "version": "0", "model": "m", "sampling": {}, "messages": messages}
    return json.dumps({k: v for k, v in (record | changes).items() if v is not ...}, default=str).encode()


def test_a_conversation_in_which_nothing_was_answered_goes_on(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    path = tmp_path / "saved.json"
    path.write_bytes(_record(messages=turns))
    assert Conversation.load(path).messages == turns


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (_record()[:-5], "not JSON"),
        (b"[1, 2]", "not a saved conversation"),
        (_record(format="llama2 conversation 99"), "not a saved conversation"),
        (_record(messages=...), "'messages' is missing"),
        (_record(messages=None), "damaged"),
        (_record(messages={}), "not dict"),
        (_record(messages=[]), "no messages"),
        (_record(messages=[{"role": "user", "content": "a"}]), "last message"),
        (_record(messages=[{"role": "bard", "content": "a"}]), "message 0"),
        (_record(messages=[{"role": "user", "content": 5}]), "message 0"),
        (_record(messages=[{"role": ["user"], "content": "a"}]), "message 0"),
        (_record(messages=["hello"]), "message 0"),
        (_record(model=["m"]), "model is list"),
        (_record(sampling=[1]), "damaged"),
        (_record(sampling={"temprature": 1}), "temprature"),
        (_record(sampling={"temperature": "hot"}), "temperature"),
        (_record(sampling={"logit_bias": {"x": 1}}), "damaged"),
        (_record(sampling={"logit_bias": 5}), "damaged"),
    ],
)
def test_damaged_conversations_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(Llama2Error, match=reason) as caught:
        Conversation.load(path)
    assert str(path) in str(caught.value)


def test_an_endless_file_is_not_read() -> None:
    with pytest.raises(Llama2Error, match="not a regular file"):
        Conversation.load(Path("/dev/zero"))


def test_errors_are_one_harmless_line() -> None:
    assert one_line(Llama2Error("a\n\x1b[31mred\x07")) == "a ␛[31mred␇"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.txt")) == "x.txt: No such file or directory"
    assert one_line(typer.BadParameter("no good")) == "Invalid value: no good (see `llama2 --help`)"
    assert "--context" in one_line(MemoryError())


@pytest.mark.parametrize(("terminal", "shown"), [(True, "␛]0;x␇ \t\né\ufffd"), (False, "\x1b]0;x\x07 \t\né\x9b")])
def test_an_answer_cannot_steer_the_terminal(terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    output.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", output)
    stream("\x1b]0;x\x07 \t\né\x9b")
    assert output.getvalue() == shown


#: A name that sets a terminal's title and turns the text behind it around; and how it is shown.
HOSTILE, SHOWN = "a\x1b]0;x\x07\u202e", "a␛]0;x␇<U+202E>"


def test_names_cannot_steer_the_terminal_of_a_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(_conversation(), model=f"org/{HOSTILE}", adapters=[HOSTILE]).save(tmp_path / HOSTILE)
    lines = iter([f"/load {tmp_path / HOSTILE}", "/exit"])
    monkeypatch.setattr(terminal, "_session", lambda: SimpleNamespace(prompt=lambda _: next(lines)))
    for file in (sys.stdout, sys.stderr):
        monkeypatch.setattr(file, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    model: Any = SimpleNamespace(engine=SimpleNamespace(context=8))
    terminal.TerminalChat(model, replace(_conversation(), model=f"my/{HOSTILE}"), {}, neutralise=False).run()
    assert capsys.readouterr() == (
        f"Loaded 2 messages from {tmp_path}/{SHOWN}.\nThey are with org/{SHOWN} + {SHOWN}; my/{SHOWN} continues.\n",
        f"{SHOWN}, context of 8 tokens; /help lists the commands\n",
    )


def test_names_of_models_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / f"models--org--{HOSTILE}" / "snapshots" / "0" / f"{HOSTILE}.gguf"
    path.parent.mkdir(parents=True)
    write_tiny_gguf(path, edit=lambda writer: (writer.add_name(HOSTILE), writer.add_license(HOSTILE)))
    _, listed, _ = typed(capsys, "list")
    assert f"org/{SHOWN}:{SHOWN}@0 " in listed
    _, shown, _ = typed(capsys, "show", path)
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert (rows["name"], rows["licence"], rows["path"]) == (SHOWN, SHOWN, str(path).replace(HOSTILE, SHOWN))
    assert not {"\x1b", "\x07", "\u202e"} & {*listed, *shown}


def test_every_file_of_the_folder_is_a_command() -> None:
    files = {file.stem for file in Path(commands.__file__).parent.glob("[!_]*.py")}
    assert set(commands.names()) == files
    assert commands.names()[:3] == ["chat", "generate", "embed"]
    for name in files:
        module = import_module(f"llama2.cli.commands.{name}")
        assert hasattr(module, "group") or (callable(module.command) and module.EXAMPLE.startswith("Example: llama2 "))
