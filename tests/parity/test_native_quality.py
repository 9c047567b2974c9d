"""What int8 activations cost on the default model: `bench/quality.py` on a short text, against the NumPy oracle."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("quality")


def test_measures_by_hand(quality: ModuleType) -> None:
    """Two rows over two tokens: probabilities (1/4, 3/4) against (1/2, 1/2), then twice the same logits."""
    candidate = np.log(np.array([[1, 3], [8, 2]], np.float32))
    reference = np.array([[1, 1], [math.log(8), math.log(2)]], np.float32)
    figures = quality.compare(candidate, reference, np.array([1, 0], np.int32)).summary()
    assert figures["positions"] == 2
    assert figures["top1_agreement"] == 0.5  # in the first row, token 1 against token 0, the lower of two equals
    # cos((ln 1, ln 3), (1, 1)) = ln 3 / (ln 3 * sqrt 2)
    assert figures["cosine_min"] == pytest.approx(math.sqrt(1 / 2))
    assert figures["cosine_mean"] == pytest.approx((math.sqrt(1 / 2) + 1) / 2)
    # 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = 1/2 ln(4/3)
    assert figures["kl_max"] == pytest.approx(math.log(4 / 3) / 2)
    assert figures["kl_mean"] == pytest.approx(math.log(4 / 3) / 4)
    assert figures["perplexity"] == pytest.approx((3 / 4 * 4 / 5) ** (-1 / 2))
    assert figures["reference_perplexity"] == pytest.approx((1 / 2 * 4 / 5) ** (-1 / 2))
    assert figures["perplexity_change"] == pytest.approx(math.sqrt(2 / 3) - 1)


def test_native_runner_against_numpy(quality: ModuleType, model_path: Path) -> None:
    text = (ROOT / "LICENSE").read_text()
    figures = quality.measure(model_path, text, window=256, positions=600, threads=2)
    assert figures["positions"] == 600
    assert figures["cosine_mean"] >= 0.999
    assert figures["top1_agreement"] >= 0.97
    assert abs(figures["perplexity_change"]) <= 0.003
