"""`llama2 quantize` as a person uses it, on tiny random models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from models import tiny_config, write_tiny_gguf

TEXT = "to be or not to be that is the question " * 40


def run(*words: object, status: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "llama2", "quantize", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    write_tiny_gguf(tmp_path / "m.gguf", config=tiny_config("Q4_K"), format="F32", template="{{ messages }}")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "m.gguf"


def test_writes_and_reports(source: Path, tmp_path: Path) -> None:
    target, text, saved = tmp_path / "q.gguf", tmp_path / "text.txt", tmp_path / "i.gguf"
    (tmp_path / "m.gguf.LICENSE.txt").write_text("terms")
    out, _ = run(
        source, target, "--calibrate", text, "--save-imatrix", saved, "--text", text, "--positions", 100, "--json"
    )
    facts = json.loads(out)
    assert facts["bytes"] == target.stat().st_size
    assert facts["bits_per_weight"] == pytest.approx(8 * facts["bytes"] / facts["parameters"])
    assert facts["without_importance"] == ["tok_embeddings.weight"]
    assert facts["agreement"]["positions"] == 100
    assert 0 < facts["agreement"]["kl_mean"] < 0.5  # random weights leave wide logits
    assert facts["agreement"]["top1_agreement"] > 0.2
    assert facts["speed"].keys() == {"source", "output"}

    assert (tmp_path / "q.gguf.LICENSE.txt").read_text() == "terms"
    before, after = (gguf.GGUFReader(path) for path in (source, target))
    assert after.fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert after.fields["general.file_type"].contents() == 15
    assert after.fields["tokenizer.ggml.tokens"].contents() == before.fields["tokenizer.ggml.tokens"].contents()
    names = {"token_embd.weight": "tok_embeddings.weight", "blk.0.ffn_down.weight": "layers.0.feed_forward.w2.weight"}
    theirs = {tensor.name: tensor for tensor in after.tensors}
    originals = {tensor.name: tensor for tensor in before.tensors}
    assert theirs["blk.0.attn_q.weight"].tensor_type == GGMLType.Q4_K
    for name, metas in names.items():
        x = originals[name].data.astype(np.float64)
        y = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        error = np.sqrt(((x - y) ** 2).sum() / (x**2).sum())
        assert facts["errors"][metas] == pytest.approx(error, rel=1e-5)

    # The saved matrix gives the same file, and what is there is replaced only when asked.
    first = target.read_bytes()
    _, words = run(source, target, "--imatrix", saved, status=1)
    assert "is there already; choose another name, or replace it with --force" in words
    out, words = run(source, target, "--imatrix", saved, "--report", "none", "--force")
    assert target.read_bytes() == first
    assert "bits a weight" in out
    assert "perplexity" not in out
    assert not words


def test_a_quantised_source_is_warned_of(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "q8.gguf", "--format", "q8_0", "--report", "none")
    out, words = run(tmp_path / "q8.gguf", tmp_path / "q2.gguf", "--format", "Q2_K")
    assert "was quantized already" in words
    assert "KL divergence" in out


def test_refusals(source: Path, tmp_path: Path) -> None:
    _, words = run(source, tmp_path / "q.gguf", "--format", "Q9", status=2)
    assert "--format Q9 is not one of Q8_0" in words
    _, words = run(source, source, "--force", status=1)
    assert "is the source, in it or around it" in words
    _, words = run(source, tmp_path / "q.gguf", "--imatrix", source, status=1)
    assert "no importance of any matrix" in words
    _, words = run(source, tmp_path / "no" / "q.gguf", status=1)
    assert "is not a folder; make it first" in words
    damaged = bytearray(source.read_bytes())
    damaged[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(damaged)
    _, words = run(tmp_path / "nan.gguf", tmp_path / "q.gguf", status=1)
    assert "not finite numbers" in words
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("q.gguf")]
