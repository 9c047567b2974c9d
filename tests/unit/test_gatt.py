"""`llama2 gatt`: what is trained on, what answers are sampled from, probes, and the attention figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from commands import typed
from llama2 import checkpoint
from llama2 import recipe as recipes
from llama2.align import gatt, gatt_attention
from llama2.align.gatt_settings import GattRecipe
from llama2.align.standing_instructions import VERIFIABLE, InstructionSettings, Place, combination, placed
from llama2.data import dialogs
from llama2.errors import DataError, RecipeError
from llama2.model.transformer import Transformer
from llama2.text.dialog import Dialog
from models import tiny_config, write_tiny_gguf
from oracle_transformers import transformers_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=1024))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    return tmp_path


def recipe_of(model: Path, *settings: str) -> GattRecipe:
    table: dict[str, Any] = {
        "model": str(model),
        "prompts": {"files": ["prompts.jsonl"], "held_out": 4},
        "dialogs": 6,
        "max_turns": 3,
        "samples": 3,
        "max_tokens": 6,
        "cut": "keep",
        "instructions": {"verifiable": ["no comma"], "terse": 0.0},
        "probe": {"dialogs": 4, "turns": [2, 3], "instructions": ["no comma", "harbour"]},
        "runtime": {"threads": 1, "context": 512},
    }
    return recipes.make(table, GattRecipe, settings, where="test")


def make(recipe: GattRecipe, **options: Any) -> dict[str, Any]:
    options.setdefault("progress", lambda *_: None)
    return gatt.gatt(recipe, {}, note=options.pop("note", lambda _: None), **options)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_instruction_is_at_every_turn_where_answers_are_drawn_and_once_in_the_data(
    place: Path, model: Path
) -> None:
    notes: list[str] = []
    report = make(recipe_of(model), note=notes.append)
    assert notes[0].startswith("estimate: ")
    text = VERIFIABLE["no comma"].text
    asked = lines(place / "gatt-samples/prompts.jsonl")
    assert {len(each["messages"]) for each in asked} == {1, 3, 5}
    for each in asked:
        users = [message["content"] for message in each["messages"] if message["role"] == "user"]
        assert all(user.startswith(f"{text}\n\nquestion ") for user in users)
    made = lines(place / "gatt/gatt.jsonl")
    assert report["dialogs"] == len(made) > 0
    for record in made:
        assert json.dumps(record["messages"]).count(text) == 1
        assert record["messages"][0] == {"role": "system", "content": text}
        answers = [message for message in record["messages"] if message["role"] == "assistant"]
        assert [each.get("weight") for each in answers] == [0] * (len(answers) - 1) + [None]
        assert "," not in answers[-1]["content"]
    make(recipe_of(model, "place=user", "output=other"))
    for record in lines(place / "other/gatt.jsonl"):
        assert json.dumps(record["messages"]).count(text) == 1
        assert record["messages"][0]["content"].startswith(f"{text}\n\nquestion ")


def test_only_the_last_answer_has_a_loss(place: Path, model: Path) -> None:
    make(recipe_of(model))
    with checkpoint.open(model) as opened:
        for _, dialog in dialogs.read([place / "gatt/gatt.jsonl"]):
            example = dialogs.render(dialog, opened.tokenizer, opened.template)
            spans = np.flatnonzero(np.diff(example.loss_mask, prepend=False, append=False)).reshape(-1, 2)
            assert len(spans) == 1
            (start, end), last = spans[0], dialog.dialog.messages[-1].content
            assert opened.tokenizer.decode(example.tokens[start:end].tolist()).strip() == last


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(place: Path, model: Path) -> None:
    make(recipe_of(model))
    whole = [(place / name).read_bytes() for name in ("gatt-samples/samples.jsonl", "gatt/gatt.jsonl")]

    class StoppedError(Exception):
        pass

    for number in (1, 2, 2, 3):

        def stop(*_: object, number: int = number, calls: list[int] = []) -> None:  # noqa: B006
            calls.append(0)
            if len(calls) == number:
                raise StoppedError

        again = recipe_of(model, "store=again", "output=gatt-again")
        with pytest.raises(StoppedError):
            make(again, progress=stop)
    make(again)
    assert [(place / name).read_bytes() for name in ("again/samples.jsonl", "gatt-again/gatt.jsonl")] == whole


def test_answers_that_do_not_follow_are_left_out(place: Path, model: Path) -> None:
    with pytest.raises(DataError, match="no dialog is left"):
        make(recipe_of(model, 'instructions.verifiable=["last words"]', "instructions.terse=0"))


def test_combinations_are_of_different_kinds() -> None:
    settings = InstructionSettings(
        hobbies=["chess"], figures=["Ada"], languages=["Italian"], verifiable=["title"], combine=4
    )
    found = [combination(settings, np.random.default_rng(seed)) for seed in range(60)]
    assert {len(each.checks) for each in found} == {0, 1, 2}
    texts = {each.text for each in found}
    assert "You enjoy chess. Act as Ada. Speak in Italian. " + VERIFIABLE["title"].text in texts
    assert "Hobby: chess; Figure: Ada; Language: Italian; " + VERIFIABLE["title"].terse in texts
    assert any(each.is_followed("<<Tè>> È una bella giornata, andiamo al mare con gli amici.") for each in found)


#: An answer that follows each instruction, and one that does not.
ANSWERS = {
    "no comma": ("Tea and milk.", "Tea, milk."),
    "quotes": ('"Tea."', 'Well: "Tea."'),
    "last words": ("Tea. Take care, friend.", "Take care, friend. Tea."),
    "harbour": ("A harbour.", "A port."),
    "one sentence": ("Tea is warm.", "Tea is warm. It is good."),
    "title": ("<<Tea>>\nIt is warm.", "Tea: it is warm."),
    "postscript": ("Tea.\nP.S. Warm.", "Tea."),
    "capitals": ("TEA IS THE BEST OF ALL DRINKS.", "Tea is the best of all drinks."),
    "lowercase": ("tea is the best of all drinks.", "Tea is the best of all drinks."),
}


@pytest.mark.parametrize("name", [*VERIFIABLE])
def test_each_instruction_is_checked(name: str) -> None:
    followed, broken = ANSWERS[name]
    assert VERIFIABLE[name].is_followed(followed) is True
    assert VERIFIABLE[name].is_followed(broken) is False


def test_places_of_the_instruction() -> None:
    said = {place: [m["content"] for m in placed("I", ["a", "b"], ["x"], place)] for place in get_args(Place)}
    assert said == {
        "every": ["I\n\na", "x", "I\n\nb"],
        "system": ["I", "a", "x", "b"],
        "user": ["I\n\na", "x", "b"],
        "nowhere": ["a", "x", "b"],
    }


def test_probes_are_of_held_out_prompts_and_are_compared(place: Path, model: Path) -> None:
    recipe = recipe_of(model)
    shutil.copy(model, place / "again.gguf")
    report = gatt.probe(recipe, [str(model), "again.gguf"], note=lambda _: None, progress=lambda *_: None)
    first, found = report["models"].values()
    assert "compared" not in first
    assert first["turns"] == found["turns"]
    assert set(found["turns"]) == set(found["chance"]) == {2, 3}
    asked = lines(place / "gatt-samples/prompts.jsonl")
    assert {len(each["messages"]) - (each["messages"][0]["role"] == "system") for each in asked} == {1, 3, 5}
    used = {prompt.messages[0]["content"] for prompt in gatt.prompt_files.read(recipe.prompts, recipe.seed)}
    assert not used & {message["content"] for each in asked for message in each["messages"]}
    samples = {s["prompt"]: s["answer"].strip() for s in lines(place / "gatt-samples/samples.jsonl")}
    rates = {2: [], 3: []}  # type: ignore[var-annotated]
    for each in asked:
        users = [message for message in each["messages"] if message["role"] == "user"]
        if each["messages"][0]["role"] == "system" and len(users) in rates:
            text = each["messages"][0]["content"]
            answer = samples[each["prompt"]]
            rates[len(users)].append(("," not in answer and bool(answer)) if "comma" in text else "harbour" in answer)
    assert {turn: rate["mean"] for turn, rate in found["turns"].items()} == {t: np.mean(v) for t, v in rates.items()}
    assert found["compared"][2]["difference"] == 0


def test_the_strongest_attention_is_transformers(model: Path) -> None:
    tokens = [1, *range(40, 70)]
    with checkpoint.open(model) as opened:
        theirs = transformers_model(opened)
        theirs.set_attn_implementation("eager")
        with torch.no_grad():
            layers = theirs(torch.tensor([tokens]), output_attentions=True).attentions
        ours = gatt_attention.strongest_attention(Transformer.load(opened), tokens)
    expected = torch.stack([layer[0] for layer in layers]).amax((0, 1))
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_the_figure_finds_the_instruction(place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    messages = placed("Never use a comma.", ["one", "two"], ["a", "b"], "system")
    (place / "dialog.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    code, out, error = typed(capsys, "gatt", "attention", "dialog.jsonl", model, "--json")
    assert code == 0, error
    (found,) = json.loads(out).values()
    with checkpoint.open(model) as opened:
        tokens, _ = Dialog(messages).render(opened.tokenizer, opened.template)
        start, end = found["instruction"]
        assert "Never use a comma." in opened.tokenizer.decode(tokens[start:end])
        assert len(opened.tokenizer.decode(tokens[start:end])) < 24
        weights = gatt_attention.strongest_attention(Transformer.load(opened), tokens)
    assert len(found["answers"]) == 2
    assert found["bins"] == gatt_attention.binned(weights).tolist()
    assert gatt_attention.binned(np.arange(9, dtype=np.float32).reshape(3, 3), 2).tolist() == [[4, 5], [7, 8]]
    assert (place / "attention.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('instructions.verifiable=["sing"]', "verifiable: 'sing' is unknown; there are no comma, quotes"),
        ("probe.turns=[4, 2]", "turns: are numbers from 1 on, in order"),
        ("max_turns=1", "max_turns: Input should be greater than or equal to 2"),
        ("min_turns=5", "max_turns=3 is less than min_turns=5"),
    ],
)
def test_bad_settings_are_one_line(setting: str, message: str, model: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(model, setting)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_commands(place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.toml").write_text(
        f'model = "{model}"\ndialogs = 3\nmax_turns = 2\nsamples = 2\nmax_tokens = 5\ncut = "keep"\n'
        '[prompts]\nfiles = ["prompts.jsonl"]\n'
        'held_out = 4\n[instructions]\nverifiable = ["no comma"]\n'
        "[probe]\ndialogs = 2\nturns = [2]\n[runtime]\ncontext = 512\n"
    )
    code, out, error = typed(capsys, "gatt", "mine.toml")
    assert code == 0, error
    assert out.splitlines()[-1] == "tune with them: llama2 sft -m MODEL gatt/gatt.jsonl"
    code, out, error = typed(capsys, "gatt", "probe", "mine.toml", model, "--set", "probe.chance=false")
    assert code == 0, error
    assert f"{model}: turn 2: " in out
    code, out, error = typed(capsys, "gatt", "probe", "mine.toml", model, "--set", "prompts.held_out=0")
    assert code == 1
    assert error == "llama2: error: prompts.held_out is 0; hold out some to probe with, such as prompts.held_out=100\n"
