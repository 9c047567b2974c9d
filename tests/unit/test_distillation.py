"""`llama2 distil`: pre-prompts, what is scored and written, the gate, and a run that was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama2 import recipe as recipes
from llama2.align import distillation
from llama2.align.distillation_settings import DistilRecipe
from llama2.data.prompts import PromptReport
from llama2.errors import DataError, RecipeError
from models import tiny_config, write_tiny_gguf


@dataclass
class Vowels:
    """The reward is the share of vowels; what is read is kept."""

    digest: str = "v"

    def __post_init__(self) -> None:
        self.read: list[Any] = []

    def __call__(self, dialogs: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        self.read += dialogs
        return [self.one(dialog[-1]["content"]) for dialog in dialogs]

    @staticmethod
    def one(answer: str) -> float:
        return sum(letter in "aeiou" for letter in answer) / len(answer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=1024))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"risk {i}"} for i in range(6)] + [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]}
    ]
    (tmp_path / "risky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fraud.jsonl").write_text("".join(json.dumps({"prompt": f"fraud {i}"}) + "\n" for i in range(3)))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "harmless"}) + "\n")
    return tmp_path


def recipe_of(model: Path, *settings: str) -> DistilRecipe:
    table: dict[str, Any] = {
        "model": str(model),
        "prompts": {"files": ["plain.jsonl"], "safety_files": ["risky.jsonl"]},
        "templates": {"fraud": {"files": ["fraud.jsonl"], "risk": "theft", "steps": ["Stop.", "Help."]}},
        "rewards": {"safety": "a reward model"},
        "max_tokens": 8,
        "cut": "keep",
        "runtime": {"threads": 1, "context": 1024},
    }
    return recipes.make(table, DistilRecipe, settings, where="test")


def distil(recipe: DistilRecipe, scorer: Vowels | None = None, **options: Any) -> dict[str, Any]:
    options.setdefault("note", lambda _: None)
    options.setdefault("progress", lambda *_: None)
    return distillation.distil(recipe, {"safety": scorer or Vowels()}, **options)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pre_prompts_are_of_both_sorts_and_only_risky_prompts_have_them(place: Path, model: Path) -> None:
    recipe = recipe_of(model)
    risky = distillation.read(recipe, PromptReport())
    assert {each.prompt.messages[-1]["content"] for each in risky} == {*(f"risk {i}" for i in range(6)), "u"} | {
        f"fraud {i}" for i in range(3)
    }
    found = {each.prompt.messages[-1]["content"]: distillation.pre_prompts(recipe, each) for each in risky}
    assert [each.sort for each in found["risk 0"]] == ["generic"] * 2
    assert [each.sort for each in found["fraud 0"]] == ["generic"] * 2 + ["template"] * 2
    system, user = found["fraud 0"][-1].asked.messages
    assert system["content"].endswith("This request touches on: theft. Go through these steps: 1. Stop. 2. Help.")
    assert user == {"role": "user", "content": "fraud 0"}
    assert found["u"][0].asked.messages[0]["content"].endswith("\n\nS")
    assert all("{" not in each.asked.messages[0]["content"] for group in found.values() for each in group)
    inside = distillation.pre_prompts(recipe_of(model, "place=user"), risky[0])[0].asked.messages
    assert (len(inside), inside[0]["content"].split("\n\n")[1]) == (1, risky[0].prompt.messages[0]["content"])
    assert distillation.pre_prompts(recipe, risky[0]) == distillation.pre_prompts(recipe, risky[0])


def test_what_is_scored_and_written_is_the_prompt_alone_and_the_gate_holds(place: Path, model: Path) -> None:
    scorer, notes = Vowels(), list[str]()
    report = distil(recipe_of(model), scorer, note=notes.append)
    assert notes[-1].startswith("estimate: ")
    assert all("assistant." not in json.dumps(dialog[:-1]) for dialog in scorer.read)
    samples = lines(place / "distil-samples/samples.jsonl")
    prompts = {each["prompt"]: each["messages"] for each in lines(place / "distil-samples/prompts.jsonl")}
    answers = {prompts[s["prompt"]][-1]["content"]: [] for s in samples}  # type: ignore[var-annotated]
    originals = {}
    for s in samples:
        messages = prompts[s["prompt"]]
        if len(messages) == 1 or messages[0]["content"] == "S":
            originals[messages[-1]["content"]] = s["answer"].strip()
        else:
            answers[messages[-1]["content"]].append(s["answer"].strip())
    kept = lines(place / "distilled/distilled.jsonl")
    assert 0 < len(kept) == report["kept"] < report["prompts"] == 10
    expected = set()
    for user, texts in answers.items():
        best = max(map(scorer.one, filter(None, texts)), default=0)
        if best > (scorer.one(originals[user]) if originals[user] else 0):
            expected.add(user)
    assert {record["messages"][-2]["content"] for record in kept} == expected
    for record in kept:
        user, answer = record["messages"][-2]["content"], record["messages"][-1]["content"]
        assert answer in answers[user]
        assert scorer.one(answer) == max(map(scorer.one, filter(None, answers[user])))
        assert record["gain"] > 0
    assert report["left_out"] == {"the safety reward does not rise": 10 - len(kept)}
    assert report["rewards"]["kept"]["safety"]["mean"] > report["rewards"]["original"]["safety"]["mean"]
    open_gate = distil(recipe_of(model, "gate=false", "output=all"))
    assert open_gate["kept"] == 10
    assert distil(recipe_of(model, "min_gain=0.05", "output=some"))["kept"] <= len(kept)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(place: Path, model: Path) -> None:
    distil(recipe_of(model))
    names = ("samples.jsonl", "rewards-v.jsonl", "prompts.jsonl")
    whole = [(place / "distil-samples" / name).read_bytes() for name in names]

    class StoppedError(Exception):
        pass

    for number in (1, 2, 1, 2):

        def stop(*_: object, number: int = number, calls: list[int] = []) -> None:  # noqa: B006
            calls.append(0)
            if len(calls) == number:
                raise StoppedError

        with pytest.raises(StoppedError):
            distil(recipe_of(model, "store=again"), progress=stop)
    distil(recipe_of(model, "store=again", "output=again-out"))
    assert [(place / "again" / name).read_bytes() for name in names] == whole
    assert (place / "again-out/distilled.jsonl").read_bytes() == (place / "distilled/distilled.jsonl").read_bytes()


def test_no_answer_kept_and_no_prompt_are_errors(place: Path, model: Path) -> None:
    with pytest.raises(DataError, match=r"no answer is kept \(\{'the safety reward does not rise': 10\}\)"):
        distil(recipe_of(model, "min_gain=1.0"))
    with pytest.raises(DataError, match="prompts: none is tagged as risky"):
        distil(recipe_of(model, "prompts.safety_files=[]", "templates={}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rewards.safety=", "rewards.helpful=h"], "needs rewards.safety, which decides what is kept"),
        (["generic=[]", "templates={}"], "needs generic pre-prompts, or templates"),
        (["prompts.files=[]", "prompts.safety_files=[]", "templates={}"], "needs prompts.safety_files"),
        (["rewards.threshold=2"], "rewards.threshold: Input should be less than or equal to 1"),
    ],
)
def test_bad_settings_are_one_line(settings: list[str], message: str, model: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(model, *settings)
    assert message in str(refused.value)
