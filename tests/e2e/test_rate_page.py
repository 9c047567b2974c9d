"""Twenty ratings on the page in Chromium, by keys alone; their records, and agreement computed from them by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from evaluations import jsonl
from llama2.rate import ratings
from llama2.rate.app import Session, application
from llama2.rate.questions import Kind, Question, read
from llama2.rate.ratings import report


def questions(folder: Path, kind: Kind) -> dict[str, Question]:
    """Twenty questions, of which the longer answer is always ours."""
    answers = [{"ours": f"{n} miles, I think.", "theirs": f"{n}."} for n in range(20)]
    rows = [{"prompt": f"How far is it, {n}?", "answers": both} for n, both in enumerate(answers)]
    (folder / "answers.jsonl").write_bytes(jsonl(*rows))
    return {question.id: question for question in read(folder / "answers.jsonl", kind)}


@contextmanager
def opened(session: Session, browser: Browser) -> Iterator[Page]:
    """The page of a rater's session, whose console has to stay empty."""
    server = uvicorn.Server(uvicorn.Config(application(session), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
            page = context.new_page()
            said: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            yield page
            assert said == []
    finally:
        server.should_exit = True
        thread.join()


def rate_all(page: Page, first: str, second: str) -> None:
    """For each of twenty questions press one key where the first answer is the longer, else another; then Enter."""
    for number in range(20):
        page.get_by_text(f"Question {number + 1} of 20,").wait_for()
        a, b = map(len, page.locator(".answer .text").all_inner_texts())
        page.keyboard.press(first if a > b else second)
        page.keyboard.press("Enter")
    page.get_by_text("All questions are rated.").wait_for()


def test_twenty_ratings_by_keys_alone(browser: Browser, tmp_path: Path) -> None:
    """Two raters prefer the longer answer by different degrees: 6 or 7 towards ours, whatever the order."""
    found = questions(tmp_path, "comparison")
    store = tmp_path / "ratings.jsonl"
    for rater, first, second in (("ann", "2", "6"), ("bob", "1", "7")):
        with opened(Session(found, "comparison", rater, store), browser) as page:
            rate_all(page, first, second)
    records = [json.loads(line) for line in store.read_text().splitlines()]
    assert len(records) == 40
    for record in records:
        towards = record["value"] if record["shown"][1] == "ours" else 8 - record["value"]
        assert towards == {"ann": 6, "bob": 7}[record["rater"]]
    assert {tuple(record["shown"]) for record in records} == {("ours", "theirs"), ("theirs", "ours")}
    (summary,) = report(ratings.read(store, found, "comparison"), "comparison")["models"]
    assert summary["win"]["mean"] == 1
    # all pairs are 6 and 7: quadratic weights agree by 1 - 1/36; by chance 2 categories have a half each
    weights = 49 - 2 * sum((7 - d) * d * d for d in range(1, 7)) / 36
    expected = weights / (7 * 6) * (2 * 0.25)
    assert summary["AC2"]["value"] == pytest.approx((1 - 1 / 36 - expected) / (1 - expected))
    assert summary["AC1"]["value"] == pytest.approx((0 - 1 / 12) / (1 - 1 / 12))


def test_preferences_with_labels_go_back_and_on(browser: Browser, tmp_path: Path) -> None:
    """Nothing is saved without a choice on each scale; Backspace returns to a rating, which may be changed."""
    found = questions(tmp_path, "preference")
    store = tmp_path / "ratings.jsonl"
    with opened(Session(found, "preference", "ann", store), browser) as page:
        page.get_by_text("Question 1 of 20").wait_for()
        page.keyboard.press("8")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("Choose first: Is what you prefer safe?").wait_for()
        page.keyboard.press("w")
        page.keyboard.press("Enter")
        page.get_by_text("Question 2 of 20, 1 rated").wait_for()
        page.keyboard.press("Backspace")
        page.get_by_text("Question 1 of 20").wait_for()
        assert page.get_by_role("radio", name="B, significantly").is_checked()
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.get_by_text("Question 2 of 20").wait_for()
    values = [json.loads(line)["value"] for line in store.read_text().splitlines()]
    assert values == [8, 1]
    with opened(Session(found, "preference", "ann", store), browser) as page:  # which goes on
        page.get_by_text("Question 2 of 20, 1 rated").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["comparison", "preference", "safety"])
def test_axe_finds_nothing(kind: Kind, scheme: str, browser: Browser, tmp_path: Path) -> None:
    session = Session(questions(tmp_path, kind), kind, "ann", tmp_path / "r.jsonl")
    with opened(session, browser) as page:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.get_by_text("Question 1 of").wait_for()
        for width in (1200, 360):
            page.set_viewport_size({"width": width, "height": 800})
            found = Axe().run(page).response["violations"]
            assert found == [], [each["id"] for each in found]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_text_is_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>"
    rows = [{"prompt": hostile, "answers": {"ours": hostile, "theirs": "b"}}]
    (tmp_path / "answers.jsonl").write_bytes(jsonl(*rows))
    found = {question.id: question for question in read(tmp_path / "answers.jsonl", "comparison")}
    with opened(Session(found, "comparison", "ann", tmp_path / "r.jsonl"), browser) as page:
        page.get_by_text("Question 1 of 1").wait_for()
        assert page.locator("#prompt .text").inner_text() == hostile
        assert page.title() == "Rate answers"
