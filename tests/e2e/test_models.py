"""`llama2 pull`, `list`, `show`, `rm` as a person and as a program call them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import pytest

from models import write_tiny_gguf

NAME = "smollm2-135m-instruct"


@pytest.fixture
def home(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home into which the default model was fetched."""
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    model = tmp_path / "home" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.parent.mkdir(parents=True)
    model.symlink_to(model_path)
    return model.parent.parent


def llama2(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama2", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60)


def said(*words: str) -> dict[str, object]:
    run = llama2(*words, "--json")
    assert run.returncode == 0, run.stderr
    value: dict[str, object] = json.loads(run.stdout)
    return value


def test_pull_and_list(home: Path) -> None:
    path = home / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert said("pull", NAME) == {"name": NAME, "path": str(path)}
    first, again = llama2("pull", NAME), llama2("list")
    assert (first.stdout, first.stderr) == (f"{path}\n", "")
    title, row = again.stdout.splitlines()
    assert title.split() == ["NAME", "SIZE", "FORMAT", "MODIFIED"]
    assert row.split()[:4] == [NAME, "98.4", "MB", "gguf"]

    for file, content in {"refs/main": "a" * 40, f"snapshots/{'a' * 40}/llama-2-7b.Q8_0.gguf": "GGUF"}.items():
        there = Path(os.environ["HF_HUB_CACHE"]) / "models--TheBloke--Llama-2-7B-GGUF" / file
        there.parent.mkdir(parents=True)
        there.write_text(content)
    models = said("list")["models"]
    assert isinstance(models, list)
    assert [(m["name"], m["format"], m["size"]) for m in models] == [
        (NAME, "gguf", 98_362_432),
        ("TheBloke/Llama-2-7B-GGUF:Q8_0", "gguf", 4),
    ]
    assert models[1]["path"] == str(there)


def test_list_of_nothing(home: Path) -> None:
    (home / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    assert said("list") == {"models": []}
    assert f"llama2 pull {NAME}" in llama2("list").stdout


def test_show_agrees_with_the_gguf_package(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, format="Q8_0", template="{{ messages }}")
    reader = gguf.GGUFReader(path)
    facts = said("show", str(path))
    assert facts["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    assert facts["formats"] == Counter(t.tensor_type.name for t in reader.tensors)
    expected = {
        "layers": "llama.block_count",
        "dim": "llama.embedding_length",
        "heads": "llama.attention.head_count",
        "kv_heads": "llama.attention.head_count_kv",
        "context": "llama.context_length",
        "template": "tokenizer.chat_template",
        "licence": "general.license",
        "name": "general.name",
        "architecture": "general.architecture",
    }
    fields = {key: reader.get_field(name) for key, name in expected.items()}
    assert {key: facts[key] for key in expected} == {key: f.contents() for key, f in fields.items() if f}
    assert facts["tokenizer"] == {"kind": "sentencepiece", "pre": None, "mode": "file", "vocabulary": 320}
    assert (facts["path"], facts["size"], facts["format"]) == (str(path), path.stat().st_size, "gguf")


def test_show_of_the_default_model(home: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in llama2("show", NAME).stdout.splitlines())
    assert lines == {
        "name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "architecture": "llama, 30 layers of width 576, 9 heads, 3 key/value heads",
        "parameters": "134,515,008",
        "formats": "Q4_1 × 210, F32 × 61, Q8_0 × 1",
        "context": "8,192 tokens",
        "tokenizer": "bpe smollm (49,152 tokens)",
        "template": "its own, SmolLM2",
        "ends": "at <|endoftext|>, <|im_end|>",
        "licence": "apache-2.0",
        "path": str(home / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"),
        "size": "98.4 MB, gguf",
    }


def test_rm_asks(home: Path) -> None:
    pexpect = pytest.importorskip("pexpect", reason="no pseudo-terminals here")
    path = home / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for answer, code, left in (("n", 1, True), ("y", 0, False)):
        child = pexpect.spawn(sys.executable, ["-m", "llama2", "rm", NAME], encoding="utf-8", timeout=30)
        child.expect_exact(f"Delete {NAME}? [y/N]:")
        child.sendline(answer)
        child.expect(pexpect.EOF)
        child.close()
        assert (child.exitstatus, path.is_symlink()) == (code, left)
    assert "98.4 MB freed" in child.before


def test_rm_without_a_question(home: Path) -> None:
    assert said("rm", NAME, "--yes") == {"name": NAME, "freed": 98_362_432}
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("show", "smollm2-135m"), 1, f"did you mean {NAME}?"),
        (("show", "org/name:Q4_0"), 1, "not here; `llama2 pull org/name:Q4_0` fetches it"),
        (("show", "{tmp}/note.gguf"), 1, "note.gguf"),
        (("show", "{tmp}/missing.gguf"), 1, "missing.gguf: no such file"),
        (("pull", "tinylama"), 1, "tinylama: no such model"),
        (("rm", NAME), 2, "--yes deletes without asking"),
        (("rm", "{tmp}/note.gguf", "--yes"), 1, "a file of your own"),
        (("show",), 2, "Missing argument"),
        (("list", "--all"), 2, "No such option"),
    ],
)
def test_mistakes(home: Path, tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "note.gguf").write_text("Dear model, hello.\n")
    run = llama2(*(word.format(tmp=tmp_path) for word in words))
    assert (run.returncode, run.stdout) == (code, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("llama2: error: ")
    assert message in line


@pytest.mark.parametrize("command", ["pull", "list", "show", "rm"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: llama2 {command}" in llama2(command, "--help").stdout
