"""The program opens Meta's folders and llama2.c's files as they are, with their own tokenizer or a given one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llama2
from llama2 import Llama, checkpoint
from llama2.checkpoint import llama2c
from meta_bytes import CONFIG, random_tensors, tokenizer_model, write_folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same float32 weights in a folder of Meta's, in two files, and in a file of llama2.c's."""
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    config = replace(CONFIG, context_length=4096)
    folder = write_folder(tmp_path / "tiny", random_tensors(config, torch.float32), 2)
    (tmp_path / "c").mkdir()
    llama2c.write(checkpoint.open(folder), tmp_path / "c" / "tiny.bin")
    return [folder, tmp_path / "c" / "tiny.bin"]


def run(*words: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "llama2", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def said(*words: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*words, "--json"))
    return value


def test_commands(models: list[Path]) -> None:
    options = ["--max-tokens", "5", "--temperature", "0"]
    answers = []
    for path, format in zip(models, ("meta", "llama2c"), strict=True):
        facts = said("show", str(path))
        assert (facts["format"], facts["parameters"], facts["name"]) == (format, CONFIG.parameters(), "tiny")
        assert facts["tokenizer"] == {
            "kind": "sentencepiece",
            "pre": None,
            "mode": facts["tokenizer"]["mode"],
            "vocabulary": 704,
        }
        asked = [("generate", "one, two"), ("chat", "hi")]
        answers.append([said(command, "-m", str(path), text, *options)["text"] for command, text in asked])
    assert answers[0] == answers[1]
    assert said("bench", "-m", str(models[0]), "--prompt", "8", "--generate", "2", "--repeat", "1")


def test_a_tokenizer_from_elsewhere(models: list[Path], tmp_path: Path) -> None:
    _, model = models
    expected = said("generate", "-m", str(model), "one, two", "--max-tokens", "3", "--seed", "1")["text"]
    (tmp_path / "c" / "tokenizer.bin").rename(tmp_path / "other.bin")
    (tmp_path / "other.model").write_bytes(tokenizer_model())
    error = run("show", str(model), status=1)
    reason = rf"{re.escape(str(model))}: no tokenizer in .*; give its file with --tokenizer"
    assert re.fullmatch(rf"llama2: error: {reason}\n", error)
    for file in ("other.bin", "other.model"):
        given = ["--tokenizer", str(tmp_path / file)]
        assert said("show", str(model), *given)["tokenizer"]["vocabulary"] == 704
        answer = said("generate", "-m", str(model), *given, "one, two", "--max-tokens", "3", "--seed", "1")
        assert answer["text"] == expected


def test_python_and_the_reference(models: list[Path]) -> None:
    folder, file = models
    with llama2.load(folder) as model, llama2.load(file, tokenizer=folder / "tokenizer.model") as other:
        assert model.generate("to be", max_tokens=4, temperature=0).token_ids == (
            other.generate("to be", max_tokens=4, temperature=0).token_ids
        )
    (answer,) = Llama.build(str(folder), str(folder / "tokenizer.model"), max_seq_len=64).text_completion(
        ["to be"], max_gen_len=4, temperature=0, logprobs=True
    )
    assert len(answer["tokens"]) <= 4
