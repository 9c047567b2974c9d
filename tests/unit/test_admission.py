"""Admission by arithmetic: predicted waits, refusals, and the times of reservations."""

from __future__ import annotations

import pytest

from llama2.serve import admission
from llama2.serve.admission import AdmissionController, PendingRequest
from llama2.serve.errors import Refusal


@pytest.fixture(autouse=True)
def no_prior(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are not multiplied until waits are measured, except in tests of the prior."""
    if "prior" not in request.node.name:
        monkeypatch.setattr(admission, "_PRIOR_ERROR", 1.0)


def controller_of(
    *, max_queue: int = 100, max_wait: float = 10.0, slots: int = 4, rate: float | None = 100.0
) -> AdmissionController:
    controller = AdmissionController(max_queue, max_wait, slots)
    if rate is not None:
        controller.prefill.add(rate, 1.0)
    return controller


def refusal(controller: AdmissionController, tokens: int, choices: int, now: float) -> float:
    """Seconds after which the refused may come back."""
    with pytest.raises(Refusal) as refused:
        controller.admit(tokens, choices, now)
    headers = refused.value.headers or {}
    seconds = int(headers["Retry-After-Ms"]) / 1000
    assert refused.value.status_code == 429
    assert 0 <= int(headers["Retry-After"]) - seconds < 1 or seconds < 1
    return seconds


def test_nothing_is_refused_that_was_not_measured() -> None:
    controller = controller_of(rate=None)
    for i in range(50):
        controller.admit(10**6, 1, float(i))


def test_work_ahead_divided_by_the_rate() -> None:
    controller = controller_of()
    assert controller.seconds(300, 1, 0.0) == 3.0
    controller.admit(300, 1, 0.0)
    controller.admit(200, 1, 0.0)
    assert controller.seconds(300, 1, 0.0) == (300 + 200 + 300) / 100
    assert controller.seconds(300, 1, 2.0) == (300 + 200 - 2 * 100 + 300) / 100  # of which two seconds are done
    assert controller.seconds(300, 1, 60.0) == 3.0  # late, but never less than its own


def test_a_late_request_may_come_back_when_six_tenths_of_the_limit_are_left() -> None:
    controller = controller_of()
    controller.admit(900, 1, 0.0)
    controller.admit(100, 1, 0.0)  # exactly the limit of 10 s
    assert refusal(controller, 100, 1, 0.0) == 5.0  # of its 11 s then, 6 are left: predictions err
    assert refusal(controller, 100, 1, 0.0) == 6.0  # a second one comes after the first
    assert refusal(controller, 100, 1, 0.5) == 6.5
    controller.admit(1, 1, 20.0)


def test_first_tokens_give_the_rate() -> None:
    controller = controller_of(rate=None)
    a, b = controller.admit(100, 1, 0.0), controller.admit(300, 1, 1.0)
    controller.began([a], 2.0)
    assert controller.prefill.value == 100 / 2
    controller.began([b], 4.0)  # since the one before
    assert controller.prefill.value == pytest.approx((0.9 * 100 + 300) / (0.9 * 2 + 2))
    c = controller.admit(50, 1, 100.0)
    controller.began([c], 101.0)  # since it came: before, nothing was to be done
    assert controller.prefill.value == pytest.approx((0.81 * 100 + 0.9 * 300 + 50) / (0.81 * 2 + 0.9 * 2 + 1))
    assert controller.waiting == []


def test_slots_that_become_free() -> None:
    controller = controller_of(slots=2)
    running = [controller.admit(10, 1, 0.0) for _ in range(2)]
    controller.began(running, 1.0)
    queued = [controller.admit(10, 1, 1.0) for _ in range(2)]
    assert all(pending.queued for pending in queued)
    # nothing has ended yet: after 4 s, an answer takes at least 4 s, so 2 slots make one every 2 s
    assert controller._work(100, 1, 5.0) == pytest.approx(3 * 2 + 100 / controller.prefill.value)
    for pending in running:  # both in one wave, 8 s after their first tokens: one every 4 s
        controller.ended(pending, 1, 9.0)
    controller.began(queued, 9.0)
    assert controller.prefill.value == pytest.approx((0.9 * 100 + 20) / (0.9 + 1))  # who queued says nothing of prefill
    assert controller._work(100, 1, 9.0) == pytest.approx(4 + 100 / controller.prefill.value)
    assert controller._work(100, 2, 9.0) == pytest.approx(8 + 100 / controller.prefill.value)


def test_predictions_learn_how_they_err() -> None:
    controller = controller_of(slots=1)
    first = controller.admit(10, 1, 0.0)
    controller.began([first], 1.0)
    controller.ended(first, 1, 5.0)  # an answer takes 4 s
    running = controller.admit(10, 1, 5.0)
    controller.began([running], 6.0)
    queued = controller.admit(10, 1, 6.0)
    assert queued.predicted == pytest.approx(4 + 10 / controller.prefill.value)
    controller.ended(running, 1, 6.0 + 1.5 * queued.predicted)
    controller.began([queued], 6.0 + 1.5 * queued.predicted)
    real, predicted = 8 * 0.9 + 1.5 * queued.predicted, 8 * 0.9 + queued.predicted  # the prior weighs 8 s
    assert controller.waits.value == pytest.approx(real / predicted)
    assert controller.seconds(100, 1, 6.0) > controller._work(100, 1, 6.0)
    controller.waits.add(10_000, 1)
    assert controller.seconds(100, 1, 6.0) == controller._work(100, 1, 6.0) * 2  # but not without limit


def test_waits_for_other_prompts_are_measured_too() -> None:
    controller = controller_of()
    first, second = controller.admit(300, 1, 0.0), controller.admit(300, 1, 0.0)
    assert (first.predicted, second.predicted) == (None, 6.0)
    controller.began([first], 4.5)
    controller.began([second], 9.0)
    assert controller.waits.value == pytest.approx((8 * 0.9 + 9) / (8 * 0.9 + 6))


def test_a_crowd_begins_with_the_prior() -> None:
    controller = controller_of()
    controller.admit(300, 1, 0.0)
    assert controller.seconds(100, 1, 0.0) == pytest.approx(1.7 * 4)
    second = controller.admit(200, 1, 0.0)
    with pytest.raises(Refusal):
        controller.admit(100, 1, 0.0, key=7)  # 1.7 times 6 s is more than 10 s
    assert controller._each(100, 1, 0.0) == pytest.approx(1.7)  # reservations are so far apart, too
    controller.began([second], 50.0)
    assert controller.seconds(100, 1, 50.0) > controller._work(100, 1, 50.0) * 1.7


def test_the_prior_returns_once_no_work_is_ahead() -> None:
    controller = controller_of()
    pending = [controller.admit(300, 1, 0.0), controller.admit(200, 1, 0.0)]
    for _ in range(20):
        controller.waits.add(10, 10)
    assert controller.seconds(300, 1, 0.0) == pytest.approx(8, rel=0.02)  # waits are as predicted
    controller.began(pending, 6.0)
    controller.admit(300, 1, 7.0)  # the next crowd may be another one
    assert controller.waits.value == pytest.approx(1.7)


def test_a_full_queue() -> None:
    controller = controller_of(max_queue=3, max_wait=1e9)
    for _ in range(3):
        controller.admit(50, 1, 0.0)
    assert refusal(controller, 50, 1, 0.0) == 0.5  # the next one's prefill
    controller.admit(50, 1, 0.0, refuse=False)


def test_a_request_that_ends_before_its_first_token_waits_no_more() -> None:
    controller = controller_of()
    pending = controller.admit(500, 3, 0.0)
    controller.ended(pending, 1, 0.0)
    assert controller.seconds(100, 1, 0.0) == 6.0
    controller.ended(pending, 2, 0.0)
    assert controller.seconds(100, 1, 0.0) == 1.0
    assert (controller.running, controller.waiting) == (0, [])


def test_a_pending_request_has_not_begun() -> None:
    assert PendingRequest(1, 1, 0.0).began is None


def test_a_reservation_is_kept_and_not_given_to_a_later_request() -> None:
    controller = controller_of()
    controller.admit(900, 1, 0.0)
    controller.admit(100, 1, 0.0)
    with pytest.raises(Refusal):
        controller.admit(100, 1, 0.0, key=7)  # may come back after five seconds
    assert refusal(controller, 100, 1, 1.0) == 5.0  # its wait of 10 s is the limit, but a slot is reserved
    controller.admit(100, 1, 5.0, key=7)
    controller.admit(300, 1, 6.0)  # no reservation is left
    with pytest.raises(Refusal):
        controller.admit(800, 1, 6.0, key=8)
    due = controller._reserved_until
    assert refusal(controller, 600, 1, due + 2.0) > 0  # 6 s are more than half of the limit
    controller.admit(600, 1, due + 2.1)  # the reservation has ended


def test_with_nothing_ahead_a_request_is_admitted_however_long_it_takes() -> None:
    controller = controller_of()
    controller.admit(9000, 1, 0.0)  # 90 s, and the limit is 10 s
    controller = controller_of()
    controller.began([controller.admit(100, 1, 0.0)], 1.0)  # an answer that grows is not ahead of another prompt
    controller.admit(9000, 1, 2.0)


def test_a_prompt_that_can_never_be_in_time_is_refused_for_good() -> None:
    controller = controller_of()
    controller.admit(100, 1, 0.0)
    with pytest.raises(Refusal, match=r"the prompt's 2000 tokens take 20 s, .* --max-wait") as refused:
        controller.admit(2000, 1, 0.0)
    assert refused.value.status_code == 400
    assert refused.value.headers is None


def test_coming_back_early_does_not_lengthen_the_wait() -> None:
    controller = controller_of()
    controller.admit(900, 1, 0.0)
    controller.admit(100, 1, 0.0)
    with pytest.raises(Refusal):
        controller.admit(100, 1, 0.0, key=7)
    for now in (1.0, 2.0, 3.0):
        with pytest.raises(Refusal) as refused:
            controller.admit(100, 1, now, key=7)
        assert int((refused.value.headers or {})["Retry-After-Ms"]) == (5 - now) * 1000
    controller.admit(100, 1, 5.0, key=7)
