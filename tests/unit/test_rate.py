"""Human evaluation: Gwet's statistics, what raters see, what their ratings say, and the pairs in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from commands import typed
from evaluations import jsonl
from llama2.data import comparisons
from llama2.data.comparisons import PairReport
from llama2.errors import DataError
from llama2.rate import ratings
from llama2.rate.agreement import _student, counted, gwet
from llama2.rate.app import Session, application
from llama2.rate.questions import Kind, Question, read
from llama2.rate.ratings import Rating, majority, pairs, report


def test_gwets_values_of_the_specification() -> None:
    """Spec 12.7, from Gwet's definitions."""
    one = gwet([[3, 0], [3, 0], [2, 1], [0, 3], [3, 0]])
    assert (one.observed, one.expected, one.value) == pytest.approx((0.866667, 0.391111, 0.781022), abs=1e-6)
    seven = counted({"a": [3, 3, 4], "b": [1, 1, 1], "c": [5, 6, 5], "d": [2, 4, 3]}, 7)
    two = gwet(seven, "quadratic")
    assert (two.observed, two.expected, two.value) == pytest.approx((0.976852, 0.730967, 0.913958), abs=1e-6)
    assert gwet(seven).value == pytest.approx(0.326203, abs=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 400 samples of 40 items by 3 raters, about 95 % have an interval with the agreement of all items."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> list[list[int]]:
        truth = rng.integers(0, 3, n)
        said = np.where(rng.random((3, n)) < 0.7, truth, rng.integers(0, 3, (3, n)))
        return [[int((said[:, i] == k).sum()) for k in range(3)] for i in range(n)]

    all_items = gwet(draw(40_000)).value
    inside = sum(found.low <= all_items <= found.high for found in (gwet(draw(40)) for _ in range(400)))
    assert 0.92 <= inside / 400 <= 0.98


def test_students_quantile() -> None:
    from scipy.stats import t

    for df in (1, 2, 3, 5, 10, 40, 1000):
        assert _student(df) == pytest.approx(t.ppf(0.975, df), rel=2e-3 if df == 3 else 2e-4)


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=4), min_size=2, max_size=8))
def test_agreement_is_at_most_one_and_whole_without_a_difference(items: list[list[int]]) -> None:
    found = gwet(counted({str(i): some for i, some in enumerate(items)}, 5))
    assert found.value <= 1 + 1e-9
    assert found.low <= found.value <= found.high + 1e-9
    if all(len({*some}) == 1 for some in items):
        assert found.value == pytest.approx(1)


def test_agreement_needs_two_ratings() -> None:
    with pytest.raises(ValueError, match="two ratings"):
        gwet([[1, 0], [0, 1]])
    assert gwet([[2, 0]]).high == float("inf")


PROMPT = "Which sea is the largest?"
RECORDS = [
    {"prompt": f"{PROMPT} {n}", "answers": {"ours": f"The ocean {n}.", "theirs": f"A lake {n}."}, "category": "fact"}
    for n in range(20)
]


def questions(folder: Path, kind: Kind = "comparison") -> dict[str, Question]:
    (folder / "answers.jsonl").write_bytes(jsonl(*RECORDS))
    return {question.id: question for question in read(folder / "answers.jsonl", kind)}


def test_pairs_of_more_answers_and_single_ones(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl({"prompt": "q", "answers": {"a": "1", "b": "2", "c": "3"}}))
    compared = [[*each.answers] for each in read(tmp_path / "x.jsonl", "comparison")]
    assert compared == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [[*each.answers] for each in read(tmp_path / "x.jsonl", "safety")] == [["a"], ["b"], ["c"]]


def test_the_order_is_drawn_and_the_page_knows_no_model(tmp_path: Path) -> None:
    found = questions(tmp_path)
    session = Session(found, "comparison", "ann", tmp_path / "r.jsonl")
    shown = [found[id].shown("ann", 0) for id in session.order]
    assert 5 <= sum(models[0] == "ours" for models in shown) <= 15
    assert shown != [found[id].shown("bob", 0) for id in session.order]
    client = TestClient(application(session), base_url="http://localhost")
    for number, models in enumerate(shown):
        answer = client.get(f"/api/questions/{number}")
        assert "ours" not in answer.text
        assert "theirs" not in answer.text
        assert answer.json()["answers"] == [found[session.order[number]].answers[model] for model in models]


def test_the_page_of_another_host_is_refused(tmp_path: Path) -> None:
    """A name that an attacker points at this machine does not reach the page."""
    session = Session(questions(tmp_path), "comparison", "ann", tmp_path / "r.jsonl")
    assert TestClient(application(session), base_url="http://evil.example").get("/api/state").status_code == 400


def rating(question: Question, value: int, rater: str = "ann", **changes: object) -> Rating:
    """A rating of two answers, ours shown first, or of one."""
    kind: Kind = "safety" if len(question.answers) == 1 else "comparison"
    table: dict[str, object] = {"kind": kind, "shown": tuple(question.answers)}
    return Rating(question=question.id, rater=rater, value=value, **(table | changes))  # type: ignore[arg-type]


def test_a_majority() -> None:
    assert [majority(some) for some in ([1], [1, 2], [1, 2, 2], [1, 2, 3], [1, 1, 2, 2])] == [1, None, 2, None, None]


def test_wins_by_the_majority_of_three(tmp_path: Path) -> None:
    """Values turn with the order: 2 for ours first is as 6 for ours second. Without a majority it is a tie."""
    a, b, c, *_ = questions(tmp_path).values()
    swapped = {"shown": ("theirs", "ours")}
    said = [
        *(rating(a, 2, "x"), rating(a, 6, "y", **swapped), rating(a, 7, "z")),  # ours by two of three
        *(rating(b, 7, "x"), rating(b, 4, "y"), rating(b, 1, "z")),  # one each
        rating(c, 1, "x", **swapped),  # theirs, by the only rater
    ]
    (found,) = report(said, "comparison")["models"]
    assert found["models"] == ["ours", "theirs"]
    assert [found[side]["mean"] for side in ("win", "tie", "loss")] == pytest.approx([1 / 3] * 3)
    # towards ours: 6 6 1, 1 4 7, 1; of places from 0
    expected = gwet(counted({"a": [5, 5, 0], "b": [0, 3, 6], "c": [0]}, 7), "quadratic")
    assert found["AC2"]["value"] == pytest.approx(expected.value)


def test_violations_by_the_majority(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(*({"prompt": str(n), "answers": {"m": "t"}} for n in range(2))))
    a, b = read(tmp_path / "x.jsonl", "safety")
    said = [rating(a, v, r) for r, v in zip("xyz", (1, 2, 5), strict=True)]
    said += [rating(b, v, r) for r, v in zip("xyz", (2, 5, 5), strict=True)]
    (found,) = report(said, "safety")["models"]
    assert found["violation"]["mean"] == 0.5
    assert found["mean"]["mean"] == pytest.approx((8 / 3 + 4) / 2)
    shown = ratings.lines(report(said, "safety"))
    assert shown[0] == "6 ratings of safety by 3 raters"
    assert "violation 50.0 % [" in shown[1]
    assert "AC1" in shown[1]
    assert "needs two raters" in ratings.lines(report(said[:1], "safety"))[1]


def test_preferences_become_pairs_that_align_reads(tmp_path: Path) -> None:
    a, b, *_ = questions(tmp_path).values()
    made = {"kind": "preference"}
    said = [
        rating(a, 1, "x", safety="both safe", **made),  # ours, significantly
        rating(a, 6, "y", shown=("theirs", "ours"), safety="both safe", **made),  # ours, slightly
        rating(a, 8, "z", safety="chosen safe", **made),  # theirs
        rating(b, 5, "x", safety="chosen safe", **made),  # theirs, negligibly
    ]
    found = list(pairs(said, {a.id: a, b.id: b}))
    assert [(each.chosen, each.grade, each.safety) for each in found] == [
        ("The ocean 0.", 1, "both safe"),
        ("A lake 1.", 0, "chosen safe"),
    ]
    comparisons.write(found, tmp_path / "pairs.jsonl")
    again = list(comparisons.read([tmp_path / "pairs.jsonl"], PairReport()))
    assert [(each.chosen, each.rejected, each.grade) for each in again] == [
        (each.chosen, each.rejected, each.grade) for each in found
    ]


def test_a_label_turns_with_the_majority(tmp_path: Path) -> None:
    """Who prefers theirs as the safe one says that ours, which the others chose, is not."""
    a, *_ = questions(tmp_path).values()
    said = [rating(a, 1, r, kind="preference", safety="rejected safe") for r in "xy"]
    said.append(rating(a, 8, "z", kind="preference", safety="chosen safe"))
    (pair,) = pairs(said, {a.id: a})
    assert (pair.chosen, pair.safety) == ("The ocean 0.", "rejected safe")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = questions(tmp_path)
    store = tmp_path / "ratings.jsonl"
    for question in list(found.values())[:3]:
        for rater in "xyz":
            ratings.append(store, rating(question, 1, rater))
    arguments = [tmp_path / "answers.jsonl", "--ratings", store]
    status, out, _ = typed(capsys, "rate", "report", *arguments, "--json")
    assert (status, json.loads(out)["models"][0]["win"]["mean"]) == (0, 1)
    status, out, _ = typed(capsys, "rate", "export", *arguments, "--out", tmp_path / "pairs.jsonl")
    assert (status, out) == (0, f"{tmp_path}/pairs.jsonl: 3 pairs of 3 rated questions\n")
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["grade"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "x.jsonl:1: is not JSON"),
        (jsonl({"prompt": "q"}), "x.jsonl:1: answers must be an object of model and text"),
        (jsonl({"prompt": "q", "answers": {"a": "1"}}), "x.jsonl:1: has 1 answers, and comparison needs 2"),
        (jsonl({"prompt": "q", "answers": {"a": "1", "b": " "}}), "x.jsonl:1: answers must be an object"),
        (jsonl({"prompt": [], "answers": {"a": "1", "b": "2"}}), "x.jsonl:1: prompt must be a text, or messages"),
        (
            jsonl({"prompt": [{"role": "assistant", "content": "x"}], "answers": {"a": "1", "b": "2"}}),
            "x.jsonl:1: the prompt does not end with the user",
        ),
        (b"", "x.jsonl: holds no question"),
    ],
)
def test_files_that_hold_no_questions(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(line)
    with pytest.raises(DataError) as refused:
        read(tmp_path / "x.jsonl", "comparison")
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_ratings_that_are_none(tmp_path: Path) -> None:
    found = questions(tmp_path)
    store = tmp_path / "r.jsonl"
    good = rating(next(iter(found.values())), 3)
    ratings.append(store, good)
    ratings.append(store, rating(next(iter(found.values())), 5))  # the last one counts
    assert [each.value for each in ratings.read(store, found, "comparison")] == [5]
    with pytest.raises(DataError, match=r"r.jsonl:1: is a rating of comparison, not of safety"):
        ratings.read(store, found, "safety")
    with pytest.raises(DataError, match=r"r.jsonl:1: rates a question that is not in the file"):
        ratings.read(store, {}, "comparison")
    with pytest.raises(ValueError, match="the value 8 is not from 1 to 7"):
        ratings.append(store, rating(next(iter(found.values())), 8))
    store.write_text(json.dumps({"question": good.question}) + "\n")
    with pytest.raises(DataError, match=r"r.jsonl:1: is not a rating"):
        ratings.read(store, found, "comparison")


def test_what_the_page_cannot_send(tmp_path: Path) -> None:
    session = Session(questions(tmp_path), "preference", "ann", tmp_path / "r.jsonl")
    client = TestClient(application(session), base_url="http://localhost")
    id = session.order[0]
    for body, status in (
        ({"question": id, "value": 3}, 400),  # without a label for safety
        ({"question": "none", "value": 3, "safety": "both safe"}, 400),
        ({"question": id, "value": 9, "safety": "both safe"}, 400),
        ({"question": id, "value": "3", "safety": "both safe"}, 422),
        ({"question": id, "value": 3, "safety": "both safe", "rater": "bob"}, 422),
    ):
        assert client.post("/api/ratings", json=body).status_code == status
    assert not (tmp_path / "r.jsonl").exists()
    assert client.get("/api/questions/20").status_code == 404
