"""`llama2 chat` as a person uses it, in a real pseudo-terminal."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("a pseudo-terminal of POSIX", allow_module_level=True)

ALT_ENTER, CTRL_C, CTRL_D, TAB, UP = "\x1b\r", "\x03", "\x04", "\t", "\x1b[A"
READY, SENT = r"\x1b\[\?2004h", r"\x1b\[\?2004l"  # the prompt begins and ends by switching bracketed paste on and off
ENDLESS = ("--logit-bias", "0=-inf", "--logit-bias", "2=-inf")  # the default model's two end tokens


class Terminal:
    """A terminal in which `llama2 chat` runs, at its prompt."""

    def __init__(self, home: Path, *words: str) -> None:
        environment = {"LLAMA2_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "llama2", "chat", "--temperature", "0", *words],
            env=os.environ | environment,
            encoding="utf-8",
            dimensions=(60, 200),
            timeout=60,
        )
        self.process.delaybeforesend = None
        self.banner = self.until(READY)

    def until(self, pattern: str) -> str:
        """Wait for `pattern`; what was shown before it, without control sequences."""
        self.process.expect(pattern)
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.process.before).replace("\r", "")

    def type(self, keys: str) -> str:
        """Press keys of which the last ends the line; what is shown until the next prompt."""
        self.process.send(keys)
        self.until(SENT)
        return self.until(READY)

    def ask(self, question: str) -> tuple[str, int]:
        """The answer, and the tokens of context in use after it."""
        shown = self.type(question + "\r")
        status = re.search(r"^\d+ tokens?(?:, [\d.]+ tokens/s)?, (\d+) of \d+ tokens of context$", shown, re.MULTILINE)
        assert status, shown
        return shown[: status.start()].removesuffix("\n"), int(status[1])

    def leave(self, keys: str = CTRL_D) -> None:
        self.process.send(keys)
        self.process.expect(pexpect.EOF)
        self.process.close()
        assert self.process.exitstatus == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def _said(file: Path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in json.loads(file.read_text())["messages"]]


def test_three_turns_are_saved_and_loaded(model_path: Path, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat = Terminal(home, "-m", str(model_path), "--max-tokens", "24")
    assert chat.banner.startswith(f"{model_path.name}, context of 8192 tokens; /help")
    questions = ["Name the capital of Japan.", "And of Italy?", "Grüße! 🙂"]
    answers, used = zip(*map(chat.ask, questions), strict=True)
    assert answers[0] == "The capital of Japan is Tokyo."
    assert 36 < used[0] < used[1] < used[2]  # each turn is asked with all that was said before
    assert chat.type(f"/save {file}\r") == f"Saved 6 messages to {file}.\n"
    said = _said(file)
    assert [text for role, text in said if role == "user"] == questions
    assert [role for role, _ in said] == ["user", "assistant"] * 3
    assert said[1] == ("assistant", answers[0])

    assert chat.type("/clear\r") == "Forgotten.\n"
    assert chat.ask(questions[0]) == (answers[0], used[0])
    assert chat.type(f"/load {file}\r") == f"Loaded 6 messages from {file}.\n"
    answer, used_after = chat.ask("Thank you.")
    assert used_after > used[2]
    chat.leave()

    again = Terminal(home, "--max-tokens", "24", "--resume", str(file))  # the model is in the file
    assert again.ask("Thank you.") == (answer, used_after)
    (tmp_path / "broken.json").write_bytes(file.read_bytes()[:-20])
    assert re.fullmatch(r"error: .*broken.json: not a saved .*\n", again.type(f"/load {tmp_path / 'broken.json'}\r"))
    assert again.ask("Bye.")[1] > used_after  # the conversation is still there
    again.leave("/exit\r")


def test_ctrl_c_stops_the_answer_and_not_the_program(model_path: Path, home: Path, tmp_path: Path) -> None:
    chat = Terminal(home, "-m", str(model_path), *ENDLESS)
    used = 0
    for question in ("Count from one to a thousand.", "Go on."):
        chat.process.send(question + "\r")
        chat.until(SENT)
        chat.process.expect(r"\w+ \w+ \w+")  # the answer is under way
        chat.process.send(CTRL_C)
        status = re.search(r"(\d+) of 8192 tokens of context\n$", chat.until(READY))
        assert status
        assert used < int(status[1]) < 8000
        used = int(status[1])
    chat.type("never sent" + CTRL_C)  # at the prompt it drops the line
    chat.type(f"/save {tmp_path / 'talk.json'}\r")
    said = _said(tmp_path / "talk.json")
    assert [role for role, _ in said] == ["user", "assistant"] * 2
    assert len(said[1][1].split()) >= 3  # what was there of the answer is kept
    chat.leave()


def test_keys_and_commands(model_path: Path, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat = Terminal(home, "-m", str(model_path), "--max-tokens", "2")
    assert chat.type("/save x\r") == "error: nothing has been said yet\n"
    assert chat.type("/sytem Be brief.\r") == "error: there is no command /sytem; did you mean /system?\n"
    assert chat.type("/save\r") == "error: /save needs the name of a file\n"
    assert chat.type(f"/load {tmp_path}\r") == f"error: {tmp_path}: Is a directory\n"
    shown = chat.type("/help\r")
    assert all(f"  {name} " in shown for name in ("/system", "/clear", "/save", "/load", "/help", "/exit"))
    assert chat.type("/system Be brief.\r") == "The system prompt is set.\n"

    chat.ask(f"one{ALT_ENTER}two")
    chat.ask("\x1b[200~three\r\nfour\n\x1b[201~five")  # pasted
    chat.ask(" /help")
    chat.ask("/etc/hosts is a file")
    chat.ask(UP + UP)  # the line before the last one
    chat.process.send(f"/sa{TAB}")
    chat.until("ve")
    assert chat.type(f"{file}\r") == f"Saved 10 messages to {file}.\n"
    assert [text for role, text in _said(file) if role != "assistant"] == [
        "Be brief.",
        "one\ntwo",
        "three\nfour\nfive",
        " /help",
        "/etc/hosts is a file",
        " /help",
    ]
    assert chat.type("/clear\r") == "Forgotten. The system prompt stays.\n"
    assert chat.type("/system\r") == "There is no system prompt now.\n"
    chat.leave()
    again = Terminal(home, "-m", str(model_path), "--max-tokens", "2")
    assert again.type(UP + "\r") == "There is no system prompt now.\n"  # history outlives the program
    again.leave()


def test_a_full_context_is_said(model_path: Path, home: Path) -> None:
    chat = Terminal(home, "-m", str(model_path), "--context", "64", *ENDLESS)
    chat.process.send("hi\r")
    chat.until(SENT)
    chat.process.expect(r"\w+ \w+")  # the answer is under way
    chat.process.send(f"typed{ALT_ENTER}ahead\r")
    shown = chat.until(READY)
    assert shown.endswith("The answer ends here: the context is full, 64 of 64 tokens; /clear begins anew.\n")
    assert "typed" not in shown
    assert re.search(r"typed *\n *ahead", chat.until(SENT))  # it waited for the prompt
    error = r"error: prompt of \d+ tokens .* context of 64; .*; /clear begins anew\n"
    assert re.fullmatch(error, chat.until(READY))
    chat.type("/clear\r")
    assert "64 of 64" in chat.type("hi\r")
    chat.leave()


def test_one_answer_streams_and_tells_its_speed(model_path: Path, home: Path) -> None:
    output, status = pexpect.run(
        f"{sys.executable} -m llama2 chat -m {model_path} 'Name the capital of Japan.' --temperature 0",
        env=os.environ | {"LLAMA2_HOME": str(home), "TERM": "xterm"},
        withexitstatus=True,
        timeout=60,
    )
    assert status == 0
    assert re.fullmatch(rb"The capital of Japan is Tokyo\.\r\n\x1b\[2m8 tokens, [\d.]+ tokens/s\x1b\[0m\r\n", output)
