"""bench/own_data.py: its perplexity beside transformers', and what it says of a tiny model's runs."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llama2 import checkpoint
from models import tiny_config, write_tiny_gguf
from oracle_transformers import transformers_model

BENCH = Path(__file__).parents[2] / "bench"
TEXT = "it is the coin of a bat, or so it is told in the city. " * 8


def test_tuning_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.chdir(tmp_path)
    own_data = importlib.import_module("own_data")
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config())
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "completion": "bat"}\n' * 20)
    words = ["own_data.py", "-m", "tiny.gguf", "a.jsonl", "--text", "text.txt", "--window", "64", "--positions", "126"]
    monkeypatch.setattr("sys.argv", [*words, "--rate", "1e-2", "--ask", "one", "--set", "steps=2"])
    own_data.main()
    said = json.loads(capsys.readouterr().out)
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        theirs, ids = transformers_model(model), model.tokenizer.encode(TEXT)
        losses = []
        for start in (0, 63):  # two windows of 64 that begin with BOS
            window = torch.tensor([[model.tokenizer.bos_id, *ids[start : start + 63]]])
            with torch.no_grad():
                losses.append(F.cross_entropy(theirs(window).logits[0, :-1], window[0, 1:], reduction="none"))
    assert said["untuned"]["perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=2e-3)
    assert [run["optimizer"]["lr"] for run in said["runs"]] == [1.28e-3, 1e-2]
    for run in said["runs"]:
        assert run["steps"] == 2
        assert run["after"]["validation"] < run["before"]["validation"]
        assert run["perplexity"] != said["untuned"]["perplexity"]
        assert set(run["answers"]) == {"one"}
