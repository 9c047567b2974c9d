"""What `llama2 sft` fits to dialogs and models: numbers by hand, and what holds for any number of rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2 import recipe as recipes
from llama2.data.dialogs import DialogSettings, Example, Packed
from llama2.errors import RecipeError
from llama2.train import tuning
from llama2.train.schedule import learning_rate
from llama2.train.tuning import SftRecipe, fit, fit_rows


def recipe(**settings: Any) -> SftRecipe:
    data = {"files": ["x"], "length": 256, **settings.pop("data", {})}
    return SftRecipe.model_validate({"start": "m", "data": data, **settings})


def rows_of(sizes: list[int], context: int = 8192, **given: Any) -> tuple[int, int]:
    data = fit_rows(DialogSettings.model_validate({"files": ["x"], **given}), sizes, context)
    return data.length, data.validation


def test_rows_and_what_is_held_out() -> None:
    assert rows_of([100] * 20) == (256, 2)  # never shorter than 256
    assert rows_of([100, 257]) == (320, 0)  # the next multiple of 64; none of fewer than ten
    assert rows_of([100] * 9) == (256, 0)
    assert rows_of([100] * 10) == (256, 1)
    assert rows_of([100] * 5000) == (256, 100)
    assert rows_of([100] * 20, 128) == (128, 2)
    assert rows_of([300] * 20, 310) == (310, 2)
    assert rows_of([100, 9000] * 10) == (4096, 1)  # the paper's; the long ones will be refused
    assert rows_of([100, 9000] * 10, too_long="leave out") == (256, 1)
    assert rows_of([100, 9000] * 10, skip_bad=True) == (256, 1)
    assert rows_of([100] * 20, length=512, validation=7) == (512, 7)
    assert rows_of([]) == (256, 0)


def test_twenty_dialogs() -> None:
    """In six rows, for a model of width 576: 40 steps, 6 2/3 epochs; 2e-5 × 4096 / 576 = 1.42e-4."""
    r = fit(recipe(), 6, width=576)
    assert (r.steps, r.batch.size, r.batch.micro_size, r.epochs) == (40, 1, 1, pytest.approx(20 / 3))
    assert (r.optimizer.lr, r.optimizer.warmup, r.evaluate, r.compile) == (1.42e-4, 4, 10, False)


def test_the_papers_dialogs() -> None:
    """27,540 in, say, 3,000 rows of 4,096, for 7B and 70B: two epochs of 64 rows, 94 steps."""
    for width in (4096, 8192):
        r = fit(recipe(data={"length": 4096}), 3000, width=width)
        assert (r.steps, r.batch.size, r.batch.micro_size, r.epochs) == (94, 64, 1, 2)
        assert (r.optimizer.lr, r.optimizer.warmup, r.optimizer.min_lr_ratio, r.compile) == (2e-5, 9, 0.1, True)


def test_one_dialog_is_read_ten_times() -> None:
    r = fit(recipe(), 1, width=4096)
    assert (r.steps, r.batch.size, r.epochs, r.optimizer.warmup) == (10, 1, 10, 1)


def test_what_is_given_stays() -> None:
    given_ = {"lr": 1e-5, "warmup": 3}
    r = fit(
        recipe(epochs=3, batch={"size": 8, "micro_size": 2}, optimizer=given_, evaluate=7, compile=True), 100, width=64
    )
    assert (r.epochs, r.steps, r.batch.size, r.batch.micro_size) == (3, 38, 8, 2)  # 300 / 8 = 37.5
    assert (r.optimizer.lr, r.optimizer.warmup, r.evaluate, r.compile) == (1e-5, 3, 7, True)
    r = fit(recipe(steps=5), 100, width=64)  # six rows a step
    assert (r.steps, r.batch.size, r.epochs) == (5, 6, pytest.approx(0.3))
    assert r.optimizer.warmup == 1  # or a single step would be the schedule's last


def test_precision_is_the_processors() -> None:
    assert [fit(recipe(), 9, width=64, bf16=there).precision for there in (True, False)] == ["bf16", "fp32"]
    assert fit(recipe(precision="bf16"), 9, width=64, bf16=False).precision == "bf16"


def test_an_adapter_has_the_numbers_of_llama_recipes() -> None:
    """Spec 5: rank 8, alpha 32, dropout 0.05, q_proj and v_proj; its peak, 1e-4, goes with the width."""
    r = fit(recipe(lora={}), 9, width=4096)
    assert r.lora is not None
    assert (r.lora.rank, r.lora.alpha, r.lora.dropout, r.lora.targets) == (8, 32, 0.05, ["q_proj", "v_proj"])
    assert (r.optimizer.lr, fit(recipe(lora={}), 9, width=1024).optimizer.lr) == (1e-4, 4e-4)
    assert fit(recipe(), 9, width=1024).lora is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: .* greater than or equal to 1"),
        ({"lora": {"targets": ["wq"]}}, "lora.targets.0: .*'q_proj', 'k_proj'"),
        ({"lora": {"targets": []}}, "lora.targets: .* at least 1 item"),
        ({"lora": {"dropout": 1}}, "lora.dropout: .* less than 1"),
        ({"lora": {"quantize": "Q8_0"}}, "lora.quantize: .*'Q4_1' or 'Q4_0'"),
        ({"lora": {"r": 4}}, "lora.r: unknown setting; "),
        ({"lora": {}, "full": True}, "has full and also lora; .* leave either out"),
        ({"lora": {}, "mesh": {"tensor": 2}}, "mesh.tensor: adapters are not trained by tensor parallelism"),
    ],
)
def test_adapters_that_cannot_be_trained(settings: dict[str, Any], message: str) -> None:
    table = {"start": "m", "data": {"files": ["x"]}, **settings}
    with pytest.raises(RecipeError, match=f"^here: {message}"):
        recipes.make(table, SftRecipe, where="here")


def test_processes_share_a_step() -> None:
    assert fit(recipe(), 1000, width=64, dp_size=8).batch.size == 56  # a 16th is 62
    assert fit(recipe(), 3, width=64, dp_size=8).batch.size == 8
    r = fit(recipe(batch={"micro_size": 3}), 1000, width=64, dp_size=4)
    assert (r.batch.size, r.batch.micro_size) == (60, 3)
    assert fit(recipe(), 1000, width=64).batch.micro_size == 2  # of 62 rows, and no more than 2048 / 256 at once
    assert fit(recipe(batch={"size": 7}), 1000, width=64, dp_size=2).batch.micro_size == 1  # which the loop refuses


@given(st.integers(1, 20000), st.integers(64, 16384))
def test_any_number_of_rows(rows: int, width: int) -> None:
    r = fit(recipe(), rows, width=width)
    assert r.batch.size <= min(rows, 64)
    assert r.batch.size % r.batch.micro_size == 0
    assert r.steps * r.batch.size >= 2 * rows
    assert r.steps >= min(40, 10 * rows)
    o = r.optimizer
    rates = [
        learning_rate(s, peak=o.lr, warmup=o.warmup, steps=r.steps, min_lr_ratio=o.min_lr_ratio)
        for s in range(1, r.steps + 1)
    ]
    assert max(rates) == o.lr
    assert sum(rates) > r.steps * o.lr / 2
    assert 2e-5 <= o.lr <= 2e-5 * 64
    assert fit(r, rows, width=width) == r  # as when it is resumed


def test_warnings() -> None:
    def packed(count: int) -> Packed:
        example = Example(np.zeros(200, np.int32), np.ones(200, np.bool_))
        return Packed("x", [example] * count, length=256)

    def of(count: int, **settings: Any) -> list[str]:
        some = packed(count)
        return tuning.warnings(fit(recipe(**settings), len(some), width=64), some)

    assert of(20, data={"validation": 2}) == []
    assert of(20) == ["no dialog is held out, so nothing shows whether the model learns more than these dialogs"]
    assert of(1, data={"validation": 1}) == [
        "few dialogs, 1: the model may learn them by heart, and little beyond them",
        "10 steps change little; steps=40 would change more",
    ]
    assert of(20, data={"validation": 2}, steps=40, batch={"size": 32}) == [
        "batch.size=32 is more than the 20 rows there are: a step repeats some"
    ]


def test_large_models_are_not_trained_in_full_unasked() -> None:
    recipe().refuse_large(10**9)
    recipe(full=True).refuse_large(6_738_415_616)
    recipe(lora={}).refuse_large(6_738_415_616)
    message = r"m: has 6.7 billion parameters; lora.rank=8 trains an adapter, full=true every weight, in about 108 GB"
    with pytest.raises(RecipeError, match=message):
        recipe().refuse_large(6_738_415_616)
