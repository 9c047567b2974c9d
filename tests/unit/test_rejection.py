"""`llama2 reject` on tiny models: samples, rewards, what is chosen, and what a killed run leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama2
from commands import typed
from llama2 import recipe as recipes
from llama2.align import best_of_curves, rejection, selection
from llama2.align.combined_reward import combined
from llama2.align.judging import Judged
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.reward import score
from llama2.align.selection import SelectionReport
from llama2.align.store import Policy, SampleStore, StoredSample
from llama2.data import comparisons, dialogs
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, PromptSettings
from llama2.errors import DataError, RecipeError, RequestError
from models import tiny_config, write_tiny_gguf
from reward_models import write_reward_model

PROMPTS = [{"prompt": "one"}, {"prompt": "two", "safety": True}, {"messages": [{"role": "user", "content": "three"}]}]


@dataclass
class WordScorer:
    """A reward that a test can work out: how many of an answer's letters are vowels, or are not."""

    digest: str
    vowels: bool = True
    calls: list[int] = field(default_factory=list)

    def __call__(self, dialogs: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        self.calls.append(len(dialogs))
        return [self.one(dialog[-1]["content"]) for dialog in dialogs]

    def one(self, answer: str) -> float:
        share = sum(letter in "aeiou" for letter in answer) / len(answer)
        return share if self.vowels else 1 - share


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two rounds' models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_tiny_gguf(folder / f"v{seed}.gguf", config=tiny_config(), seed=seed)
    return {f"v{seed}": str(folder / f"v{seed}.gguf") for seed in (0, 1)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    return tmp_path


def recipe_of(models: Mapping[str, str], *settings: str, rewards: Sequence[str] = ("helpful",)) -> RejectionRecipe:
    table = {
        "models": dict(models),
        "prompts": {"files": ["prompts.jsonl"]},
        "rewards": dict.fromkeys(rewards, "a reward model"),
        "samples": 4,
        "max_tokens": 12,
        "temperature": 1.0,
        "cut": "keep",
        "plots": False,
        "runtime": {"threads": 1},
    }
    return recipes.make(table, RejectionRecipe, settings, where="test")


def reject(recipe: RejectionRecipe, scorers: Mapping[str, WordScorer] | None = None, **options: Any) -> dict[str, Any]:
    options.setdefault("note", lambda _: None)
    options.setdefault("progress", lambda *_: None)
    return rejection.reject(recipe, scorers or {"helpful": WordScorer("h")}, **options)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_of_all_rounds_becomes_data(place: Path, models: dict[str, str]) -> None:
    scorer = WordScorer("h")
    report = reject(recipe_of(models), {"helpful": scorer})
    samples = lines(place / "samples/samples.jsonl")
    assert len(samples) == 2 * 3 * 4
    prompts = [prompt["prompt"] for prompt in lines(place / "samples/prompts.jsonl")]
    order = [(s["round"], s["prompt"], s["k"]) for s in samples]
    assert order == [(r, prompt, k) for r in models for prompt in prompts for k in range(4)]
    best, pairs = lines(place / "best/best.jsonl"), lines(place / "best/preferences.jsonl")
    assert report["best"]["dialogs"] == len(best) > 0
    texts = {s["prompt"]: [t["answer"].strip() for t in samples if t["prompt"] == s["prompt"]] for s in samples}
    by_prompt = {m["messages"][0]["content"]: m["prompt"] for m in lines(place / "samples/prompts.jsonl")}
    for dialog in best:
        answers = [a for a in texts[by_prompt[dialog["messages"][0]["content"]]] if a]
        assert dialog["messages"][-1] == {"role": "assistant", "content": max(answers, key=scorer.one)}
        assert dialog["reward"] == max(map(scorer.one, answers))
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected"}
        answers = [a for a in texts[by_prompt[pair["prompt"][0]["content"]]] if a]
        assert scorer.one(pair["rejected"][0]["content"]) == min(map(scorer.one, answers))
        assert scorer.one(pair["chosen"][0]["content"]) == max(map(scorer.one, answers))
    curve = report["rounds"]["v0"]["curve"]
    judged = [scorer.one(s["answer"].strip()) if s["answer"].strip() else 0 for s in samples if s["round"] == "v0"]
    assert curve[0]["maximum"] == pytest.approx(sum(judged) / 12)
    assert curve[3]["maximum"] == pytest.approx(sum(max(judged[i : i + 4]) for i in (0, 4, 8)) / 3)
    tokens = [s["tokens"] for s in samples if s["round"] == "v0"]
    of_best = [tokens[max(range(i, i + 4), key=judged.__getitem__)] for i in (0, 4, 8)]
    assert curve[3]["tokens"] == pytest.approx(sum(of_best) / 3)


def test_a_killed_run_goes_on_to_the_same_bytes(place: Path, models: dict[str, str]) -> None:
    settings = ["sweep.temperatures=[0.5, 1.5]", "sweep.prompts=2"]
    recipe = recipe_of(models, *settings).model_copy(update={"temperature": None})
    names = ("samples.jsonl", "rewards-h.jsonl", "rewards-s.jsonl", "prompts.jsonl")

    def scorers() -> dict[str, WordScorer]:
        return {"helpful": WordScorer("h"), "safety": WordScorer("s", vowels=False)}

    report = reject(recipe, scorers())
    whole = {name: (place / "samples" / name).read_bytes() for name in names}
    best = (place / "best/best.jsonl").read_bytes()
    assert [row["temperature"] for row in report["rounds"]["v1"]["sweep"]] == [0.5, 1.5]

    class KilledError(Exception):
        pass

    stops = 0
    for number in (1, 2, 1, 3, 2):

        def kill(*_: object, number: int = number, calls: list[int] = []) -> None:  # noqa: B006
            calls.append(0)
            if len(calls) == number:
                raise KilledError

        again = recipe.model_copy(update={"store": Path("again"), "output": Path("best-again")})
        try:
            reject(again, scorers(), progress=kill)
        except KilledError:
            stops += 1
            with (place / "again" / names[stops % 3]).open("ab") as file:
                file.write(b'{"prompt": "ha')
    reject(again, scorers())
    assert stops == 5
    assert {name: (place / "again" / name).read_bytes() for name in names} == whole
    assert (place / "best-again/best.jsonl").read_bytes() == best


def test_a_further_round_draws_and_scores_only_what_is_new(place: Path, models: dict[str, str]) -> None:
    reject(recipe_of({"v0": models["v0"]}))
    before = (place / "samples/samples.jsonl").read_bytes()
    scorer = WordScorer("h")
    report = reject(recipe_of({"v1": models["v1"]}), {"helpful": scorer})
    after = (place / "samples/samples.jsonl").read_bytes()
    assert after.startswith(before)
    assert {s["round"] for s in lines(place / "samples/samples.jsonl")[12:]} == {"v1"}
    assert sum(report["best"]["rounds"].values()) == report["best"]["dialogs"]
    assert set(report["best"]["rounds"]) == {"v0", "v1"}  # the best are of both
    report = reject(recipe_of({"v1": models["v1"]}, "pool=these models"), {"helpful": scorer})
    assert set(report["best"]["rounds"]) == {"v1"}


def test_answers_do_not_depend_on_what_is_drawn_beside_them(place: Path, models: dict[str, str]) -> None:
    reject(recipe_of({"v0": models["v0"]}, "store=all"))
    (place / "prompts.jsonl").write_text(json.dumps(PROMPTS[2]) + "\n")
    reject(recipe_of({"v0": models["v0"]}, "store=one", "samples=2"))
    everything = {(s["prompt"], s["k"]): s["answer"] for s in lines(place / "all/samples.jsonl")}
    some = {(s["prompt"], s["k"]): s["answer"] for s in lines(place / "one/samples.jsonl")}
    assert len(some) == 2
    assert some.items() <= everything.items()
    assert len(set(everything.values())) > 6  # answers differ from k to k


def test_the_temperature_with_the_best_of_k_is_chosen(place: Path, models: dict[str, str]) -> None:
    notes: list[str] = []
    recipe = recipe_of({"v0": models["v0"]}, "sweep.temperatures=[2.0, 0.3, 2.0]", "samples=6")
    recipe = recipe.model_copy(update={"temperature": None})
    each = reject(recipe, note=notes.append)["rounds"]["v0"]
    rows = {row["temperature"]: row["curve"][-1] for row in each["sweep"]}
    assert [*rows] == [0.3, 2.0]
    assert each["temperature"] == max(rows, key=lambda t: rows[t]["maximum"])
    estimate, chosen = notes
    assert estimate.startswith("estimate: 36 answers, about ")  # 3 prompts × 6 × 2; the sweep covers all
    assert chosen.startswith(f"v0: temperature {each['temperature']:g} has the greatest maximum of 6 answers'")


def test_the_temperature_by_maximum_or_spread() -> None:
    sweep = [
        {"temperature": t, "curve": [{"maximum": 9, "median": 0}, {"maximum": high, "median": middle}]}
        for t, high, middle in ((0.5, 0.75, 0.625), (1.0, 0.5, 0.25), (1.5, 0.75, 0.5))
    ]
    assert best_of_curves.choose_temperature(sweep, "maximum") == (0.5, 0.75)
    assert best_of_curves.choose_temperature(sweep, "spread") == (1.0, 0.25)


def test_the_combined_reward() -> None:
    # Spec 12.6.
    helpful, safety = [0.2, 0.9, 0.7, 0.95, 0.6, 0.4], [0.9, 0.10, 0.5, 0.14, 0.8, 0.3]
    tagged = [True, False, False, False, False, True]
    assert combined(helpful, safety, tagged).tolist() == [0.9, 0.10, 0.7, 0.14, 0.6, 0.3]


def judged(answer: str, reward: float, finish: str = "stop") -> Judged:
    return Judged(
        StoredSample("p", Policy("m", 1.0, 1.0, 9, 0), "v0", 0, answer, 3, finish), {"helpful": reward}, reward
    )


def test_what_may_be_chosen_is_counted() -> None:
    report = SelectionReport()
    group = [judged("a", 0.5), judged(" ", 0.9), judged("b", 0.9, "length"), judged("a ", 0.5), judged("c", 0.7)]
    found = selection.candidates(group, keep_cut=False, report=report)
    assert [each.sample.answer for each in found] == ["c", "a"]
    assert report.left_out == {"empty": 1, "cut by max_tokens": 1, "repeated": 1}
    assert selection.candidates(group, keep_cut=True, report=report)[0].sample.answer == "b"


def test_the_rejected_answer() -> None:
    ordered = [judged(answer, reward) for answer, reward in zip("abcd", (0.9, 0.9, 0.6, 0.1), strict=True)]
    assert selection.rejected(ordered, "worst", 0.0, 0) == ordered[3]
    assert selection.rejected(ordered, "median", 0.0, 0) == ordered[3]  # of two, the worse
    assert selection.rejected(ordered[:3], "median", 0.25, 0) == ordered[2]
    assert selection.rejected(ordered[:3], "worst", 0.35, 0) is None
    assert selection.rejected(ordered[:2], "worst", 0.0, 0) is None  # an equal reward is not worse
    chosen = {selection.rejected(ordered, "random", 0.0, seed).sample.answer for seed in range(20)}  # type: ignore[union-attr]
    assert chosen == {"c", "d"}


def test_earlier_answers_have_no_loss() -> None:
    messages = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    record = selection.tuning_record(messages, judged("b", 0.5))
    assert [message.get("weight") for message in record["messages"]] == [None, 0, None, None]


def test_prompts_are_read_once_and_tagged(place: Path) -> None:
    more = place / "more.jsonl"
    more.write_text('{"prompt": "one"}\n{"question": "four", "answer": "4"}\n{"prompt": "one", "safety": false}\n')
    settings = PromptSettings(files=[place / "prompts.jsonl"], safety_files=[more])
    report = PromptReport()
    found = prompt_files.read(settings, 0, report)
    assert [(p.messages[-1]["content"], p.safety) for p in found] == [
        ("one", True),
        ("two", True),
        ("three", False),
        ("four", True),
    ]
    assert report.repeated == 2
    few = settings.model_copy(update={"count": 2})
    chosen = {tuple(p.id for p in prompt_files.read(few, seed)) for seed in range(8)}
    assert len(chosen) > 2
    assert prompt_files.read(few, 3) == prompt_files.read(few, 3)


def test_pairs_have_prompts_and_conversations_are_held_out_whole(place: Path) -> None:
    pairs = [f"\n\nHuman: {first}\n\nAssistant: yes" for first in ("a", "A ", "b", "c", "d")]
    pairs += ["\n\nHuman: a\n\nAssistant: yes\n\nHuman: more\n\nAssistant: no"]
    records = [{"chosen": pair, "rejected": pair + "!"} for pair in pairs]
    records += [
        {"chosen": pairs[0], "rejected": pairs[2]},
        {"chosen": pairs[2] + "\n\nAssistant: b", "rejected": pairs[2]},
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings, report = PromptSettings(files=[place / "pairs.jsonl"]), PromptReport()
    prompts = prompt_files.read(settings, 0, report)
    assert [[m["content"] for m in p.messages] for p in prompts] == [
        ["a"],
        ["A"],
        ["b"],
        ["c"],
        ["d"],
        ["a", "yes", "more"],
    ]
    assert report.bad == 2  # the last two records' sides have prompts that differ
    for seed in range(6):
        part = settings.model_copy(update={"held_out": 2})
        used, held = prompt_files.read(part, seed), prompt_files.read_held_out(part, seed)
        assert len(held) == 2
        assert not {p.group for p in used} & {p.group for p in held}
        # The same conversations that a reward model with this seed holds out.
        out = comparisons.hold_out([p for r in records[:6] for p in comparisons.understand(r)[1]], 2, seed=seed)[1]
        assert {p.group for p in held} <= {pair.group for pair in out}
    with pytest.raises(DataError, match="or hold out fewer"):
        prompt_files.read(settings.model_copy(update={"held_out": 6}), 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "safety": "no"}', "safety is 'no', and must be true or false"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "message 1: role user"),
        ('{"prompt": ""}', "a record has messages, or prompt"),
        ("[1]", "a record has prompt, or messages"),
        ('{"prompt": "[INST] a"}', r"message 0 contains"),
        (json.dumps({"prompt": "word " * 300}), "do not fit the context of 256"),
    ],
)
def test_bad_prompts_are_refused_or_counted(place: Path, models: dict[str, str], line: str, reason: str) -> None:
    with (place / "prompts.jsonl").open("a") as file:
        file.write(line + "\n")
    recipe = recipe_of({"v0": models["v0"]}, "samples=1")
    with pytest.raises(DataError, match=reason) as refused:
        reject(recipe)
    assert str(refused.value).startswith("prompts.jsonl:4: ")
    skip = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"skip_bad": True})})
    notes: list[str] = []
    found = reject(skip, note=notes.append)
    assert (found["prompts"]["bad"], found["rounds"]["v0"]["left_out"]) in ((1, 0), (0, 1))
    assert any("1 prompts left out; the first: prompts.jsonl:4: " in note for note in notes)


def test_one_model_under_two_names_is_refused(place: Path, models: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"models\.again: is the same model as models\.v0"):
        reject(recipe_of({"v0": models["v0"], "again": models["v0"]}))


def test_a_reward_out_of_range_is_refused(place: Path, models: dict[str, str]) -> None:
    class Logits(WordScorer):
        def one(self, answer: str) -> float:
            return 1.5

    with pytest.raises(DataError, match=r"its reward 1\.5 is not from 0 to 1"):
        reject(recipe_of({"v0": models["v0"]}, "samples=1"), {"helpful": Logits("l")})


def test_no_best_answer_is_an_error(place: Path, models: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no answer may be chosen"):
        reject(recipe_of({"v0": models["v0"]}, "samples=1", "min_reward=1.0"))


def test_a_store_has_one_writer_and_no_damaged_lines(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with SampleStore.open(store), pytest.raises(DataError, match="another process"), SampleStore.open(store):
        pass
    (store / "samples.jsonl").write_text('{"prompt": 1}\n')
    with (
        pytest.raises(DataError, match=r"samples\.jsonl:1: is not a line of a sample store \(prompt: "),
        SampleStore.open(store),
    ):
        pass


def test_figures_are_drawn(place: Path, models: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    only = {"v0": models["v0"]}
    recipe = recipe_of(only, "samples=2", "plots=true", "sweep.prompts=1", "sweep.temperatures=[1.0]")
    reject(recipe.model_copy(update={"temperature": None}))
    drawn = {path.name for path in (place / "best").glob("*.png")}
    assert drawn == {"rounds.png", "temperatures-v0.png"}


@pytest.fixture(scope="module")
def reward_model(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model: the first round's, with a scalar head."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    write_reward_model(Path(models["v0"]), folder, 0, deviation=0.5)
    return folder


def test_the_command(
    place: Path, models: dict[str, str], reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.toml").write_text(
        f'samples = 3\nmax_tokens = 8\ncut = "keep"\nplots = false\n[models]\nv0 = "{models["v0"]}"\n'
        f'[prompts]\nfiles = ["prompts.jsonl"]\n[rewards]\nhelpful = "{reward_model}"\n[sweep]\ntemperatures = [1.0]\n'
    )
    code, out, error = typed(capsys, "reject", "mine.toml", "--json")
    assert code == 0, error
    assert "estimate: 9 answers, about " in error
    report = json.loads(out)
    assert report == json.loads((place / "best/report.json").read_text())
    samples = lines(place / "samples/samples.jsonl")
    messages = {each["prompt"]: each["messages"] for each in lines(place / "samples/prompts.jsonl")}
    with llama2.load(reward_model) as model:
        dialogs_of = [[*messages[s["prompt"]], {"role": "assistant", "content": s["answer"].strip()}] for s in samples]
        scores = score(model, dialogs_of, neutralise=True)
        with pytest.raises(RequestError, match="this is a reward model, which scores answers and writes none"):
            model.generate([1])
    assert report["rounds"]["v0"]["curve"][0]["maximum"] == pytest.approx((1 / (1 + np.exp(-scores))).mean())

    code, out, error = typed(capsys, "reject", "mine.toml")
    assert (code, error.count("estimate")) == (0, 0)
    assert lines(place / "samples/samples.jsonl") == samples
    assert out.splitlines()[-1] == "tune with them: llama2 sft -m MODEL best/best.jsonl"
    tuned = [dialog for _, dialog in dialogs.read([place / "best/best.jsonl"])]
    assert len(tuned) == report["best"]["dialogs"] == 3
    pairs = [*comparisons.read([place / "best/preferences.jsonl"], comparisons.PairReport())]
    assert len(pairs) == report["best"]["pairs"]

    code, _, error = typed(capsys, "reject", "mine.toml", f"rewards.helpful={models['v0']}")
    assert code == 1
    assert error.count("\n") == 1
    assert "is not a reward model" in error
    code, _, error = typed(capsys, "reject", "mine.toml", "rewards.helpful=")
    assert (code, error) == (1, "llama2: error: mine.toml: rewards: needs rewards.helpful, rewards.safety, or both\n")
