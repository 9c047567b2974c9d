"""Answers on the chat page in Chromium: empty and failed ones, thoughts, continued ones, probabilities of tokens."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from chat_page import Chat, refusal, scripted, violations


def said(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]


@pytest.mark.parametrize("empty", ["", "\n\n"])
def test_one_can_go_on_after_an_empty_answer(chat: Chat, empty: str) -> None:
    asked = scripted(chat.page, empty, "Here I am.")
    chat.say("One")
    expect(chat.replies).to_contain_text("The model answered nothing.")
    chat.page.reload()
    expect(chat.replies).to_contain_text("The model answered nothing.")
    chat.say("Two")
    assert said(asked[1]) == [("user", "One"), ("assistant", empty), ("user", "Two")]
    expect(chat.replies.last).to_contain_text("Here I am.")


FAILURES: dict[str, dict[str, Any]] = {
    "busy": refusal(429, "busy: 1 request is waiting; come back in 9 s", "overloaded", **{"Retry-After": "9"}),
    "refused": refusal(400, "messages: cannot be answered"),
    "broken": refusal(500, "an internal error"),
    "cut": {"status": 200, "content_type": "text/event-stream", "body": ""},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_can_go_on_after_an_answer_that_failed_before_it_began(chat: Chat, failure: str) -> None:
    chat.allowed = "status of"
    asked = scripted(chat.page, FAILURES[failure], "Here I am.", "And here.")
    chat.say("One")
    expect(chat.page.locator(".trouble")).to_be_visible()
    chat.page.reload()
    expect(chat.page.locator(".trouble")).to_be_visible()
    chat.say("Two")
    assert said(asked[1]) == [("user", "One"), ("assistant", ""), ("user", "Two")]
    expect(chat.replies.last).to_contain_text("Here I am.")
    # What failed may still be tried again; what followed it stays with it.
    chat.press("Try again", chat.page.locator(".trouble"))
    chat.answered()
    assert chat.texts() == ["One", "And here."]
    chat.press("Version before")
    assert chat.texts()[2:] == ["Two", "Here I am."]


def test_an_answer_replaces_one_that_failed_before_it_began(chat: Chat) -> None:
    chat.allowed = "status of"
    scripted(chat.page, FAILURES["broken"], FAILURES["broken"], "Here I am.")
    chat.say("One")
    for _ in range(2):
        chat.press("Try again", chat.page.locator(".trouble"))
        chat.answered()
    assert chat.texts() == ["One", "Here I am."]
    expect(chat.replies.locator(".versions")).to_have_count(0)
    assert [message["content"] for message in chat.exported()[0]["messages"]] == ["One", "Here I am."]


def test_one_can_go_on_after_a_stop_before_the_first_token(chat: Chat) -> None:
    chat.page.route("**/v1/chat/completions", lambda _: None)  # neither answered nor refused
    chat.say("One", wait=False)
    expect(chat.page.locator(".waiting")).to_be_visible()
    chat.press("Stop")
    expect(chat.replies).to_contain_text("Stopped.")
    chat.page.unroute("**/v1/chat/completions")
    asked = scripted(chat.page, "Here I am.")
    chat.say("Two")
    assert said(asked[0]) == [("user", "One"), ("assistant", ""), ("user", "Two")]


def test_the_server_takes_an_empty_answer_back(chat: Chat) -> None:
    """The server itself, not a script: the conversation is not dead."""
    scripted(chat.page, "")
    chat.say("One")
    chat.page.unroute("**/v1/chat/completions")
    chat.set(max_tokens="5")
    chat.say("Two")
    expect(chat.page.locator(".trouble")).to_have_count(0)
    assert chat.exported()[0]["messages"][-1]["usage"]["completion_tokens"] >= 1


def test_a_lone_user_does_not_hear_of_other_people(chat: Chat) -> None:
    chat.allowed = "status of 429"
    scripted(chat.page, FAILURES["busy"])
    chat.say("One")
    lines = chat.page.locator(".trouble").inner_text().split("\n\n")
    assert lines[:2] == ["The server is busy.", "Your message is saved; send it again when the server has room."]
    assert lines[2].startswith("Try again in")


@pytest.mark.parametrize("begin", ["<think>\n", ""])  # a template may have written the mark
def test_thoughts_are_folded_and_not_sent_back(chat: Chat, begin: str) -> None:
    asked = scripted(chat.page, f"{begin}They ask <b>twice</b>.\n</think>\n\nIt is **four**.", "Five.")
    chat.say("Two and two?")
    thought = chat.replies.locator("details.thought")
    expect(thought.locator("summary")).to_have_text("Thought")
    expect(thought.locator(".thought-text")).not_to_be_visible()
    expect(chat.replies.locator(".prose")).to_have_text("It is four.")
    thought.locator("summary").click()
    expect(thought.locator(".thought-text")).to_have_text("They ask <b>twice</b>.")
    assert chat.page.locator("#spoken").inner_text().endswith("It is **four**.")
    chat.say("And three and two?")
    assert said(asked[1])[1] == ("assistant", "It is **four**.")


def test_a_thought_is_folded_while_it_comes(chat: Chat) -> None:
    """A stream that does not end: what has come of it is on the page."""
    part = 'data: {"choices":[{"delta":{"content":"<think>\\nHm, let me see"},"finish_reason":null}]}\n\n'
    chat.page.evaluate(
        """part => {
            const real = window.fetch;
            window.fetch = (url, options) => String(url).includes("chat/completions")
                ? Promise.resolve(new Response(new ReadableStream({
                      start(controller) {
                          controller.enqueue(new TextEncoder().encode(part));
                          options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
                      },
                  })))
                : real(url, options);
        }""",
        part,
    )
    chat.say("Think", wait=False)
    expect(chat.replies.locator("summary")).to_have_text("Thinking")
    expect(chat.replies.locator(".thought-text")).to_have_text("Hm, let me see")
    expect(chat.replies.locator(".thought-text")).not_to_be_visible()
    chat.press("Stop")
    expect(chat.replies.locator("summary")).to_have_text("Thought")


def test_text_about_the_marks_of_thoughts_is_text(chat: Chat) -> None:
    scripted(chat.page, "Write `<think>` before and `</think>` after it.")
    chat.say("How?")
    expect(chat.replies.locator(".prose")).to_have_text("Write <think> before and </think> after it.")
    expect(chat.replies.locator("details.thought")).not_to_be_visible()


def test_continue_goes_on_from_what_is_there(chat: Chat) -> None:
    part = 'data: {"choices":[{"delta":{"content":"Once upon"},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    asked = scripted(
        chat.page, {"status": 200, "content_type": "text/event-stream", "body": part}, " a time.", " a time."
    )
    chat.say("A story")
    chat.press("Continue")
    chat.answered()
    body = asked[1]
    assert said(body) == [("user", "A story"), ("assistant", "Once upon")]
    assert [body["continue_final_message"], body["add_generation_prompt"]] == [True, False]
    assert chat.texts()[1] == "Once upon a time."
    expect(chat.replies.locator(".versions")).to_have_text("2 / 2")
    expect(chat.page.get_by_role("button", name="Continue")).to_have_count(0)
    # The whole of it can be repeated, too.
    chat.press("Regenerate exactly")
    expect(chat.replies).to_contain_text("Regenerated: the same 17 bytes")
    assert asked[2]["messages"] == body["messages"]
    chat.press("Version before")
    assert chat.texts()[1] == "Once upon"


def test_the_server_continues_an_answer(chat: Chat) -> None:
    """Greedily: a limit of six tokens, continued, is what a limit of more had given."""

    def lengthen(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps({**body, "logit_bias": {str(i): -100 for i in range(140)}}))

    chat.page.route("**/v1/chat/completions", lengthen)
    chat.set(temperature="0", max_tokens="6")
    chat.say("to be or not")
    first = chat.exported()[0]["messages"][-1]["content"]
    chat.press("Continue")
    chat.answered()
    both = chat.exported()[0]["messages"][-1]
    assert both["content"].startswith(first)
    assert len(both["content"]) > len(first)
    assert both["prefix"] == len(first)
    chat.press("Regenerate exactly")
    expect(chat.replies).to_contain_text("Regenerated: the same")


def test_a_token_shows_what_else_could_have_stood_there(chat: Chat) -> None:
    chat.set(seed="3", max_tokens="8", temperature="1")
    chat.press("Settings")
    chat.page.get_by_label("Save the probabilities of tokens").check()
    chat.page.keyboard.press("Escape")
    chat.say("to be")
    chat.press("Token probabilities")
    tokens = chat.replies.locator(".token")
    chat.press("Token probabilities")
    expect(tokens).to_have_count(0)
    chat.press("Token probabilities")
    # What the server says without the page
    [conversation] = chat.exported()
    request = conversation["messages"][-1]["request"]
    sampling = {name: value for name, value in request.items() if name not in ("system", "logprobs")}
    body = {**sampling, "messages": [{"role": "user", "content": "to be"}], "logprobs": True, "top_logprobs": 5}
    reply = chat.context.request.post(chat.url + "v1/chat/completions", data=body).json()
    scores = reply["choices"][0]["logprobs"]["content"]
    labels = tokens.evaluate_all("all => all.map(each => JSON.parse(each.getAttribute('aria-label')))")
    assert labels == [each["token"] for each in scores]
    tokens.nth(0).click()
    chat.page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    shown = [float(text.removesuffix("%")) for text in chat.replies.locator(".odds td").all_inner_texts()]
    wanted = [100 * math.exp(each["logprob"]) for each in scores[1]["top_logprobs"]]
    assert shown[:5] == pytest.approx(wanted, rel=0.01, abs=0.01)
    assert float(chat.replies.locator(".odds .drawn td").inner_text().removesuffix("%")) == pytest.approx(
        100 * math.exp(scores[1]["logprob"]), rel=0.01, abs=0.01
    )
    chat.page.reload()
    chat.press("Token probabilities")
    expect(tokens).to_have_count(len(scores))


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (640, "dark"), (390, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_in_thoughts_and_tokens(chat: Chat, width: int, scheme: str) -> None:
    page = chat.page
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 844})
    scripted(page, "<think>\nHm.\n</think>\nYes.")
    chat.say("Hello")
    chat.replies.locator("summary").click()
    assert violations(page) == []
    page.unroute("**/v1/chat/completions")
    chat.set(max_tokens="30", temperature="2")
    chat.press("Settings")
    page.get_by_label("Save the probabilities of tokens").check()
    assert violations(page) == []
    page.keyboard.press("Escape")
    chat.press("Regenerate")
    chat.answered()
    chat.press("Token probabilities")
    chat.replies.locator(".token").first.click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
