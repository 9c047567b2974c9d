"""The report of a reward model by hand, and what is fitted to pairs and model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2 import checkpoint
from llama2.align.reward import sigmoid_of
from llama2.align.reward_recipe import RewardRecipe, fit
from llama2.align.reward_report import Report, WordsBaseline, calibration, measure, unsafe_recall
from llama2.align.reward_training import refuse_tokenizer
from llama2.data.comparisons import PreferencePair
from llama2.errors import RecipeError
from llama2.text.dialog import Message
from models import write_tiny_gguf


def pair(chosen: str, rejected: str, number: int, **labels: Any) -> PreferencePair:
    return PreferencePair((Message("user", f"question {number}"),), chosen, rejected, **labels)


PAIRS = [
    pair("a good long answer", "bad", 0, grade=3, safety="chosen safe"),
    pair("good", "a bad long answer", 1, grade=3, safety="both unsafe"),
    pair("good one", "bad ones", 2, grade=0),
    pair("good and long", "bad", 3, safety="both safe"),
]
SCORES = np.array([[2.0, -1.0], [-1.0, 1.0], [0.5, 0.0], [1.0, 1.0]])  # right, wrong, right, equal


def test_accuracies_by_hand() -> None:
    found = measure(PAIRS, SCORES, threshold=0.5, words=WordsBaseline(PAIRS))
    assert found["accuracy"]["mean"] == (1 + 0 + 1 + 0.5) / 4
    lengths = {name: each["mean"] for name, each in found["by_length"].items()}
    assert lengths == {
        "the longer answer is better": 0.75,
        "the shorter answer is better": 0,
        "mean of these two": 0.375,
    }
    assert {name: each["mean"] for name, each in found["by_grade"].items()} == {
        "negligibly better": 1,
        "significantly better": 0.5,
    }
    assert {name: each["mean"] for name, each in found["by_safety"].items()} == {
        "chosen safe": 1,
        "both safe": 0.5,
        "both unsafe": 0,
    }
    assert found["loss"] == pytest.approx(np.log1p(np.exp([-3.0, 2.0, -0.5, 0.0])).mean())
    longer = found["baselines"]["the longer answer wins"]
    assert (longer["accuracy"]["mean"], longer["n"], longer["test"]) == (0.625, 2, "McNemar, exact")  # without equals
    assert found["baselines"]["words alone"]["accuracy"]["mean"] == 1
    lines = Report({"set": found}).lines()
    assert lines[0].startswith("set: 4 held-out pairs, calibration error 0.")
    assert any(line.startswith("  accuracy                            62.5%") for line in lines)


def test_unsafe_answers_below_a_threshold() -> None:
    """Unsafe: −1 of the first pair, −1 and 1 of the second. Below σ = 0.5: the two at −1."""
    found = unsafe_recall(PAIRS, sigmoid_of(SCORES), 0.5)
    assert found is not None
    assert (found["recall"]["mean"], found["recall"]["n"], found["precision"]["mean"]) == (2 / 3, 3, 1)
    stricter = unsafe_recall(PAIRS, sigmoid_of(SCORES), 0.75)  # σ(1) = 0.73: also both of the last pair, which are safe
    assert stricter is not None
    assert (stricter["recall"]["mean"], stricter["precision"]["mean"]) == (1, 3 / 5)
    assert unsafe_recall(PAIRS[2:3], sigmoid_of(SCORES[2:3]), 0.5) is None


def test_calibration_by_hand() -> None:
    """Gaps of ± log 4 have confidence 0.8, so in the bin from 0.8 to 0.85; three of four right are 0.75."""
    gap = math.log(4) + 1e-9
    found = calibration(np.array([gap, gap, -gap, gap, 0.0]))
    assert found["ece"] == pytest.approx(0.8 * 0.05 + 0.2 * 0.0)
    assert [(each["from"], each["to"], each["pairs"]) for each in found["bins"]] == [(0.5, 0.55, 1), (0.8, 0.85, 4)]
    assert found["bins"][1]["accuracy"] == 0.75


def recipe(**settings: Any) -> RewardRecipe:
    return RewardRecipe.model_validate({"start": "chat", "data": {"files": ["pairs.jsonl"]}, **settings})


def test_the_papers_numbers() -> None:
    """Spec 6.3 and 6.4: 512 pairs, 1e-5 and 5e-6 for 70B, max(5, 3 %) of warm-up, one epoch, a tenth at the end."""
    fitted = fit(recipe(), 1_418_091, 1600, width=4096)
    o = fitted.optimizer
    assert (fitted.batch.size, fitted.steps, fitted.epochs, o.warmup) == (512, 2770, 1.0, 83)
    assert (o.lr, o.betas, o.eps, o.weight_decay, o.clip, o.min_lr_ratio) == (1e-5, (0.9, 0.95), 1e-5, 0.1, 1.0, 0.1)
    assert fit(recipe(), 1_418_091, 1600, width=8192).optimizer.lr == 5e-6
    margins = {name: recipe(margin=name).margins for name in ("none", "small", "large")}
    assert [*margins["none"].values()] == [0, 0, 0, 0]
    assert [*margins["small"].values()] == [0, 1 / 3, 2 / 3, 1]
    assert margins["large"] == {0: 0, 1: 1, 2: 2, 3: 3}


def test_few_pairs_make_smaller_steps() -> None:
    fitted = fit(recipe(), 3000, 400, width=576, dp_size=2)
    assert (fitted.batch.size, fitted.batch.micro_size, fitted.steps) == (32, 8, 94)
    assert (fitted.optimizer.warmup, fitted.optimizer.lr, fitted.evaluate) == (5, 7.11e-5, 24)
    assert fit(recipe(lora={}), 3000, 400, width=576).optimizer.lr == 7.11e-4
    assert fit(recipe(steps=3), 3000, 400, width=576).optimizer.warmup == 3
    given = fit(recipe(batch={"size": 8}, optimizer={"lr": 1e-3, "warmup": 1}), 3000, 400, width=576)
    assert (given.batch.size, given.batch.micro_size, given.optimizer.lr, given.optimizer.warmup) == (8, 8, 1e-3, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": {"tensor": 2}}, "reward models are not trained by tensor parallelism"),
        ({"full": True, "lora": {}}, "has full and also lora"),
        ({"samples": {"prompts": ["a"]}}, "a reward model writes no text"),
        ({"margin": "medium"}, "Input should be 'none', 'small' or 'large'"),
    ],
)
def test_settings_that_lead_nowhere(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**settings)


def test_large_models_are_trained_by_adapters() -> None:
    with pytest.raises(RecipeError, match=r"chat: has 7\.0 billion parameters; lora\.rank=8 trains"):
        recipe().refuse_large(7 * 10**9)
    recipe(lora={}).refuse_large(7 * 10**9)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        refuse_tokenizer(model)
        model.config = replace(model.config, vocab_size=319)
        with pytest.raises(RecipeError, match="its tokenizer has 320 tokens and the model 319; give the model's own"):
            refuse_tokenizer(model)
