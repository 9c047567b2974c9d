"""deploy/azure/score.py as Azure's server calls it, on a tiny model; what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from models import write_tiny_gguf

SCRIPT = Path(__file__).parents[2] / "deploy/azure/score.py"


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = tmp_path / "model/1"
    folder.mkdir(parents=True)
    write_tiny_gguf(folder / "tiny.gguf")
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path / "model"))
    spec = importlib.util.spec_from_file_location("score", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.init()
    return module


def said(score: ModuleType, request: Any) -> Any:
    answer = score.run(json.dumps(request))
    return answer if isinstance(answer, dict) else json.loads(answer.get_data())


def test_an_answer_has_openais_form(score: ModuleType) -> None:
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0, "model": "mine"}
    first, again = said(score, request), said(score, request)
    assert first["choices"] == again["choices"]
    assert first["choices"][0]["message"]["role"] == "assistant"
    assert (first["object"], first["model"]) == ("chat.completion", "mine")
    used = first["usage"]
    assert used["completion_tokens"] <= 3
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}], "stream": True}, "stream"),
        ({"messages": [{"role": "user", "content": "Hi"}], "tools": []}, "tools"),
        ({"prompt": "Hi"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "nobody"),
        ({"messages": [{"role": "user", "content": "Hi"}], "temperature": -1}, "temperature"),
        ([], "list"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(score: ModuleType, request_: Any, word: str) -> None:
    assert word in said(score, request_)["error"]["message"]


def test_a_folder_without_one_model_is_refused(score: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has 0 models; register one"):
        score.model_file(tmp_path / "model/none")
