"""A run that one process began continues in two, and the other way round."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import corpora
import llama2
from commands import typed
from llama2 import hub
from llama2.data.shards import Split
from texts import train_sentencepiece

RECIPE = """
steps = 6
seed = 1
compile = false
precision = "fp32"
model = { dim = 32, n_layers = 2, n_heads = 4, n_kv_heads = 2, hidden_dim = 64, tied_embeddings = true }
data = { corpus = "corpus", length = 32, validation = 2 }
batch = { size = 8, micro_size = 2 }
optimizer = { lr = 1e-2, warmup = 2 }
save = { every = 3, keep_last = 5 }
evaluate = 3
"""


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["norm"]) for line in lines}


def in_two(folder: Path, *words: str) -> None:
    """Run Python with these words: what starts two processes, each on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(folder: Path) -> None:
    """A corpus of random words in `corpus`, beside the recipe."""
    (folder / "corpus").mkdir()
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(400, ()))
    rng = np.random.default_rng(0)

    def documents(count: int) -> list[list[list[int]]]:
        return [[[1, *rng.integers(3, 400, 40).tolist(), 2] for _ in range(count)]]

    files: dict[Split, list[list[list[int]]]] = {"train": documents(60), "validation": documents(4)}
    corpora.write(folder / "corpus", folder / "tokenizer.model", 400, files)
    (folder / "recipe.toml").write_text(RECIPE)


def test_from_one_to_two_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.chdir(tmp_path)

    def command(name: str, *settings: str) -> list[str]:
        return ["pretrain", "recipe.toml", "--name", name, *settings]

    def alone(*words: str) -> None:
        code, _, error = typed(capsys, *words)
        assert code == 0, error

    alone(*command("alone"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    in_two(tmp_path, *torchrun, "-m", "llama2", *command("shared"))
    resumed = {"alone": "alone-in-two", "shared": "shared-in-one"}
    for name, copy in resumed.items():
        shutil.copytree(Path("runs", name), Path("runs", copy))
        shutil.rmtree(Path("runs", copy, "states", "step-00000006"))
    alone(*command("shared-in-one", "--resume"))
    more = ("start=runs/alone", "steps=3")
    alone(*command("more-1", *more))
    commands = [command("alone-in-two", "--resume"), command("more-2", *more)]
    in_two(tmp_path, str(Path(__file__).parents[1] / "forked.py"), "2", json.dumps(commands))

    expected = losses(Path("runs/alone"))
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    for name in ("shared", *resumed.values()):
        found = losses(Path("runs", name))
        assert list(found) == list(expected)
        for step, metrics in expected.items():
            assert found[step] == pytest.approx(metrics, rel=1e-4), (name, step)
    first, second = losses(Path("runs/more-1")), losses(Path("runs/more-2"))
    assert first[1][0] < expected[1][0]  # which began from random weights
    assert list(first) == [1, 2, 3]
    for step, metrics in first.items():
        assert second[step] == pytest.approx(metrics, rel=1e-4), step
    weights = []
    for name in ("alone", "shared"):
        with llama2.load(tmp_path / "runs" / name) as model:
            weights.append({name: tensor.dequantize() for name, tensor in model.checkpoint.tensors.items()})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weights[1][name], weight, rtol=0, atol=1e-4, err_msg=name)


def test_continues_from_a_model_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    first, begun = Path("runs/first"), ["steps=1", "save.every=1", "optimizer.warmup=1"]
    assert typed(capsys, "pretrain", "recipe.toml", "--name", "first", *begun)[0] == 0
    asked = []
    monkeypatch.setattr(hub, "locate", lambda name: (asked.append(name), first)[1])
    code, _, error = typed(capsys, "pretrain", "recipe.toml", "start=smollm2-135m-instruct", *begun)
    assert code == 0, error
    assert asked == ["smollm2-135m-instruct"]
    assert f"continues from {first}" in error
