"""The chat page as a person uses it, in Chromium, over a tiny random model."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Route, expect

from chat_page import Chat, refusal, scripted, violations


@pytest.fixture
def brief(chat: Chat) -> Chat:
    """Answers have twelve tokens."""
    chat.set(max_tokens="12")
    return chat


#: Bytes a second of an answer without end, about a thousand tokens. A quick machine would write all 16,384 in two
#: seconds, and the page would have no time for anything else.
PACE = 250_000


def endless(chat: Chat) -> None:
    """Answers end only where a limit is: the token that ends them is never drawn."""

    def lengthen(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps({**body, "logit_bias": {"2": -100}}))

    chat.page.route("**/v1/chat/completions", lengthen)
    network = chat.context.new_cdp_session(chat.page)
    network.send("Network.enable")
    conditions = {"offline": False, "latency": 0, "downloadThroughput": PACE, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", conditions)


def test_a_conversation_is_there_again_after_a_reload(brief: Chat) -> None:
    expect(brief.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    brief.say("Tell me a story\nof two lines")
    brief.say("And another")
    said = brief.texts()
    assert [said[0], said[2]] == ["Tell me a story\nof two lines", "And another"]
    assert brief.page.title() == "Tell me a story · llama2"
    expect(brief.page.locator("#context-text")).to_have_text(re.compile(r"^\d+ of 16,384 tokens$"))
    facts = brief.replies.last.locator(".facts").inner_text()
    assert re.fullmatch(r"([\d.]+ tokens/s · )?\d+ tokens? · seed \d+", facts)
    brief.page.reload()
    expect(brief.replies).to_have_count(2)
    assert brief.texts() == said
    # And from the list, in a window that begins with none
    page = brief.page = brief.open()
    page.get_by_role("navigation").get_by_role("link", name="Tell me a story").click()
    expect(brief.replies).to_have_count(2)
    assert brief.texts() == said


def test_what_is_sent_is_what_was_said_and_set(chat: Chat) -> None:
    asked = scripted(chat.page, "First.", "Second.")
    chat.set(system="Be brief.", temperature="0.25", top_p="0.5", seed="7", max_tokens="33", top_k="40", min_p="0.1")
    chat.say("One")
    chat.say("Two")
    body = {name: value for name, value in asked[1].items() if name != "headers"}
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "First."},
            {"role": "user", "content": "Two"},
        ],
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "max_tokens": 33,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_wrong_setting_is_marked_and_not_taken(chat: Chat) -> None:
    asked = scripted(chat.page, "Yes.")
    chat.press("Settings")
    temperature = chat.page.locator("[name=temperature]")
    temperature.fill("3")
    temperature.blur()
    expect(temperature).to_have_attribute("aria-invalid", "true")
    chat.page.keyboard.press("Escape")
    chat.say("One")
    assert asked[0]["temperature"] == 0.6


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_keeps_what_came(chat: Chat, by: str) -> None:
    endless(chat)
    chat.say("Go on and on", wait=False)
    expect(chat.page.locator(".reply .prose p:not(.waiting)").first).to_be_visible()
    if by == "button":
        chat.press("Stop")
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.replies.get_by_text("Stopped.")).to_be_visible()
    text = chat.texts()[1].split("$")[0]  # what comes after may be typeset as a formula a moment later
    assert text
    chat.set(max_tokens="5")
    chat.say("Once more")
    chat.page.reload()
    expect(chat.replies).to_have_count(2)
    assert chat.texts()[1].startswith(text)


def test_editing_begins_another_branch_and_keeps_the_first(brief: Chat) -> None:
    brief.say("First thought")
    before = brief.texts()
    brief.press("Edit message", brief.questions)
    box = brief.page.get_by_role("textbox", name="Edit message")
    expect(box).to_be_focused()
    box.fill("Never mind")
    brief.page.keyboard.press("Escape")
    assert brief.texts() == before
    expect(brief.questions.get_by_role("button", name="Edit message")).to_be_focused()
    brief.page.keyboard.press("Enter")
    box.fill("Second thought")
    brief.page.keyboard.press("Enter")
    brief.answered()
    assert brief.texts()[0] == "Second thought"
    expect(brief.questions.locator(".versions")).to_have_text("2 / 2")
    brief.press("Version before", brief.questions)
    assert brief.texts() == before
    brief.page.reload()
    expect(brief.replies).to_have_count(1)
    assert brief.texts() == before


def test_regenerate_draws_another_answer_and_keeps_the_first(brief: Chat) -> None:
    brief.set(temperature="1", seed="11")
    brief.say("Say something")
    first = brief.texts()[1]
    brief.press("Regenerate")
    brief.answered()
    expect(brief.replies.locator(".versions")).to_have_text("2 / 2")
    assert brief.texts()[1] != first
    assert "seed 12" in brief.replies.locator(".facts").inner_text()
    brief.press("Version before", brief.replies)
    assert brief.texts()[1] == first


def test_regenerating_exactly_gives_the_same_bytes_and_says_so(chat: Chat) -> None:
    chat.set(temperature="1", max_tokens="60", seed="11")
    chat.say("Say something")
    [conversation] = chat.exported()
    answer = conversation["messages"][-1]
    chat.press("Regenerate exactly")
    chat.answered()
    size = len(answer["content"].encode())
    note = f"Regenerated: the same {size:,} bytes, seed {answer['request']['seed']}."
    expect(chat.replies.get_by_text(note)).to_be_visible()
    expect(chat.replies.locator(".versions")).to_have_count(0)
    # Nobody takes the page's word for it: the same is asked without it.
    sampling = {name: value for name, value in answer["request"].items() if name != "system"}
    body = {**sampling, "messages": [{"role": "user", "content": "Say something"}]}
    reply = chat.context.request.post(chat.url + "v1/chat/completions", data=body).json()
    assert reply["choices"][0]["message"]["content"] == answer["content"]


def test_an_exact_answer_that_differs_is_kept_beside_the_first(chat: Chat) -> None:
    scripted(chat.page, "The same but not", "The same but for this")
    chat.say("Say something")
    chat.press("Regenerate exactly")
    expect(chat.replies.get_by_text("Differs from character 14 on")).to_be_visible()
    expect(chat.replies.locator(".versions")).to_have_text("2 / 2")


def test_an_answer_goes_on_while_another_conversation_is_open(chat: Chat) -> None:
    endless(chat)
    chat.set(max_tokens="1500")
    chat.say("Go on", wait=False)
    expect(chat.page.locator(".reply.coming")).to_be_visible()
    chat.press("New conversation")
    expect(chat.replies).to_have_count(0)
    chat.page.get_by_role("link", name="Go on").click()
    # Not `answered`: until the conversation is open, the button is that of the new one, where no answer is coming.
    expect(chat.replies.locator(".facts")).to_contain_text("1,500 tokens", timeout=60_000)
    assert chat.exported()[0]["messages"][-1]["usage"]["completion_tokens"] == 1500


def test_closing_the_page_loses_at_most_a_second_of_an_answer(chat: Chat) -> None:
    endless(chat)
    chat.say("Go on", wait=False)
    expect(chat.page.locator(".reply .prose p:not(.waiting)").first).to_be_visible()
    # Two seconds pass in the page.
    chat.page.evaluate("() => { const now = performance.now(); performance.now = () => now + 2000 }")
    count = """() => new Promise(resolve => indexedDB.open("llama2").onsuccess = ({ target: { result } }) =>
        result.transaction("messages").objectStore("messages").count().onsuccess = e => resolve(e.target.result))"""
    while chat.page.evaluate(count) < 2:
        pass
    address = chat.page.url
    chat.page.close()
    chat.page = chat.context.new_page()
    chat.page.goto(address)
    expect(chat.replies.get_by_text("Broken off when the page was closed.")).to_be_visible()
    assert chat.texts()[1]


def test_search_finds_a_message_and_opens_it(chat: Chat) -> None:
    scripted(chat.page, "The Answer is forty-two.", "Nothing of the kind.")
    chat.say("Ask")
    chat.press("New conversation")
    chat.say("Other")
    chat.page.keyboard.press("Control+k")
    expect(chat.page.get_by_role("searchbox")).to_be_focused()
    chat.page.keyboard.type("FORTY-two")
    links = chat.page.get_by_role("navigation").get_by_role("link")
    expect(links.filter(has=chat.page.locator("mark"))).to_have_count(1)
    expect(chat.page.locator("mark")).to_have_text("forty-two")
    expect(chat.page.get_by_text("1 conversation found")).to_be_attached()
    links.filter(has=chat.page.locator("mark")).click()
    expect(chat.replies).to_have_text(re.compile("forty-two"))
    expect(chat.replies).to_be_focused()
    chat.page.get_by_role("searchbox").fill("nowhere to be found")
    expect(chat.page.get_by_text("Nothing found.")).to_be_visible()
    chat.page.get_by_role("searchbox").fill("")
    expect(links.filter(has=chat.page.locator(".name"))).to_have_count(2)


def test_deleting_can_be_undone(brief: Chat) -> None:
    brief.say("Keep this")
    said, whole = brief.texts(), brief.exported()
    brief.press("Delete “Keep this”")
    expect(brief.replies).to_have_count(0)
    assert brief.exported() == []
    brief.press("Undo")
    expect(brief.replies).to_have_count(1)
    assert brief.texts() == said
    assert brief.exported() == whole


def test_export_and_import_are_a_round_trip(brief: Chat) -> None:
    brief.set(system="Be \u202eodd\u202c, \ud83d\ude42 and “quoted”.", seed="5")
    brief.say("One")
    brief.press("Regenerate")
    brief.answered()
    brief.press("Good answer")
    brief.press("Edit message")
    brief.page.get_by_role("textbox", name="Edit message").fill("Another\r\n\u0000 one \\ \u2028")
    brief.page.keyboard.press("Enter")
    brief.answered()
    brief.press("New conversation")
    brief.say("Two")
    first = json.loads(brief.download("Export all"))
    assert [first["format"], first["version"], len(first["conversations"])] == ["llama2-conversations", 1, 2]

    brief.press("Settings")
    brief.press("Delete all")
    brief.press("Delete")
    expect(brief.page.get_by_text("All conversations are deleted.")).to_be_visible()
    brief.page.keyboard.press("Escape")
    assert brief.exported() == []
    expect(brief.replies).to_have_count(0)

    assert brief.upload(json.dumps(first)) == "2 conversations added, 0 merged, 0 here already."
    second = json.loads(brief.download("Export all"))
    assert second["conversations"] == first["conversations"]
    assert brief.upload(json.dumps(first)) == "0 conversations added, 0 merged, 2 here already."
    assert brief.exported() == first["conversations"]


def test_import_merges_and_the_later_change_counts(chat: Chat) -> None:
    scripted(chat.page, "A.", "B.", "C.")
    chat.say("One")
    old = chat.exported()[0]
    chat.say("Two")
    new = chat.exported()[0]
    file = {"format": "llama2-conversations", "version": 1, "exported": "2026-01-01T00:00:00.000Z"}
    assert chat.upload(json.dumps({**file, "conversations": [old]})) == (
        "0 conversations added, 0 merged, 1 here already."
    )
    assert chat.exported() == [new]
    later = {**old, "title": "Renamed elsewhere", "updated": "2999-01-01T00:00:00.000Z"}
    assert chat.upload(json.dumps({**file, "conversations": [later]})) == (
        "0 conversations added, 1 merged, 0 here already."
    )
    [merged] = chat.exported()
    assert merged == {**new, "title": "Renamed elsewhere", "updated": later["updated"], "leaf": old["leaf"]}


def _broken(change: str) -> str:
    message = {"id": "m1", "parent": None, "role": "user", "content": "Hi", "created": "2026-01-01T00:00:00.000Z"}
    settings = {"model": None, "system": "", "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0}
    settings |= {"repetition_penalty": 1, "max_tokens": None, "seed": None}
    times = {"created": message["created"], "updated": message["created"]}
    conversation = {"id": "c1", "title": "T", **times, "leaf": "m1", "settings": settings, "messages": [message]}
    file = {
        "format": "llama2-conversations",
        "version": 1,
        "exported": message["created"],
        "conversations": [conversation],
    }
    exec(change, {"file": file, "c": conversation, "m": message})  # noqa: S102
    return json.dumps(file)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("file['format'] = 'other'", 'it does not say "format"'),
        ("file['version'] = 2", "version: is 2"),
        ("del c['title']", "conversations[0].title: is missing"),
        ("c['colour'] = 'red'", "conversations[0].colour: is not known"),
        ("c['settings']['temperature'] = '0.6'", "conversations[0].settings.temperature: must be a number"),
        ("c['leaf'] = 'm2'", "conversations[0].leaf: names a message that is not there"),
        ("m['role'] = 'system'", 'conversations[0].messages[0].role: must be "user" or "assistant"'),
        ("m['content'] = None", "conversations[0].messages[0].content: must be a text"),
        ("m['created'] = 'yesterday'", "conversations[0].messages[0].created: must be a time"),
        ("m['parent'] = 'm9'", "conversations[0].messages[0].parent: names a message that is not there"),
        ("m['parent'] = 'm1'", "conversations[0].messages[0].parent: is its own ancestor"),
        ("c['messages'].append(m)", "conversations[0].messages[1].id: appears twice"),
        ("file['conversations'].append(c)", "conversations[1].id: appears twice"),
        ("file['conversations'] = {}", "conversations: must be a list"),
    ],
)
def test_a_bad_file_changes_nothing(chat: Chat, change: str, place: str) -> None:
    text = _broken(change)
    assert chat.upload(text).startswith(f"chats.json: {place}")
    assert chat.upload(text).endswith("Nothing was changed.")
    assert chat.exported() == []
    assert chat.upload(_broken("")).startswith("1 conversation added")  # so it is the change that is refused


def test_files_that_are_no_json_are_refused(chat: Chat) -> None:
    for text in ("", "not JSON", '{"format": "llama2-conversations", ', "[]", "null", "🙂"):
        assert chat.upload(text).endswith("Nothing was changed.")


def test_thumbs_become_preference_records(chat: Chat) -> None:
    scripted(chat.page, "Good.", "Bad.", "Alone.")
    chat.set(system="Be kind.", seed="3")
    chat.say("One")
    chat.press("Good answer")
    expect(chat.page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    chat.press("Regenerate")
    chat.answered()
    chat.press("Bad answer")
    chat.say("Two")
    chat.replies.last.get_by_role("button", name="Bad answer").click()
    chat.page.reload()
    expect(chat.page.locator("[aria-pressed=true]")).to_have_count(2)
    pair, single = map(json.loads, chat.download("Export ratings").splitlines())

    def completion(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    opening = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One"}]
    assert set(pair) == {"prompt", "chosen", "rejected", "chosen_source", "rejected_source"}
    assert [pair["prompt"], pair["chosen"], pair["rejected"]] == [opening, completion("Good."), completion("Bad.")]
    assert set(single) == {"prompt", "completion", "label", "source"}
    assert single["prompt"] == [*opening, *completion("Bad."), {"role": "user", "content": "Two"}]
    assert [single["completion"], single["label"]] == [completion("Alone."), False]
    [conversation] = chat.exported()
    source = pair["chosen_source"]
    assert source["conversation"] == conversation["id"]
    rated = next(message for message in conversation["messages"] if message["content"] == "Good.")
    assert [source["message"], source["rated"], source["created"]] == [rated["id"], rated["rated"], rated["created"]]
    assert [source["model"], source["fingerprint"], source["finish"]] == ["tiny", "fp_1", "stop"]
    assert source["sampling"] == {
        **{"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0},
        **{"repetition_penalty": 1, "max_tokens": None, "seed": 3},
    }
    # A second press takes a rating back.
    chat.replies.last.get_by_role("button", name="Bad answer").click()
    assert len(chat.download("Export ratings").splitlines()) == 1


def test_a_busy_server_is_waited_for(chat: Chat) -> None:
    chat.allowed = "status of 429"
    asked = scripted(chat.page, refusal(429, "the queue is full", **{"Retry-After": "2"}), "Here I am.")
    chat.say("Hello")
    trouble = chat.page.locator(".trouble")
    expect(trouble).to_contain_text("The server is busy.")
    expect(trouble.get_by_role("button")).to_have_text(re.compile(r"Try again in [12] s"))
    trouble.get_by_role("button").click(force=True)
    assert len(asked) == 1
    trouble.get_by_role("button", name="Try again", exact=True).click()
    chat.answered()
    assert chat.texts() == ["Hello", "Here I am."]
    expect(trouble).to_have_count(0)


def test_a_conversation_that_is_too_long_says_what_to_do(chat: Chat) -> None:
    chat.allowed = "status of 400"
    chat.say("Too long. " * 6000)
    expect(chat.page.locator(".trouble")).to_contain_text("too long")
    expect(chat.page.locator(".trouble")).to_contain_text("Begin a new conversation, or edit an earlier message")
    chat.set(max_tokens="5")
    chat.press("Edit message")
    chat.page.get_by_role("textbox", name="Edit message").fill("Short")
    chat.page.keyboard.press("Enter")
    chat.answered()
    assert chat.texts()[0] == "Short"
    expect(chat.page.locator(".trouble")).to_have_count(0)


def test_a_lost_connection_keeps_what_came(chat: Chat) -> None:
    part = 'data: {"choices":[{"delta":{"content":"Half an ans"},"finish_reason":null}]}\n\n'
    scripted(chat.page, {"status": 200, "content_type": "text/event-stream", "body": part}, "A whole one.")
    chat.say("Hello")
    expect(chat.page.locator(".trouble")).to_contain_text("The connection ended before the answer did.")
    assert chat.texts()[1] == "Half an ans"
    chat.page.reload()
    expect(chat.page.locator(".trouble")).to_contain_text("The connection ended before the answer did.")
    chat.press("Regenerate", chat.page.locator(".trouble"))
    chat.answered()
    assert chat.texts()[1] == "A whole one."


def test_a_server_that_is_gone_and_comes_back(chat: Chat) -> None:
    chat.allowed = "ERR_FAILED|Failed to load resource"
    chat.page.route("**/v1/**", lambda route: route.abort())
    chat.page.reload()
    expect(chat.page.get_by_role("alert")).to_contain_text("The server does not answer.")
    chat.say("Hello")
    expect(chat.page.locator(".trouble")).to_contain_text("Your message is saved.")
    chat.page.unroute("**/v1/**")
    chat.press("Try again", chat.page.get_by_role("alert"))
    expect(chat.page.get_by_role("alert")).to_be_empty()
    chat.set(max_tokens="5")
    chat.press("Try again", chat.page.locator(".trouble"))
    chat.answered()
    expect(chat.replies).to_have_count(1)


def test_a_key_is_asked_for_sent_and_kept_only_if_told(chat: Chat) -> None:
    chat.allowed = "status of 401"
    keys: list[str | None] = []

    def guard(route: Route) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer right":
            route.continue_()
        else:
            route.fulfill(**refusal(401, "a key is needed", "invalid_api_key"))

    chat.context.route("**/v1/**", guard)
    chat.page.reload()
    dialog = chat.page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    chat.page.keyboard.press("Enter")
    expect(dialog).to_contain_text("rejects this key")
    dialog.get_by_label("Key", exact=True).fill("right")
    chat.press("Use this key")
    expect(dialog).not_to_be_visible()
    expect(chat.page.locator("#model-name")).to_have_text("tiny")
    assert keys[0] is None
    assert keys[-1] == "Bearer right"
    assert chat.page.evaluate("localStorage.getItem('llama2-key')") is None
    chat.set(max_tokens="3")
    chat.say("Hello")
    assert chat.page.evaluate("sessionStorage.getItem('llama2-key')") == "right"
    chat.press("Settings")
    chat.press("Forget the key")
    assert chat.page.evaluate("sessionStorage.getItem('llama2-key')") is None


def test_models_can_be_chosen_where_there_are_several(chat: Chat) -> None:
    cards = [{"id": name, "object": "model", "max_model_len": size} for name, size in (("small", 100), ("large", 200))]
    body = json.dumps({"object": "list", "data": cards})
    chat.page.route("**/v1/models", lambda route: route.fulfill(content_type="application/json", body=body))
    asked = scripted(chat.page, "Yes.")
    chat.page.reload()
    chat.page.get_by_role("combobox", name="Model").select_option("large")
    chat.say("Hello")
    assert asked[0]["model"] == "large"
    assert chat.page.locator("#context-text").inner_text() == "12 of 200 tokens"


def test_a_full_disk_is_told(chat: Chat) -> None:
    scripted(chat.page, "Yes.")
    chat.page.evaluate(
        "() => { IDBObjectStore.prototype.put = () => { throw new DOMException('no space is left', 'Quota') } }"
    )
    chat.say("Hello")
    expect(chat.page.get_by_role("alert")).to_contain_text("Not saved: no space is left.")
    assert chat.texts() == ["Hello", "Yes."]


def test_two_windows_show_the_same(chat: Chat) -> None:
    scripted(chat.page, "Yes.")
    other = chat.open()
    chat.say("Hello")
    other.get_by_role("link", name="Hello").click()
    expect(other.locator(".reply")).to_contain_text("Yes.")
    chat.press("Good answer")
    expect(other.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")


def _long(count: int) -> str:
    file = json.loads(_broken(""))
    [conversation] = file["conversations"]
    question = conversation["messages"].pop()
    request = {**conversation["settings"], "model": "tiny", "seed": 1}
    reply = {"request": request, "finish": "stop", "rating": None, "rated": None}
    reply |= dict.fromkeys(("error", "fingerprint", "usage", "seconds"))
    for i in range(count):
        same = {
            "id": f"m{i}",
            "parent": f"m{i - 1}" if i else None,
            "content": f"Message **{i}**, and `code`.\n\n- a\n- b",
        }
        same["created"] = f"2026-01-01T{i // 3600:02}:{i // 60 % 60:02}:{i % 60:02}.000Z"
        conversation["messages"].append({**question, **same} | ({"role": "assistant", **reply} if i % 2 else {}))
    conversation["leaf"] = f"m{count - 1}"
    return json.dumps(file)


def test_ten_thousand_messages_stay_out_of_the_way(chat: Chat) -> None:
    assert chat.upload(_long(10_000)).startswith("1 conversation added")
    chat.page.get_by_role("link", name="T", exact=True).click()
    messages = chat.page.locator("article.message")
    expect(messages.last).to_contain_text("Message 9999")
    assert messages.count() <= 200
    chat.page.get_by_role("searchbox").fill("message **123**")
    hit = chat.page.get_by_role("navigation").get_by_role("link").filter(has=chat.page.locator("mark"))
    hit.click()
    expect(chat.page.locator("article:focus")).to_contain_text("Message 123")
    assert messages.count() <= 200
    chat.page.get_by_role("button", name="Latest").click()
    expect(messages.last).to_contain_text("Message 9999")
    chat.page.locator("#thread").evaluate("element => element.scrollTop = 0")
    expect(chat.page.get_by_text("Message 9941,")).to_be_attached()
    scripted(chat.page, "Yes.")
    chat.say("Hello")
    expect(messages.last).to_contain_text("Yes.")


def test_dark_follows_the_system_and_the_button(chat: Chat) -> None:
    def background() -> str:
        colour: str = chat.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return colour

    light = background()
    chat.page.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    chat.press("Theme: system")
    assert background() == light
    chat.page.reload()
    assert background() == light
    chat.press("Theme: light")
    chat.page.emulate_media(color_scheme="light")
    assert background() == dark
    chat.press("Theme: dark")
    assert background() == light


def test_a_phone_shows_one_thing_at_a_time(brief: Chat) -> None:
    page = brief.page
    page.set_viewport_size({"width": 390, "height": 844})
    scripted(page, "A" * 500 + "\n\n```\n" + "b" * 500 + "\n```\n\n|" + "c" * 90 + "|" + "d" * 90 + "|\n|-|-|\n|1|2|")
    brief.say("x" * 500)
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#thread").evaluate("element => element.scrollWidth <= element.clientWidth")
    assert page.locator(".prose pre").evaluate("element => element.scrollWidth > element.clientWidth")
    expect(page.get_by_role("navigation")).not_to_be_visible()
    brief.press("Conversations")
    expect(page.get_by_role("navigation")).to_be_visible()
    expect(page.get_by_role("button", name="Close the list of conversations")).to_be_focused()
    assert page.locator("main").evaluate("element => element.inert")
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).not_to_be_visible()
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()


def test_text_from_right_to_left_is_set_from_its_side(brief: Chat) -> None:
    page = brief.page
    scripted(page, "مرحبا بالعالم\n\n```\nprint(1)\n```")
    brief.say("اكتب قصة طويلة جدا عن البحر والسفن والعواصف")
    for place, direction in ((".bubble", "rtl"), (".prose p", "rtl"), (".prose pre", "ltr"), ("main", "ltr")):
        assert page.locator(place).first.evaluate("element => getComputedStyle(element).direction") == direction
    name, button = (page.locator(f"#list {part}").bounding_box() for part in (".name", "li a + .icon-button"))
    assert name is not None
    assert button is not None
    assert name["x"] + name["width"] <= button["x"]


def test_forced_colours_leave_nothing_unseen(brief: Chat) -> None:
    """What a background alone shows elsewhere has a line of its own."""
    page = brief.page
    page.emulate_media(forced_colors="active")
    brief.say("to be")
    brief.press("Good answer")
    page.mouse.move(0, 0)
    for place, line in (
        ("#context-meter", "border-top-width"),
        (".bubble", "border-top-width"),
        ("#list a[aria-current]", "outline-width"),
        (".foot [aria-pressed='true']", "outline-width"),
    ):
        width = page.locator(place).first.evaluate(f"element => getComputedStyle(element)['{line}']")
        assert float(width.removesuffix("px")) >= 1, place


def test_everything_can_be_done_with_the_keyboard(brief: Chat) -> None:
    page = brief.page
    endless(brief)  # then an answer has as many tokens as the setting says

    def focused() -> str:
        name: str = page.evaluate(
            "(e => e.getAttribute('aria-label') ?? (e.id === 'prompt' ? 'Message' : e.textContent.trim()))"
            "(document.activeElement)"
        )
        return name

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if focused() == name:
                return
        raise AssertionError(f"{name} is not reached by {key}")

    page.reload()
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.evaluate("document.activeElement.blur()")
    tab_to("Skip to the message box")
    page.keyboard.press("Enter")
    assert focused() == "Message"
    tab_to("Settings", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="System prompt")).to_be_focused()
    page.keyboard.type("Be brief.")
    for _ in range(6):
        page.keyboard.press("Tab")
    page.keyboard.type("8")
    page.keyboard.press("Escape")
    assert focused() == "Settings"
    tab_to("Message")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    brief.answered()
    assert brief.texts()[0] == "One\ntwo"
    assert focused() == "Message"
    assert "8 tokens" in brief.replies.locator(".facts").inner_text()
    tab_to("Good answer", "Shift+Tab")
    page.keyboard.press("Space")
    assert focused() == "Good answer"
    tab_to("Regenerate", "Shift+Tab")
    page.keyboard.press("Enter")
    brief.answered()
    expect(brief.replies.locator(".versions")).to_have_text("2 / 2")
    tab_to("Delete “One”", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(brief.replies).to_have_count(0)


def test_readers_of_the_screen_hear_the_answer_by_paragraphs(chat: Chat) -> None:
    scripted(chat.page, "First paragraph.\n\nSecond one.")
    chat.say("Hello")
    assert chat.page.locator("#spoken p").all_inner_texts() == ["Answering", "First paragraph.", "Second one."]
    expect(chat.replies).to_have_attribute("aria-busy", "false")


def test_the_api_is_described(chat: Chat) -> None:
    chat.page.get_by_role("link", name="API").click()
    routes = chat.page.locator("details")
    expect(routes.filter(has_text="/v1/chat/completions")).to_have_count(1)
    routes.filter(has_text="/v1/chat/completions").locator("summary").click()
    expect(routes.get_by_role("cell", name="temperature", exact=True).first).to_be_visible()
    expect(chat.page.locator("pre").first).to_contain_text(f"curl {chat.url}v1/chat/completions")


RICH = """# Heading

Some **bold**, *soft* and `code`, a [link](https://example.org/) and ~~none~~.

1. One
2. Two
   - [x] done
   - [ ] not

> Quoted

| a | b |
|---|--:|
| 1 | 2 |

```python
print("a line that is far too long for the box that it stands in, and so it has to be scrolled sideways")
```
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_nothing_serious(chat: Chat, scheme: str, width: int) -> None:
    page = chat.page
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 844})
    assert violations(page) == []
    chat.allowed = "status of 429"
    scripted(page, RICH, RICH, refusal(429, "full", **{"Retry-After": "60"}))
    chat.say("Hello")
    chat.press("Regenerate")
    chat.answered()
    chat.press("Good answer")
    chat.say("Again")
    assert violations(page) == []
    chat.press("Edit message", chat.questions.first)
    assert violations(page) == []
    page.keyboard.press("Escape")
    chat.press("Settings")
    page.get_by_text("More sampling").click()
    chat.press("Export ratings")
    assert violations(page) == []
    chat.press("Delete all")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    if width < 500:
        chat.press("Conversations")
    page.get_by_role("searchbox").fill("bold")
    expect(page.locator("mark")).to_be_visible()
    assert violations(page) == []
    page.goto(chat.url + "docs/")
    page.locator("details summary").nth(2).click()
    assert violations(page) == []


HOSTILE = [
    "<img src=x onerror=\"window.hacked = 1\"> <script>window.hacked = 2</script> <svg onload='window.hacked = 3'>",
    "[a](javascript:window.hacked=4) [b](JaVaScRiPt:window.hacked=5) [c](data:text/html,<script>hacked=6</script>)",
    "[d](java\nscript:window.hacked=7) [e](&#106;avascript:window.hacked=8) <javascript:window.hacked=9>",
    "![](https://evil.example/pixel.png) ![x](javascript:window.hacked=10) [f](//evil.example) [g](vbscript:x)",
    '[h](https://example.org/" onmouseover="window.hacked=11) [i](https://example.org "t" onclick="hacked=12")',
    "```html\n<script>window.hacked = 13</script>\n```\n\n    <iframe src=javascript:window.hacked=14>",
    "<a href='javascript:hacked=15'>x</a> <form action=javascript:hacked=16><button>y</button></form>",
    "| <img src=x onerror=hacked=17> | <b>b</b> |\n|-|-|\n| <script>hacked=18</script> | [j](javascript:hacked=19) |",
    "# <img src=x onerror=hacked=20>\n\n> <iframe srcdoc='<script>parent.hacked=21</script>'>\n\n- <object data=x>",
]


def test_hostile_text_is_only_text(chat: Chat) -> None:
    scripted(chat.page, "\n\n".join(HOSTILE))
    chat.say(HOSTILE[0])
    chat.set(title=HOSTILE[0], system=HOSTILE[0])
    chat.page.get_by_role("searchbox").fill("onerror")
    expect(chat.page.locator("mark").first).to_be_visible()
    chat.page.reload()
    expect(chat.replies).to_have_count(1)
    shown = chat.page.locator("#messages, #list, #title")
    assert (
        shown.locator("img, script, iframe, object, form, svg[onload], b, [onerror], [onclick], [style]").count() == 0
    )
    addresses = shown.locator(".prose a").evaluate_all("links => links.map(link => link.href)")
    assert addresses
    assert all(address.startswith("https://") for address in addresses)
    for link in shown.locator(".prose a").all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert chat.page.evaluate("window.hacked") is None
    text = chat.replies.locator(".prose").inner_text()
    assert '<img src=x onerror="window.hacked = 1">' in text
    assert "[a](javascript:window.hacked=4)" in text


def test_no_other_page_may_hold_this_one_and_nothing_inline_runs(chat: Chat) -> None:
    header = chat.context.request.get(chat.url).headers["content-security-policy"]
    policy = dict(part.strip().split(" ", 1) for part in header.split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
