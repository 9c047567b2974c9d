"""`llama2 reward` as a person uses it: a tiny model learns which answers are better, and scores dialogs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import typed
from llama2 import checkpoint
from llama2.records import Run
from models import tiny_config, write_tiny_gguf

WORDS = ("bat", "coin", "water", "boat", "rice", "tea", "sand", "oar")

RECIPE = """
start = "tiny.gguf"
precision = "fp32"
[data]
files = ["pairs.jsonl"]
held_out = 8
[batch]
size = 8
[optimizer]
lr = 3e-3
[save]
every = 5
"""


def pairs(count: int) -> list[dict[str, Any]]:
    """The better answer ends with another word, and is now the longer one and now the shorter."""
    found = []
    for i in range(count):
        more = "".join(f" {WORDS[(i + n) % 8]}" for n in range(i % 5))
        less = "".join(f" {WORDS[(i * 3 + n) % 8]}" for n in range((i + 2) % 5))
        found.append({"prompt": f"{WORDS[i % 8]} {i}", "chosen": f"a{more} yes", "rejected": f"a{less} no"})
        found[-1] |= {"grade": i % 4, "safety": ("chosen safe", "both safe")[i % 2]}
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A working folder with a model, pairs and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(48)))
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path


def test_learns_what_is_better_and_scores_dialogs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = typed(capsys, "reward", "mine.toml", "epochs=4", "--json", "safety_weight=0.1")
    assert code == 0, error
    report = json.loads(out)["pairs"]
    assert report["accuracy"]["mean"] == 1
    assert report["pairs"] == 8
    assert {*report["by_safety"]} == {"chosen safe", "both safe"}
    assert json.loads((place / "runs/mine/reward.json").read_text()) == {"pairs": report}
    assert "40 pairs to train on, 40 of the model's own kind were there\nheld out by prompt: 8 of pairs\n" in error
    assert "estimate: " in error
    run = Run.open(place / "runs" / "mine")
    assert [line["tokens"] for line in run.metrics()] == [*range(8, 161, 8)]  # pairs
    assert "perplexity" not in (place / "runs/mine/card.md").read_text()
    with checkpoint.open(place / "runs" / "mine") as model:
        assert [*model.extras] == ["score.weight"]
        assert model.extras["score.weight"].format == "F32"
    dialogs = [{"messages": [{"role": "user", "content": "bat 1"}, {"role": "assistant", "content": text}]}
               for text in ("a boat no", "a boat yes")]  # fmt: skip
    (place / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
    code, out, error = typed(capsys, "reward", "score", "runs/mine", "dialogs.jsonl", "--json")
    assert code == 0, error
    worse, better = (json.loads(line) for line in out.splitlines())
    assert better["score"] > worse["score"]
    assert better["where"] == "dialogs.jsonl:2"
    code, out, _ = typed(capsys, "reward", "score", "runs/mine", "dialogs.jsonl", "--sigmoid")
    scores = [float(line.split("\t")[0]) for line in out.splitlines()]
    assert scores == pytest.approx([1 / (1 + np.exp(-each["score"])) for each in (worse, better)], abs=1e-5)


def test_an_adapter_with_its_head_is_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a run that was stopped ends with the same weights."""
    words = ["reward", "mine.toml", "lora.rank=4", "lora.dropout=0.1", "optimizer.warmup=2", "data.fraction=0.5"]
    losses = {}
    for name in ("whole", "again"):
        code, out, error = typed(capsys, *words, "--name", name, "save.every=2")
        assert code == 0, error
        assert "trains the head and an adapter of rank 4" in error
        assert out.splitlines()[0].startswith("pairs: 8 held-out pairs")
        losses[name] = [line["loss"] for line in Run.open(place / "runs" / name).metrics()]
    assert losses["whole"] == losses["again"]
    with checkpoint.open(place / "tiny.gguf") as before, checkpoint.open(place / "runs" / "whole") as after:
        assert "score.weight" in after.extras
        changed = {
            name.split(".", 2)[-1]
            for name, tensor in after.tensors.items()
            if not np.array_equal(tensor.dequantize(), before.tensors[name].dequantize())
        }
    assert changed == {"attention.wq.weight", "attention.wv.weight"}
    last = place / "runs/again/states/step-00000003"
    for file in sorted(last.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    last.rmdir()
    code, _, error = typed(capsys, *words, "--name", "again", "save.every=2", "--resume")
    assert code == 0, error
    assert [line["loss"] for line in Run.open(place / "runs" / "again").metrics()] == losses["whole"]
    model = "states/step-00000003/model/model.safetensors"
    assert (place / "runs/again" / model).read_bytes() == (place / "runs/whole" / model).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward", "score", "tiny.gguf", "pairs.jsonl"], "tiny.gguf: is not a reward model"),
        (["reward", "score", "missing", "pairs.jsonl"], "missing"),
        (["reward", "mine.toml", "data.files=[\"none.jsonl\"]"], "none.jsonl: no such file or folder"),
        (["reward", "mine.toml", "margin=wide"], "margin: Input should be 'none', 'small' or 'large'"),
        (["reward", "mine.toml", "data.length=4"], "pairs.jsonl: no pairs are there to train on"),
        (["reward", "missing.toml"], "missing.toml: cannot be read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(8)))
    if words[1] == "score":
        line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        (place / "pairs.jsonl").write_text(json.dumps(line))
    code, out, error = typed(capsys, *words)
    assert (code, out) == (1, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1
