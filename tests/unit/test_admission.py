"""The door, by arithmetic: what is predicted, who is refused, and when they may come back."""

from __future__ import annotations

import pytest

from llama2.serve.admission import Demand, Door
from llama2.serve.errors import Refusal


def door(*, max_queue: int = 100, max_wait: float = 10.0, places: int = 4, rate: float | None = 100.0) -> Door:
    made = Door(max_queue, max_wait, places)
    if rate is not None:
        made.prefill.add(rate, 1.0)
    return made


def refusal(made: Door, tokens: int, choices: int, now: float) -> float:
    """Seconds after which the refused may come back."""
    with pytest.raises(Refusal) as refused:
        made.enter(tokens, choices, now)
    headers = refused.value.headers or {}
    seconds = int(headers["Retry-After-Ms"]) / 1000
    assert refused.value.status_code == 429
    assert 0 <= int(headers["Retry-After"]) - seconds < 1 or seconds < 1
    return seconds


def test_nothing_is_refused_that_was_not_measured() -> None:
    made = door(rate=None)
    for i in range(50):
        made.enter(10**6, 1, float(i))


def test_work_ahead_divided_by_the_rate() -> None:
    made = door()
    assert made.seconds(300, 1, 0.0) == 3.0
    made.enter(300, 1, 0.0)
    made.enter(200, 1, 0.0)
    assert made.seconds(300, 1, 0.0) == (300 + 200 + 300) / 100
    assert made.seconds(300, 1, 2.0) == (300 + 200 - 2 * 100 + 300) / 100  # of which two seconds are done
    assert made.seconds(300, 1, 60.0) == 3.0  # late, but never less than its own


def test_who_would_wait_too_long_is_told_when_six_tenths_of_the_limit_are_left() -> None:
    made = door()
    made.enter(900, 1, 0.0)
    made.enter(100, 1, 0.0)  # exactly the limit of 10 s
    assert refusal(made, 100, 1, 0.0) == 5.0  # of its 11 s then, 6 are left: predictions err
    assert refusal(made, 100, 1, 0.0) == 6.0  # a second one comes after the first
    assert refusal(made, 100, 1, 0.5) == 6.5
    made.enter(1, 1, 20.0)


def test_first_tokens_tell_the_rate() -> None:
    made = door(rate=None)
    a, b = made.enter(100, 1, 0.0), made.enter(300, 1, 1.0)
    made.began([a], 2.0)
    assert made.prefill.value == 100 / 2
    made.began([b], 4.0)  # since the one before
    assert made.prefill.value == pytest.approx((0.9 * 100 + 300) / (0.9 * 2 + 2))
    c = made.enter(50, 1, 100.0)
    made.began([c], 101.0)  # since it came: before, nothing was to be done
    assert made.prefill.value == pytest.approx((0.81 * 100 + 0.9 * 300 + 50) / (0.81 * 2 + 0.9 * 2 + 1))
    assert made.waiting == []


def test_places_that_become_free() -> None:
    made = door(places=2)
    running = [made.enter(10, 1, 0.0) for _ in range(2)]
    made.began(running, 1.0)
    queued = [made.enter(10, 1, 1.0) for _ in range(2)]
    assert all(demand.queued for demand in queued)
    # nothing has ended yet: after 4 s, an answer takes at least 4 s, so 2 places make one every 2 s
    assert made.seconds(100, 1, 5.0) == pytest.approx(3 * 2 + 100 / made.prefill.value)
    for demand in running:  # both in one wave, 8 s after their first tokens: one every 4 s
        made.ended(demand, 1, 9.0)
    made.began(queued, 9.0)
    assert made.prefill.value == pytest.approx((0.9 * 100 + 20) / (0.9 + 1))  # who queued says nothing of prefill
    assert made.seconds(100, 1, 9.0) == pytest.approx(4 + 100 / made.prefill.value)
    assert made.seconds(100, 2, 9.0) == pytest.approx(8 + 100 / made.prefill.value)


def test_predictions_learn_how_they_err() -> None:
    made = door(places=1)
    first = made.enter(10, 1, 0.0)
    made.began([first], 1.0)
    made.ended(first, 1, 5.0)  # an answer takes 4 s
    running = made.enter(10, 1, 5.0)
    made.began([running], 6.0)
    queued = made.enter(10, 1, 6.0)
    assert queued.predicted == pytest.approx(4 + 10 / made.prefill.value)
    before = made.seconds(100, 1, 6.0)
    made.ended(running, 1, 6.0 + 1.5 * queued.predicted)
    made.began([queued], 6.0 + 1.5 * queued.predicted)
    assert made.waited.value == pytest.approx(1.5)
    assert made.seconds(100, 1, 6.0) > before
    made.waited.add(100, 1)
    assert made.seconds(100, 1, 6.0) == made._work(100, 1, 6.0) * 2  # but not without end


def test_a_full_queue() -> None:
    made = door(max_queue=3, max_wait=1e9)
    for _ in range(3):
        made.enter(50, 1, 0.0)
    assert refusal(made, 50, 1, 0.0) == 0.5  # the next one's prefill
    made.enter(50, 1, 0.0, refuse=False)


def test_who_ends_before_the_first_token_waits_no_more() -> None:
    made = door()
    demand = made.enter(500, 3, 0.0)
    made.ended(demand, 1, 0.0)
    assert made.seconds(100, 1, 0.0) == 6.0
    made.ended(demand, 2, 0.0)
    assert made.seconds(100, 1, 0.0) == 1.0
    assert (made.running, made.waiting) == (0, [])


def test_a_demand_is_open_until_it_is_told() -> None:
    assert Demand(1, 1, 0.0).began is None


def test_a_promise_is_kept_and_not_given_to_who_comes_later() -> None:
    made = door()
    made.enter(900, 1, 0.0)
    made.enter(100, 1, 0.0)
    with pytest.raises(Refusal):
        made.enter(100, 1, 0.0, key=7)  # may come back after five seconds
    assert refusal(made, 100, 1, 1.0) == 5.0  # who would wait for 10 s, which is the limit, but another was promised
    made.enter(100, 1, 5.0, key=7)
    made.enter(300, 1, 6.0)  # nobody is to come back any more
    with pytest.raises(Refusal):
        made.enter(800, 1, 6.0, key=8)
    due = made._promised
    assert refusal(made, 600, 1, due + 2.0) > 0  # 6 s are more than half of the limit
    made.enter(600, 1, due + 2.1)  # the promised one did not come
