"""The program opens folders of Hugging Face's format as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from folders import Folder
from llama2 import checkpoint

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    model = Folder(files={"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}).encode()})
    model.shards()
    return model.write(tmp_path / "tiny")


def said(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "llama2", *words, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, timeout=60)
    value: dict[str, Any] = json.loads(run.stdout)
    return value


def test_commands(folder: Path) -> None:
    facts = said("show", str(folder))
    assert facts["size"] == sum(file.stat().st_size for file in folder.iterdir())
    described = {"name": "tiny", "format": "huggingface", "formats": {"F32": 12}, "template": TEMPLATE}
    assert facts.items() >= described.items()
    assert facts["parameters"] == checkpoint.open(folder).config.parameters()
    answers = []
    for command in ("generate", "chat"):
        answers.append(said(command, "-m", str(folder), "a a", "--max-tokens", "4", "--temperature", "0"))
    assert answers[0]["text"] == answers[1]["text"]  # the template adds nothing
    assert said("bench", "-m", str(folder), "--prompt", "8", "--generate", "2", "--repeat", "1")["formats"] == {
        "F32": 12
    }
