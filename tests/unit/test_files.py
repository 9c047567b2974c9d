"""What stands under a file's name, and JSON of strangers: opened, or refused in one line."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from llama2 import files
from llama2.errors import CheckpointError, TokenizerError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476838400\n"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (_fifo, "is not a regular file"),
        (_socket, "is not a regular file"),
        (_folder, "is a folder"),
        (_loop, "is a link to a file that is not there"),
        (lambda path: path.symlink_to("absent"), "is a link to a file that is not there"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(bytes(101)), "has 101 bytes, and the limit is 100"),
        (lambda path: path.write_bytes(POINTER), "is a pointer of Git LFS, not the file itself; run `git lfs pull` in"),
    ],
)
def test_anything_but_a_short_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], refusal: str
) -> None:
    make(path := tmp_path / "f")

    with pytest.raises(TokenizerError) as caught:
        files.read(path, limit=100, error=TokenizerError)

    assert str(caught.value).startswith(f"{path}: {refusal}")
    assert "\n" not in str(caught.value)


def test_a_path_with_nul_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is not a path"):
        files.read(Path("a\0b"))
    assert not files.exists(Path("a\0b"))


def _json(text: str) -> dict[str, object]:
    return files.parse_json(Path("config.json"), text.encode())


def test_values_that_nobody_asked_for_are_not_judged() -> None:
    values = _json('\ufeff{"a": 1000000000000000019884624838656, "b": [NaN, -Infinity, 1e999], "c": "\\ud800"}')

    assert values["a"] == 10**30 + 19884624838656
    assert str(values["b"]) == "[nan, -inf, inf]"
    assert values["c"] == "\ud800"
    assert _json(f'{{"n": {"9" * 4000}}}')["n"] == 10**4000 - 1


def test_a_key_that_stands_twice_counts_as_the_last_and_is_known() -> None:
    assert type(_json('{"a": 1, "a": 1}')) is dict
    values = _json('{"a": 1, "b": 2, "a": 3, "b": 2}')
    assert isinstance(values, files.Repeated)
    assert values == {"a": 3, "b": 2}
    assert values.twice == {"a"}


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (b"[]", "not a JSON object"),
        (b'{"a": ', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 4300 digits"),
        (b'{"a": [' + b"[]," * 2_000_000 + b"0]}", "could need 392 MB of memory"),
        (b'{"a": "' + b"a" * 30_000_000 + b'\xf0\x9f\x98\x80"}', "could need 228 MB of memory"),
    ],
)
def test_what_is_no_object_or_too_much_is_refused(text: bytes, refusal: str) -> None:
    with pytest.raises(CheckpointError, match=refusal) as caught:
        files.parse_json(Path("config.json"), text)
    assert str(caught.value).startswith("config.json: it ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["[]", '{"":0}', '"\u1000"', '"\\u1000"', '"\U0001f600"', '{"a":1,"a":2}', '{"k%d":"v%d"}', "[[],[0,1]]"]
)
def test_memory_is_bounded_by_what_was_counted(value: str) -> None:
    many = ",".join(value % (i, i) if "%" in value else value for i in range(20_000))
    text = f'{{"a": [{many}]}}'.encode()
    tracemalloc.start()
    try:
        files.parse_json(Path("f"), text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < files.json_memory(text) * 1.1 + 100_000


def test_links_lead_within_the_folder_to_blobs_to_the_same_name_or_are_weights(tmp_path: Path) -> None:
    """The Hub's cache as huggingface_hub lays it out, and a folder of links to a large disk."""
    repository = tmp_path / "models--a--b"
    folder, blobs, disk = repository / "snapshots" / "main", repository / "blobs", tmp_path / "disk"
    for path in (folder, blobs, disk):
        path.mkdir(parents=True)
    for path in (blobs / "abc", disk / "tokenizer.json", disk / "secret", folder / "real.json"):
        path.write_bytes(b"{}")
    links = {
        "config.json": Path("../../blobs/abc"),
        "tokenizer.json": disk / "tokenizer.json",
        "added_tokens.json": Path("real.json"),
        "model.safetensors": disk / "secret",
        "chat_template.jinja": disk / "secret",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)

    for name in [*links][:-1]:
        assert files.inside(folder, name) == folder / name
    with pytest.raises(CheckpointError, match="is a link to 'secret' outside of its folder"):
        files.inside(folder, "chat_template.jinja")
    for name in ("../secret", "/etc/passwd", ".hidden", "a/b", "", "a" * 300):
        with pytest.raises(CheckpointError, match="is not the name of a file in it"):
            files.inside(folder, name)


def test_what_json_wrote_is_read(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, True, "é😀"], "b": {"c": {}}}
    (tmp_path / "f.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert files.load_json(tmp_path / "f.json") == values


def test_what_is_written_follows_no_link(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("mine")
    for name in ("a.part", "a", "b"):
        (tmp_path / name).symlink_to(private)
    with files.create(tmp_path / "a") as file:
        file.write(b"new")
    with pytest.raises(TokenizerError, match="b: cannot be written"):
        files.append(tmp_path / "b", "more", error=TokenizerError)
    os.mkfifo(tmp_path / "c")
    with pytest.raises(TokenizerError, match="c: cannot be written"):
        files.append(tmp_path / "c", "more", error=TokenizerError)
    files.append(tmp_path / "d", "é")
    files.append(tmp_path / "d", "!")
    assert private.read_text() == "mine"
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "d").read_text()) == (b"new", "é!")


def test_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "record"
    with files.replaced(path, shared=True) as first, files.replaced(path, shared=True) as second:
        first.write(b"first")
        second.write(b"second")
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"first", [path])


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_remains_of_a_file_that_was_not_finished(shared: bool, tmp_path: Path) -> None:
    def stop() -> None:
        with files.replaced(tmp_path / "f", shared=shared) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not list(tmp_path.iterdir())
