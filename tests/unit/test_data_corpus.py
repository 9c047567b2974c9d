"""Documents among each other: duplicates, benchmark samples, weights, and fast encoding."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2 import recipe as recipes
from llama2.data import compressed, contamination, dedup
from llama2.data.build import build
from llama2.data.overlap import Coverage, Matcher, SharedRun, subsets
from llama2.data.settings import Benchmark, BuildRecipe, Decontamination
from llama2.data.shards import Shards
from llama2.data.tokens import epochs
from llama2.data.vocabulary import encoder
from llama2.data.words import Words
from llama2.errors import DataError
from llama2.text import tokenizer, trainer

pytestmark = pytest.mark.usefixtures("quick_logs")


def ids(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def sample(length: int, first: int = 0) -> Any:
    return np.arange(first, first + length, dtype=np.int64)


def test_ten_tokens_are_a_run_and_nine_are_not() -> None:
    for shared, found in ((10, [SharedRun(0, 5, 2, 10)]), (9, [])):
        document = np.concatenate([ids(900, 901), sample(shared, 5), ids(902)])
        assert list(Matcher([sample(30)]).runs(document)) == found
    eleven = np.concatenate([ids(900), sample(11, 5), ids(902)])
    assert list(Matcher([sample(30)], length=11).runs(eleven)) == [SharedRun(0, 5, 1, 11)]
    assert not list(Matcher([sample(30)], length=12).runs(eleven))


def changed(document: Any, *places: int) -> Any:
    copy = document.copy()
    copy[list(places)] += 1000
    return copy


@pytest.mark.parametrize(
    ("places", "length"),
    [
        ((), 30),
        ((10, 15, 20, 25), 30),  # four may differ
        ((10, 15, 20, 25, 28), 28),  # the fifth ends the run
        ((10, 11, 12, 13, 14), 10),  # nothing equal follows within the budget
        ((29,), 29),  # none at the end
        ((28, 29), 28),
    ],
)
def test_places_that_may_differ(places: tuple[int, ...], length: int) -> None:
    assert next(Matcher([sample(30)]).runs(changed(sample(30), *places))) == SharedRun(0, 0, 0, length)


def test_no_difference_within_the_first_ten() -> None:
    assert list(Matcher([sample(19)]).runs(changed(sample(19), 9))) == []
    assert list(Matcher([sample(20)]).runs(changed(sample(20), 9))) == [SharedRun(0, 10, 10, 10)]


@given(st.data())
def test_runs_are_those_of_the_definition(data: st.DataObject) -> None:
    token = st.integers(0, 2)
    first = np.array(data.draw(st.lists(token, max_size=25)), np.int64)
    document = np.array(data.draw(st.lists(token, max_size=25)), np.int64)
    if len(first) > 12 and data.draw(st.booleans()):
        document = np.concatenate([document[:5], first[:12], document[5:]])
    length, skips = data.draw(st.integers(3, 12)), data.draw(st.integers(0, 2))
    expected = np.zeros(len(first), bool)
    seed = min(10, length)
    for start in range(len(first)):
        for at in range(len(document)):
            for end in range(length, min(len(first) - start, len(document) - at) + 1):
                differs = first[start : start + end] != document[at : at + end]
                if not differs[:seed].any() and not differs[-1] and differs.sum() <= skips:
                    expected[start : start + end] = True
    coverage = Coverage([first])
    for run in Matcher([first], length=length, skips=skips).runs(document):
        coverage.add(run)
    assert coverage.masks[0].tolist() == expected.tolist()


def test_subsets_overlap_as_in_the_paper(tmp_path: Path) -> None:
    coverage = Coverage([sample(10), sample(10), sample(10), sample(3)])
    coverage.add(SharedRun(1, 0, 0, 2))
    coverage.add(SharedRun(2, 1, 0, 8))
    coverage.save(tmp_path / "a.npy")
    again = Coverage([sample(10), sample(10), sample(10), sample(3)])
    again.add(SharedRun(2, 0, 0, 1))
    again.load(tmp_path / "a.npy")
    assert again.shares().tolist() == [0.0, 0.2, 0.9, 0.0]
    assert {name: mask.tolist() for name, mask in subsets(coverage.shares()).items()} == {
        "clean": [True, False, False, True],
        "not clean": [False, True, True, False],
        "not dirty": [True, True, False, True],
        "dirty": [False, False, True, False],
    }


def test_runs_are_cut_out_with_a_margin() -> None:
    benchmark, settings = [sample(20, 500)], Decontamination(margin=5)
    document = np.concatenate([sample(30), benchmark[0], sample(5, 60), sample(4, 90)])
    runs = list(Matcher(benchmark).runs(document))
    assert [part.tolist() for part in contamination.cut(document, runs, benchmark, settings)] == [list(range(25))]
    longer = np.concatenate([document, sample(9, 200)])
    parts = contamination.cut(longer, list(Matcher(benchmark).runs(longer)), benchmark, settings)
    assert [len(part) for part in parts] == [25, 13]
    long = [sample(60, 500)]  # ten of sixty tokens leave it clean
    assert len(contamination.cut(document[:40], list(Matcher(long).runs(document[:40])), long, settings)) == 1


def test_benchmark_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "Why?", "choices": ["x", "y"], "gold": 1}\n')
    (tmp_path / "b.csv").write_text('"So, what?",A,B\n')
    (tmp_path / "c.json").write_text('{"canary": "-", "examples": [{"input": "in", "target": "t"}]}')
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")

    def samples(name: str, *fields: str) -> list[str]:
        settings = Decontamination.model_validate({"benchmarks": {"b": {"files": [name], "fields": fields}}})
        return contamination.read_samples(str(tmp_path), "b", settings.benchmarks["b"])

    assert samples("a.jsonl") == ["Why?\nx\ny"]
    assert samples("a.jsonl", "q") == ["Why?"]
    assert samples("b.csv", "0", "2") == ["So, what?\nB"]
    assert samples("c.json", "input") == ["in"]
    assert samples("d.txt") == ["one", "two"]
    with pytest.raises(DataError, match=r"decontamination.benchmarks.b: no file matches none"):
        samples("none")
    with pytest.raises(DataError, match=r"a.jsonl: does not have the fields \['x'\]"):
        samples("a.jsonl", "x")


def test_hostile_benchmark_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE", 1 << 16)
    monkeypatch.setattr(contamination, "_LONGEST", 1 << 20)
    files = {
        "deep.json": (b"[" * 100_000, "does not have the fields"),
        "none.jsonl": (b"5\n", "does not have the fields"),
        "bomb.txt.gz": (gzip.compress(bytes(1 << 25)), "has more than 1 MB"),
        "cut.txt.gz": (gzip.compress(b"a line\n")[:-9], "cannot be read"),
        "long.txt": (bytes((1 << 20) + 1), "has more than 1 MB, which no benchmark has"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: {message}") as caught:
            contamination.read_samples(str(tmp_path), "b", Benchmark(files=[name]))
        assert "\n" not in str(caught.value)


def test_minhash_estimates_jaccard_similarity() -> None:
    rng = np.random.default_rng(0)
    shared, own, other = (rng.integers(0, 1 << 64, n, np.uint64) for n in (600, 200, 200))
    first, second = (dedup.minhash(np.concatenate([shared, rest]), 4096) for rest in (own, other))
    assert (first == second).mean() == pytest.approx(600 / 1000, abs=4 * (0.6 * 0.4 / 4096) ** 0.5)


def story(seed: int, words: int = 120) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 8))) for _ in range(words)]


@pytest.mark.usefixtures("no_plots")
def test_duplicates_of_all_tasks_leave_one(tmp_path: Path) -> None:
    near = story(1)
    near[60] = "different"
    texts = [story(0), story(1), story(2), story(1), near, story(3), story(2)]
    for number, words in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    settings = {"output": str(tmp_path / "out"), "dir": str(tmp_path), "sources": {"s": {"files": ["*.txt"]}}}
    settings |= {"tokenizer": {"vocabulary": 300}, "validation": 0, "executor": {"tasks": 3, "workers": 1}}
    manifest = build(BuildRecipe.model_validate(settings))
    assert manifest
    assert Shards.open(tmp_path / "out", "train").documents == 4
    card = (tmp_path / "out/card/README.md").read_text()
    assert "| s | exact duplicate | 2 |" in card
    assert "| s | near duplicate | 1 |" in card
    for dedup_, left in (({"near": False}, 5), ({"near": False, "exact": False}, 7), ({"exact": False}, 4)):
        build(BuildRecipe.model_validate(settings | {"dedup": dedup_}), force=True)
        assert Shards.open(tmp_path / "out", "train").documents == left


def recipe(**weights: float | None) -> BuildRecipe:
    sources = {name: {"files": ["*"], "weight": weight} for name, weight in weights.items()}
    return BuildRecipe.model_validate({"output": "o", "sources": sources, "tokenizer": {"vocabulary": 300}})


def test_weights_become_epochs() -> None:
    assert epochs(recipe(a=None, b=None), {"a": 10, "b": 90}) == {"a": 1, "b": 1}
    # Shares of a half each: the smaller source as often as makes it as large as the larger one.
    assert epochs(recipe(a=1, b=1), {"a": 30, "b": 90}) == pytest.approx({"a": 3, "b": 1})
    assert epochs(recipe(a=3, b=1), {"a": 30, "b": 20}) == pytest.approx({"a": 2, "b": 1})
    with pytest.raises(DataError, match=r"sources.a.weight: needs its documents 9.00 times, and max_epochs is 4"):
        epochs(recipe(a=1, b=1), {"a": 10, "b": 90})
    with pytest.raises(DataError, match=r"sources.b: none of its documents is left"):
        epochs(recipe(a=1, b=1), {"a": 10, "b": 0})


@pytest.mark.usefixtures("no_plots")
def test_a_source_is_repeated_for_its_weight(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{'ab'[number % 2]}{number}.txt").write_text(" ".join(story(number)))
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "dir": str(tmp_path), "validation": 0}
    settings["sources"] = {"a": {"files": ["a*.txt"], "weight": 1}, "b": {"files": ["b*.txt"], "weight": 2.5}}
    settings |= {"tokenizer": {"vocabulary": 300}, "executor": {"tasks": 2, "workers": 1}}
    manifest = build(BuildRecipe.model_validate(settings))
    assert manifest
    assert manifest.sources["a"]["train"]["documents"] == 10
    assert 20 < manifest.sources["b"]["train"]["documents"] < 30
    built = Shards.open(tmp_path / "out", "train")
    starts = built.sources
    assert [name for _, name in starts] == ["a", "b"] * 2  # of two tasks
    found = {"a": 0, "b": 0}
    for (start, name), end in zip(starts, [*(start for start, _ in starts[1:]), built.tokens], strict=True):
        found[name] += end - start
    assert found == {name: manifest.sources[name]["train"]["tokens"] for name in found}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("v") / "tokenizer.model"
    path.write_bytes(trainer.train([Path(recipes.__file__).read_text(), Path(__file__).read_text()], 600).model)
    return tokenizer.from_sentencepiece(path)


@given(text=st.one_of(st.text(), st.text(st.sampled_from("the a\n  selfdef.=é日▁"), max_size=80)))
def test_words_are_encoded_as_the_library_does(text: str, vocabulary: tokenizer.Tokenizer) -> None:
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    encode = encoder(vocabulary)
    assert encode(text) == encode(text) == vocabulary.encode(text)


def test_near_duplicates_need_a_few_words() -> None:
    assert len(Words("one two three four").grams(5)) == 0


ENGLISH = [
    "She told her mother about the weather, and then she went home to sleep until the morning came.",
    "He said that the French teacher was a woman with a good voice, which is what people wanted to hear.",
    "We were walking along the river with our friends when it began to rain on all of the houses.",
    "The weather was fine in the valley, and the roads were open, so that trade with the coast began again.",
]


def shout(lines: Any) -> list[float]:
    """A scorer that knows one word."""
    return [float("river" in line or "valley" in line) for line in lines]


def test_the_card_has_the_papers_tables(tmp_path: Path) -> None:
    for number, text in enumerate(ENGLISH):
        (tmp_path / f"{number}.txt").write_text(text + "\nMore of the same follows here." * (number == 2))
    (tmp_path / "de.txt").write_text("Das Wetter war schön, und wir gingen am Fluss entlang, bis es dunkel wurde.")
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "dir": str(tmp_path), "validation": 0}
    settings |= {"sources": {"s": {"files": ["*.txt"], "licence": "CC0 | mine"}}, "card": {"sample": 1}}
    settings |= {"tokenizer": {"vocabulary": 300}, "executor": {"tasks": 2, "workers": 1}}
    build(BuildRecipe.model_validate(settings), toxicity=shout)
    card = json.loads((tmp_path / "out/card/card.json").read_bytes())
    assert card["languages"] == {"en": 0.8, "de": 0.2}
    assert card["english_documents"] == 4
    assert card["pronouns"] == {
        "she": 0.25,
        "he": 0.25,
        "unspecified": 0,
        "first person": 0.25,
        "second person": 0,
        "third person": 0.75,  # she, he, it
    }
    assert card["identities"]["nationality"] == {"share": 0.25, "terms": {"french": 1.0}}
    assert card["identities"]["religion"] == {"share": 0, "terms": {}}
    # One document has the word in its only line, one in one of its two lines.
    assert card["toxicity"] == {"scored": 4, "at_least_half": 0.5, "histogram": [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]}
    page = (tmp_path / "out/card/README.md").read_text()
    assert "| s | CC0 \\| mine | 5 | 5 |" in page
    assert "| she | 25.00% |" in page
    assert (tmp_path / "out/card/steps.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("no_plots")
def test_samples_of_a_benchmark_leave_the_corpus(tmp_path: Path) -> None:
    planted, other = story(7, 60), story(8, 60)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": " ".join(words)}) + "\n" for words in (planted, other)))
    (tmp_path / "a.txt").write_text(" ".join(story(1, 200) + planted + story(2, 200)))
    (tmp_path / "b.txt").write_text(" ".join(story(3, 200)))
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "dir": str(tmp_path), "validation": 0}
    settings |= {"sources": {"s": {"files": ["*.txt"]}}, "executor": {"tasks": 2, "workers": 1}}
    settings |= {"tokenizer": {"vocabulary": 300}, "decontamination": {"benchmarks": {"q": {"files": ["q.jsonl"]}}}}
    build(BuildRecipe.model_validate(settings))
    shards = Shards.open(tmp_path / "out", "train")
    assert shards.documents == 3  # one in two parts
    text = shards.load_tokenizer().decode(shards.read(0, shards.tokens).tolist())
    assert " ".join(story(3, 200)) in text
    assert not any(word in text for word in planted if len(word) > 6)
    found = json.loads((tmp_path / "out/card/card.json").read_bytes())["contamination"]
    assert found["benchmarks"]["q"]["before"] == {"clean": 1, "not clean": 1, "not dirty": 1, "dirty": 1}
    assert found["benchmarks"]["q"]["after"] == {"clean": 2, "not clean": 0, "not dirty": 2, "dirty": 0}
    assert found["cut"]["documents"] == 1


@pytest.mark.usefixtures("no_plots")
def test_a_tokenizer_is_trained_on_the_training_split(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(" ".join(story(number, 120)))
    (tmp_path / "8.txt").write_text((tmp_path / "0.txt").read_text())
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "dir": str(tmp_path), "validation": 0.5}
    settings |= {"sources": {"s": {"files": ["*.txt"]}}, "executor": {"tasks": 1, "workers": 1}}
    build(BuildRecipe.model_validate(settings | {"tokenizer": {"vocabulary": 400}}))
    train = Shards.open(tmp_path / "out", "train")
    assert 0 < train.documents < 8
    words, ids = train.load_tokenizer(), train.read(0, train.tokens).tolist()
    ends = [place for place, token in enumerate(ids) if token == words.eos_id]
    texts = [words.decode(ids[start + 1 : end]) for start, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)]
    assert len(texts) == train.documents
    assert trainer.train(texts, 400, exact=False).model == (tmp_path / "out/tokenizer.model").read_bytes()


def stop(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRecipe:
    """The recipe of a build that was stopped when it began to mix."""
    for number, text in enumerate(ENGLISH):
        (tmp_path / f"{number}.txt").write_text(text)
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "dir": str(tmp_path)}
    settings |= {"sources": {"s": {"files": ["*.txt"]}}, "executor": {"tasks": 2, "workers": 1}}
    asked = BuildRecipe.model_validate(settings | {"tokenizer": {"vocabulary": 300}, "validation": 0})
    with monkeypatch.context() as patch:
        patch.setattr("llama2.data.tokens.Mix.documents", stop)
        with pytest.raises(KeyboardInterrupt):
            build(asked)
    with pytest.raises(DataError, match="is not a corpus"):
        Shards.open(tmp_path / "out", "train")
    return asked


def expect_the_same(asked: BuildRecipe, again: Path) -> None:
    """What was built is, to the byte, what the recipe gives from nothing."""
    build(BuildRecipe.model_validate({**asked.model_dump(), "output": str(again)}))
    files = ["manifest.json", "train-00000.tokens", "train-00001.tokens", "card/card.json"]
    assert all((asked.output / name).read_bytes() == (again / name).read_bytes() for name in files)


@pytest.mark.usefixtures("no_plots")
def test_a_build_that_was_stopped_goes_on(
    stopped: BuildRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llama2.data.read.Read.documents", stop)  # what was read is not read again
        build(stopped)
    assert Shards.open(tmp_path / "out", "train").documents == 4
    expect_the_same(stopped, tmp_path / "again")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("what", ["a setting", "a text"])
def test_a_build_that_was_stopped_begins_anew_when(what: str, stopped: BuildRecipe, tmp_path: Path) -> None:
    """… has changed: what earlier stages left was made of something else."""
    asked = stopped
    if what == "a text":
        (tmp_path / "0.txt").write_text(ENGLISH[0] + " And that was not all of it.")
    else:
        sources = {"s": {"files": ["*.txt"], "separator": ", "}}
        asked = BuildRecipe.model_validate({**stopped.model_dump(), "sources": sources})
    build(asked)
    expect_the_same(asked, tmp_path / "again")
