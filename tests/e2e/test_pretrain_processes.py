"""A run that one process began goes on in two, and the other way round."""

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


def pretrain(folder: Path, name: str, *settings: str, processes: int) -> dict[int, tuple[float, float]]:
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launch, "llama2", "pretrain", "recipe.toml", "--name", name, *settings]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return losses(folder / "runs" / name)


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


def test_from_one_to_two_and_back(tmp_path: Path) -> None:
    build(tmp_path)
    alone = pretrain(tmp_path, "alone", processes=1)
    shared = pretrain(tmp_path, "shared", processes=2)
    assert list(alone) == list(shared) == [1, 2, 3, 4, 5, 6]
    for name, processes in (("alone", 2), ("shared", 1)):
        went_on = tmp_path / "runs" / f"{name}-goes-on"
        shutil.copytree(tmp_path / "runs" / name, went_on)
        shutil.rmtree(went_on / "states" / "step-00000006")
        resumed = pretrain(tmp_path, went_on.name, "--resume", processes=processes)
        for step, figures in alone.items():
            assert resumed[step] == pytest.approx(figures, rel=1e-4), (name, step)
            assert shared[step] == pytest.approx(figures, rel=1e-4), step
    more = [pretrain(tmp_path, f"more-{n}", "start=runs/alone", "steps=3", processes=n) for n in (1, 2)]
    assert more[0][1][0] < alone[1][0]  # which began from random weights
    for step, figures in more[0].items():
        assert more[1][step] == pytest.approx(figures, rel=1e-4), step
    weights = []
    for name in ("alone", "shared"):
        with llama2.load(tmp_path / "runs" / name) as model:
            weights.append({name: tensor.dequantize() for name, tensor in model.checkpoint.tensors.items()})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weights[1][name], weight, rtol=0, atol=1e-4, err_msg=name)


def test_goes_on_from_a_model_by_its_name(
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
