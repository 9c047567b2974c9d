"""What goes wrong around a conversion: refused in one line that helps, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conversions import Sources, plain_vocabulary
from llama2 import checkpoint
from llama2.cli.main import run
from llama2.config import ModelConfig
from llama2.convert import conversion, convert
from llama2.errors import CheckpointError, Llama2Error
from llama2c_bytes import llama_tokens, sizes, tokenizer_bin
from meta_bytes import CONFIG
from models import tiny_config, write_tiny_gguf

REFUSALS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "another format": ("gguf", "gptq", {}, r"'gptq' is not a format of files; choose one of gguf, hf, meta, llama2c"),
    "numbers that files have not": (
        "gguf",
        "hf",
        {"format": "Q8_0"},
        "hf cannot have Q8_0; choose one of F32, F16, BF16",
    ),
    "numbers that cannot be written": ("gguf", "gguf", {"format": "Q4_K"}, "gguf cannot have Q4_K; choose one of"),
    "shards of a file": ("gguf", "hf", {"shards": 2}, "shards=2 is for Meta's files, not for hf"),
    "shards that divide nothing": ("gguf", "meta", {"shards": 3}, "3 files must divide n_kv_heads=16"),
    "byte-level to Meta's": ("bpe", "meta", {}, r"bpe\.gguf: has a byte-level vocabulary, .*; choose gguf or hf"),
    "byte-level to llama2.c": ("bpe", "llama2c", {}, r"needs a SentencePiece vocabulary .*; choose gguf or hf"),
    "rows that are no whole blocks": (
        "odd",
        "gguf",
        {"format": "Q8_0"},
        r"odd\.gguf: Q8_0 needs rows of a multiple of 32 weights, and layers",
    ),
    "a tokenizer that is none": ("gguf", "hf", {"tokenizer": Path(__file__)}, "not a whole SentencePiece model"),
}


@pytest.mark.parametrize("name", [*REFUSALS])
def test_requests_that_are_refused(name: str, sources: Sources, out: Path) -> None:
    source, to, options, message = REFUSALS[name]
    with pytest.raises(Llama2Error, match=message) as caught:
        convert(sources[source], out / "model", to, **options)  # type: ignore[arg-type]
    assert str(caught.value).isprintable()
    assert not list(out.iterdir())


def test_places_that_are_refused(sources: Sources, out: Path) -> None:
    copy = shutil.copytree(sources["hf"], out / "hf")
    before = sorted(copy.iterdir())
    for source, target, message in (
        (out / "nothing", out / "x", "nothing: no such file"),
        (Path(__file__), out / "x", "is not a GGUF file"),
        (copy, copy / "x.gguf", "is the source, in it or around it; choose another place"),
        (copy, copy, "is the source"),
        (copy, out, "is the source, in it or around it"),
        (copy, out / "no" / "x.gguf", "no: is not a folder; make it first"),
    ):
        for force in (False, True):
            with pytest.raises(CheckpointError, match=message):
                convert(source, target, "gguf", run=False, force=force)
    assert [path.name for path in out.iterdir()] == ["hf"]
    assert sorted(copy.iterdir()) == before


def test_what_is_there_is_not_replaced_unless_asked(sources: Sources, out: Path) -> None:
    """And only by a model that was verified."""
    target = out / "model.gguf"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.gguf: is there already; .* --force"):
        convert(sources["hf"], target, "gguf", run=False)
    with pytest.raises(Llama2Error):
        convert(sources["bpe"], target, "llama2c", run=False, force=True)
    assert target.read_text() == "mine"
    convert(sources["hf"], target, "gguf", run=False, force=True)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    convert(sources["hf"], target, "gguf", run=False, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first  # the same bytes each time
    assert sorted(first) == ["model.gguf", "model.gguf.receipt.json"]

    folder = out / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="folder: is a folder that no conversion wrote"):
        convert(sources["gguf"], folder, "hf", run=False, force=True)
    shutil.rmtree(folder)
    convert(sources["gguf"], folder, "hf", run=False)
    with pytest.raises(CheckpointError, match="folder: is there already"):
        convert(sources["gguf"], folder, "meta", run=False)
    convert(sources["gguf"], folder, "meta", run=False, force=True)
    assert checkpoint.open(folder).format == "meta"
    assert not (folder / "config.json").exists()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt: would be lost with the folder"):
        convert(sources["gguf"], folder, "hf", run=False, force=True)
    (folder / "thesis.txt").unlink()
    convert(sources["hf"], folder, "gguf", run=False, force=True)  # a file takes a folder's place, and back
    convert(sources["gguf"], folder, "hf", run=False, force=True)
    assert checkpoint.open(folder).format == "huggingface"


def test_the_folder_in_which_one_stands(sources: Sources, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the source, and as the place, where it must be one that may be replaced."""
    folder = Path(shutil.copytree(sources["hf"], out / "hf"))
    monkeypatch.chdir(folder)
    facts = convert(".", out / "model.gguf", "gguf", run=False)
    assert "model.safetensors" in json.dumps(facts["source"]["files"])
    with pytest.raises(CheckpointError, match="hf: is there already"):
        convert(out / "model.gguf", ".", "hf", run=False)
    convert(out / "model.gguf", ".", "meta", run=False, force=True)
    assert checkpoint.open(folder).format == "meta"


def test_files_beside_a_model_stay(sources: Sources, out: Path) -> None:
    (out / "tokenizer.bin").write_bytes(b"another model's")
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin: is another model's tokenizer; choose another folder"):
        convert(sources["gguf"], out / "model.bin", "llama2c", run=False, force=True)
    (out / "model.gguf.receipt.json").write_text("another")
    with pytest.raises(CheckpointError, match=r"model\.gguf\.receipt\.json: is there already"):
        convert(sources["hf"], out / "model.gguf", "gguf", run=False)
    assert sorted(path.name for path in out.iterdir()) == ["model.gguf.receipt.json", "tokenizer.bin"]
    assert (out / "tokenizer.bin").read_bytes() == b"another model's"


def test_a_conversion_that_was_killed_is_told_of(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.gguf\.part: is there from a conversion that runs or was killed"):
        convert(sources["hf"], tmp_path / "model.gguf", "gguf", run=False)
    assert (tmp_path / "model.gguf.part").exists()


def test_licences_travel(sources: Sources, tmp_path: Path, out: Path) -> None:
    """From Meta's folder or the one above, beside files and back into folders; never through a link that leads out."""
    above = tmp_path / "download"
    shutil.copytree(sources["meta"], above / "7B")
    (above / "7B" / "tokenizer.model").rename(above / "tokenizer.model")
    for name in ("LICENSE", "USE_POLICY.md"):
        (above / name).write_text(name)
    convert(above / "7B", out / "a.gguf", "gguf", run=False)
    (out / "LICENSE").write_text("the folder's own")
    convert(out / "a.gguf", out / "hf", "hf", run=False)
    assert [(out / "hf" / name).read_text() for name in ("LICENSE", "USE_POLICY.md")] == ["LICENSE", "USE_POLICY.md"]
    assert (out / "LICENSE").read_text() == "the folder's own"
    (tmp_path / "secret").write_text("not to be published")
    (out / "hf" / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"NOTICE: is a link to .secret. outside of its folder"):
        convert(out / "hf", out / "b.gguf", "gguf", run=False)


def test_what_a_format_cannot_hold_is_told(sources: Sources, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        run(["convert", str(sources["tied"]), str(out / "meta"), "--to", "meta"])
    printed = capsys.readouterr()
    assert not status.value.code
    assert "the same logits, bit by bit, for 200 tokens" in printed.out
    context, template = printed.err.splitlines()
    assert context.endswith("meta has no place for the context of 256 tokens, which will be taken to be 4,096")
    assert template.endswith("no place for the chat template, so that chats will be rendered in Llama 2's own format")
    receipt = json.loads((out / "meta" / "receipt.json").read_text())
    assert receipt["configuration"]["differences"] == {
        "context_length": {"source": 256, "output": 4096},
        "tied_embeddings": {"source": True, "output": False},
    }
    assert receipt["chat_template"] == {"kept": False}


def test_the_command(sources: Sources, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(sources["gguf"]), str(out / "model"), "--to", "hf"]
    with pytest.raises(SystemExit) as status:
        run([*words, "--json", "--receipt", "tensors"])
    assert not status.value.code
    assert "answers" not in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as status:
        run(words)
    error = capsys.readouterr().err
    assert (status.value.code, error.count("\n"), "Traceback" in error) == (1, 1, False)
    with pytest.raises(SystemExit) as status:
        run(["convert", str(sources["gguf"]), str(out / "q.gguf"), "--to", "gguf", "--format", "q4_0"])
    assert "rounded to Q4_0, off by up to" in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        run(["convert", str(sources["gguf"]), str(out / "x"), "--to", "onnx"])
    assert status.value.code == 2


def test_a_model_above_memory(sources: Sources, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before it is told; the comparison without running needs no memory."""
    monkeypatch.setattr(conversion, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: .* GB of memory, and 0\.00 GB are free; --receipt tensors"
    ):
        convert(sources["gguf"], out / "model", "hf")
    assert not list(out.iterdir())
    assert "answers" not in convert(sources["gguf"], out / "model", "hf", run=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"out: 0\.00 GB are needed and 0\.00 GB are free; free some"):
        convert(sources["gguf"], out / "other", "hf", run=False)


SCRIPT = """
import sys, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from llama2.cli.main import run
run()
"""


@pytest.mark.parametrize(("to", "options"), [("gguf", []), ("gguf", ["-O"]), ("hf", []), ("meta", []), ("llama2c", [])])
def test_no_room_left(to: str, options: list[str], sources: Sources, out: Path) -> None:
    source = sources["hf" if to == "gguf" else "gguf"]
    command = [sys.executable, *options, "-c", SCRIPT, "100000", "convert", str(source), str(out / "m"), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written (File too large); free some room, or choose another" in done.stderr
    assert not list(out.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_target_that_may_not_be_written(sources: Sources, out: Path) -> None:
    out.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be made"):
        convert(sources["gguf"], out / "model", "hf", run=False)
    out.chmod(0o700)


def test_a_target_in_a_file_system_without_places(sources: Sources) -> None:
    with pytest.raises(CheckpointError, match=r"model\.part: cannot be made \(.*\); choose a folder of yours"):
        convert(sources["gguf"], Path("/proc/self/model"), "hf", run=False)


def heeding_signals() -> None:
    """What runs in the background of a shell is begun with the first ignored, and under nohup the second."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_in_the_middle(number: signal.Signals, tmp_path: Path, out: Path) -> None:
    """Nothing is left, whichever step it was in."""
    write_tiny_gguf(tmp_path / "large.gguf", config=tiny_config(dim=256, head_dim=64, n_layers=36, hidden_dim=1024))
    command = [
        sys.executable,
        "-m",
        "llama2",
        "convert",
        str(tmp_path / "large.gguf"),
        str(out / "model"),
        "--to",
        "hf",
    ]
    seen = 0
    for files in (1, 4):  # as soon as it writes, and when it compares
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heeding_signals,  # noqa: PLW1509  # this program has one thread
        ) as process:
            while process.poll() is None and len(list((out / "model.part").rglob("*"))) < files:
                time.sleep(0.001)
            process.send_signal(number)
            _, error = process.communicate()
        assert "Traceback" not in error
        if process.returncode:
            assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
            assert not list(out.iterdir())
            seen += 1
        else:
            shutil.rmtree(out / "model")
    assert seen


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory(tmp_path: Path, out: Path) -> None:
    """Anonymous memory stays below twice the largest tensor and 200 MB, for a model of twice that."""
    config = replace(CONFIG, dim=512, hidden_dim=1536, head_dim=32, n_layers=36, norm_eps=1e-5)
    source, largest = tmp_path / "large.bin", 4 * config.dim * config.hidden_dim
    size = write_sparse_llama2c(source, config)
    command = [sys.executable, "-m", "llama2", "convert", str(source), str(out / "model"), "--to", "hf"]
    with subprocess.Popen([*command, "--receipt", "tensors"], stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    assert 20e6 < peak < 2 * largest + 200e6 < 0.5 * size


def write_sparse_llama2c(path: Path, config: ModelConfig) -> int:
    """A model of zeros that takes no room on the disk; its size."""
    size = 28 + 4 * (config.parameters() + config.context_length * config.head_dim)
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *sizes(config, -1)))
        file.truncate(size)
    path.with_name("tokenizer.bin").write_bytes(tokenizer_bin(llama_tokens(plain_vocabulary())))
    return size


def anonymous(process: int) -> int:
    """Bytes of memory of its own, right now."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return 0
