"""The pieces of the command line that need no model."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from numpy.typing import NDArray

from llama2.checkpoint import Tensor
from llama2.cli import bench, options
from llama2.cli.answer import Reply
from llama2.cli.conversation import Conversation
from llama2.cli.options import AnswerOptions
from llama2.cli.output import one_line, write
from llama2.config import ModelConfig
from llama2.errors import Llama2Error


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
    with pytest.raises(FileNotFoundError):
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
    assert {"format", "version", "model", "sampling", "messages"} == set(json.loads(path.read_text()))
    _conversation().save(path)  # replaces its own kind
    assert os.listdir(tmp_path) == ["talk.json"]

    other = tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(Llama2Error, match="not a saved conversation"):
        _conversation().save(other)
    assert other.read_text() == "precious"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    _conversation().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
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
        (_record(messages={}), "no messages"),
        (_record(messages=[{"role": "user", "content": "a"}]), "last message"),
        (_record(messages=[{"role": "assistant", "content": "a"}]), "message 0"),
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


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(Llama2Error, match="larger than 64 MB"):
        Conversation.load(Path("/dev/zero"))


def test_errors_are_one_harmless_line() -> None:
    assert one_line(Llama2Error("a\n\x1b[31mred\x07")) == "a ␛[31mred␇"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.txt")) == "x.txt: No such file or directory"
    assert one_line(typer.BadParameter("no good")) == "Invalid value: no good (see `llama2 --help`)"
    assert "--context" in one_line(MemoryError())


@pytest.mark.parametrize(("terminal", "shown"), [(True, "␛]0;x␇ \t\né\ufffd"), (False, "\x1b]0;x\x07 \t\né\x9b")])
def test_an_answer_cannot_steer_the_terminal(terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", stream)
    write("\x1b]0;x\x07 \t\né\x9b")
    assert stream.getvalue() == shown


def untouched() -> NDArray[np.uint8]:
    raise AssertionError("a tensor was read")


@pytest.mark.parametrize(("tied", "head"), [(True, 0), (False, 50 * 8 * 2)])
def test_what_a_token_costs(tied: bool, head: int) -> None:
    config = ModelConfig(8, 1, 2, 1, 16, 50, 4, 64, tied_embeddings=tied)
    shapes = config.tensor_shapes().items()
    tensors = {name: Tensor(name, "F16" if len(shape) == 2 else "F32", shape, untouched) for name, shape in shapes}
    checkpoint = SimpleNamespace(config=config, tensors=tensors)
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 16 * 8  # wq wk wv wo, w1 w2 w3
    assert bench.operations(checkpoint, 10) == 2 * (10 * layer + 50 * 8)  # type: ignore[arg-type]
    norms = 3 * 8 * 4
    embeddings = 50 * 8 * 2 if tied else 0
    assert bench.bytes_read(checkpoint) == layer * 2 + norms + embeddings + head  # type: ignore[arg-type]
