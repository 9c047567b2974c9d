"""`llama2 export`: what is refused, and the whole way for tiny models where onnxruntime-genai is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2 import checkpoint
from llama2.checkpoint import Tensor, hf_folder
from llama2.config import BIASED, RopeScaling
from llama2.convert import onnx
from llama2.errors import CheckpointError, ParityError
from llama2.hub.progress import Progress
from models import tiny_config, write_tiny_gguf


def tiny(folder: Path, name: str = "tiny.gguf", **changes: Any) -> Path:
    write_tiny_gguf(folder / name, config=tiny_config(**({"head_dim": 16} | changes)), format="F32")
    return folder / name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": RopeScaling("yarn", factor=4.0, original_context=32)}, "rotary scaling of the kind yarn"),
        ({"biases": BIASED}, "biases"),
    ],
)
def test_what_the_builder_would_leave_out_is_refused(
    changes: dict[str, Any], why: str, tmp_path: Path, out: Path
) -> None:
    model = checkpoint.open(tiny(tmp_path))
    model.config = replace(model.config, **changes)
    hf_folder_of = tmp_path / "hf"
    with pytest.raises(CheckpointError, match=f"has {why}, which the ONNX builder does not know; serve it as it is"):
        onnx._refuse(model)
    assert not hf_folder_of.exists()


def test_a_value_head_is_refused(tmp_path: Path, out: Path) -> None:
    head = np.zeros((1, 64), "<f4")
    with checkpoint.open(tiny(tmp_path)) as model:
        extras = {"score.weight": Tensor("score.weight", "F32", head.shape, head.view(np.uint8).reshape(-1))}
        hf_folder.write(replace(model, extras=extras), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"'score\.weight'"):
        onnx.export(tmp_path / "hf", out / "model")
    assert not list(out.iterdir())


def test_a_missing_package_has_a_remedy(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_MODULES", ("onnxruntime_nowhere",))
    with pytest.raises(CheckpointError, match=r"_nowhere: is not installed; `pip install 'whole-llama\[onnx"):
        onnx.export(tiny(tmp_path), out / "model")
    assert not list(out.iterdir())


def test_the_limits_are_kept() -> None:
    same = onnx.Comparison([1], 1, None, 0.02, 0.02, 0.0, 1, [], None)
    onnx._judge(same, "int4", Path("model"))
    with pytest.raises(ParityError, match=r"diverge by 0.02 nats on average; the limit of fp16 is 0.01"):
        onnx._judge(same, "fp16", Path("model"))
    with pytest.raises(ParityError):
        onnx._judge(replace(same, kl_mean=float("nan")), "int4", Path("model"))


def genai() -> None:
    for name in onnx._MODULES:
        pytest.importorskip(name, reason=f"{name} is not installed; pip install 'whole-llama[onnx]'")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_an_export_answers_as_we_do(precision: onnx.Precision, tmp_path: Path, out: Path) -> None:
    genai()
    facts = onnx.export(tiny(tmp_path), out / "model", precision)
    found = facts["comparison"]
    if precision == "fp32":
        assert found["same_tokens"] == len(found["tokens"])
        assert found["largest_logprob_difference"] < 0.01
    assert json.loads((out / "model/receipt.json").read_text(encoding="utf-8")) == facts
    assert {"genai_config.json", "model.onnx", "inference_model.json"} <= {
        path.name for path in (out / "model").iterdir()
    }


def test_a_wrong_model_is_noticed(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of another model of the same shape: nothing is left of it."""
    genai()
    build = onnx._build

    def other(folder: Path, *arguments: Any) -> None:
        write_tiny_gguf(tmp_path / "other.gguf", config=tiny_config(head_dim=16), format="F32", seed=9)
        with checkpoint.open(tmp_path / "other.gguf") as model:
            hf_folder.write(model, tmp_path / "other")
        build(tmp_path / "other", *arguments)

    monkeypatch.setattr(onnx, "_build", other)
    with pytest.raises(ParityError, match="diverge"):
        onnx.export(tiny(tmp_path), out / "model", progress=_silent)
    assert not list(out.iterdir())


_silent: Progress = lambda *_: None  # noqa: E731
