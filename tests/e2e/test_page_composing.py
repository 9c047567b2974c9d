"""What stands in the message box of the chat page before it is sent, in Chromium: files, drafts, presets, titles."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from chat_page import Chat, scripted, violations


def attach(chat: Chat, **files: bytes) -> None:
    """Choose files, by names whose last underscore is a dot."""
    payloads: list[Any] = [
        {"name": ".".join(name.rsplit("_", 1)), "mimeType": "application/octet-stream", "buffer": content}
        for name, content in files.items()
    ]
    chat.page.locator("#attachment").set_input_files(files=payloads)


def content_of(request: dict[str, Any]) -> str:
    content: str = request["messages"][-1]["content"]
    return content


def test_files_are_shown_counted_and_sent_as_text(chat: Chat) -> None:
    asked = scripted(chat.page, "Fine.")
    attach(chat, notes_md=b"# Notes\r\nof mine", code_txt=b"```\nx\n````\n")
    expect(chat.page.locator(".attachment .name")).to_have_text(["notes.md", "code.txt"])
    # The meter has what the server itself counts.
    counts = [
        len(chat.context.request.post(chat.url + "tokenize", data={"content": text}).json()["tokens"])
        for text in ("# Notes\nof mine", "```\nx\n````\n")
    ]
    expect(chat.page.locator(".attachment .size")).to_have_text(
        [f"15 B · {counts[0]} tokens", f"11 B · {counts[1]} tokens"]
    )
    expect(chat.page.locator("#context-text")).to_have_text(f"{sum(counts)} of 16,384 tokens")
    chat.say("Compare them")
    assert content_of(asked[0]) == (
        "File: notes.md\n```\n# Notes\nof mine\n```\n\nFile: code.txt\n`````\n```\nx\n````\n`````\n\nCompare them"
    )
    expect(chat.page.locator(".attachment")).to_have_count(0)
    # They are there again after a reload, open on demand, and stay with an edited message.
    chat.page.reload()
    files = chat.questions.locator("details.file")
    expect(files).to_have_count(2)
    files.first.locator("summary").click()
    expect(files.first.locator("pre")).to_have_text("# Notes\nof mine")
    chat.press("Edit message", chat.questions)
    chat.page.get_by_role("textbox", name="Edit message").fill("Again")
    chat.page.keyboard.press("Enter")
    chat.answered()
    assert content_of(asked[1]) == content_of(asked[0]).replace("Compare them", "Again")
    exported = chat.exported()
    assert exported[0]["messages"][0]["files"][0] == {"name": "notes.md", "content": "# Notes\nof mine"}


def test_a_file_can_be_taken_out_or_sent_alone(chat: Chat) -> None:
    asked = scripted(chat.page, "Fine.")
    attach(chat, a_txt=b"one", b_txt=b"two")
    chat.press("Remove a.txt")
    chat.press("Send")
    chat.answered()
    assert content_of(asked[0]) == "File: b.txt\n```\ntwo\n```"
    assert chat.page.title() == "b.txt · llama2"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("cat_png", b"\x89PNG\r\n\x1a\n\0\0", "cat.png: is not text in UTF-8; save its text so, and attach that."),
        ("a_bin", b"abc\0def", "a.bin: is not a text file; attach its text."),
        ("big_log", b"x" * (2**20 + 1), "big.log: has 1.0 MiB, and a file may have 1.0 MiB; attach a part of it."),
        ("none_txt", b"", "none.txt: is empty, or a folder; choose a text file."),
        (
            "latin_csv",
            "größer".encode("latin-1"),
            "latin.csv: is not text in UTF-8; save its text so, and attach that.",
        ),
    ],
)
def test_what_is_no_text_is_refused_in_a_line(chat: Chat, name: str, content: bytes, line: str) -> None:
    attach(chat, **{name: content})
    expect(chat.page.locator(".toast span")).to_have_text(line)
    expect(chat.page.locator(".attachment")).to_have_count(0)


def test_utf_16_is_read(chat: Chat) -> None:
    asked = scripted(chat.page, "Fine.")
    attach(chat, wide_txt="größer".encode("utf-16"))
    expect(chat.page.locator(".attachment")).to_have_count(1)
    chat.press("Send")
    chat.answered()
    assert content_of(asked[0]) == "File: wide.txt\n```\ngrößer\n```"


TRANSFER = """([type, name, text, target]) => {
    const data = new DataTransfer();
    if (name) data.items.add(new File([text], name));
    else data.setData("text/plain", text);
    const event = type === "paste"
        ? new ClipboardEvent(type, { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
    document.querySelector(target).dispatchEvent(event);
    return event.defaultPrevented;
}"""


def test_files_can_be_dropped_and_long_text_pasted(chat: Chat) -> None:
    page = chat.page
    assert page.evaluate(TRANSFER, ["dragover", "drop.txt", "dropped", "#thread"])
    expect(page.locator("body")).to_have_class(re.compile("dropping"))
    assert page.evaluate(TRANSFER, ["drop", "drop.txt", "dropped", "#thread"])
    expect(page.locator("body")).not_to_have_class(re.compile("dropping"))
    assert page.evaluate(TRANSFER, ["paste", "", "x" * 4001, "#prompt"])
    assert not page.evaluate(TRANSFER, ["paste", "", "x" * 4000, "#prompt"])
    assert page.evaluate(TRANSFER, ["paste", "pasted.txt", "y", "#prompt"])
    expect(page.locator(".attachment .name")).to_have_text(["drop.txt", "Pasted text.txt", "pasted.txt"])
    # Beside the page, too, a file must not replace it.
    assert page.evaluate(TRANSFER, ["dragover", "drop.txt", "dropped", "#sidebar"])


def test_a_hostile_name_of_a_file_is_one_line_of_text(chat: Chat) -> None:
    asked = scripted(chat.page, "Fine.")
    name = "<img src=x onerror=hacked=1>\n```\n\u202egnp.exe\u2066"
    chat.page.evaluate(TRANSFER, ["drop", name, "x", "#thread"])
    expect(chat.page.locator(".attachment .name")).to_have_text("<img src=x onerror=hacked=1> gnp.exe")
    chat.press("Send")
    chat.answered()
    assert content_of(asked[0]) == "File: <img src=x onerror=hacked=1> gnp.exe\n```\nx\n```"
    assert chat.page.locator("#messages img, #title img, #list img").count() == 0
    assert chat.page.evaluate("window.hacked") is None


def test_more_than_the_context_is_told_before_it_is_sent(chat: Chat) -> None:
    attach(chat, long_txt=b"to be or not " * 6000)
    expect(chat.page.locator("#context-text")).to_have_text(re.compile(r"^\d\d,\d{3} of 16,384 tokens: too many$"))


def test_a_draft_is_kept_and_stays_with_its_conversation(chat: Chat) -> None:
    scripted(chat.page, "Yes.")
    prompt = chat.page.get_by_label("Message", exact=True)
    prompt.fill("Not yet sent")
    attach(chat, a_txt=b"one")
    expect(chat.page.locator(".attachment")).to_have_count(1)
    chat.page.reload()
    chat.page.wait_for_selector("body[data-ready]")
    expect(prompt).to_have_value("Not yet sent")
    expect(chat.page.locator(".attachment .name")).to_have_text("a.txt")
    chat.press("Send")
    chat.answered()
    expect(prompt).to_have_value("")
    prompt.fill("A second thought")
    chat.press("New conversation")
    expect(prompt).to_have_value("")
    expect(chat.page.locator(".attachment")).to_have_count(0)
    chat.page.get_by_role("link", name="Not yet sent").click()
    expect(prompt).to_have_value("A second thought")


def test_presets_of_system_prompts(chat: Chat) -> None:
    system, preset = chat.page.locator("[name=system]"), chat.page.locator("#preset")
    chat.press("Settings")
    preset.select_option("Brief")
    expect(system).to_have_value(re.compile("^Answer in as few words"))
    system.fill("Speak like <b>a pirate</b>.")
    system.blur()
    chat.page.locator("#preset-name").fill("__proto__")
    chat.press("Save as preset")
    chat.page.reload()
    asked = scripted(chat.page, "Arr.")
    chat.press("Settings")
    preset.select_option("__proto__")
    chat.page.keyboard.press("Escape")
    chat.say("Hello")
    assert asked[0]["messages"][0] == {"role": "system", "content": "Speak like <b>a pirate</b>."}
    chat.press("Settings")
    preset.select_option("__proto__")
    chat.press("Delete preset")
    assert preset.locator("option").all_inner_texts() == ["Preset…", "Brief", "Teacher", "Reviewer"]
    expect(chat.page.get_by_role("button", name="Delete preset")).not_to_be_visible()


def test_a_conversation_is_renamed_in_the_list(chat: Chat) -> None:
    scripted(chat.page, "Yes.")
    for text in ("First", "Second"):
        chat.press("New conversation")
        chat.say(text)
    field = chat.page.get_by_role("navigation").get_by_role("textbox", name="Title")
    chat.page.get_by_role("link", name="First").hover()
    chat.press("Rename “First”")
    expect(field).to_be_focused()
    field.fill("Never mind")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("link", name="First")).to_be_focused()
    chat.press("Rename “First”")
    field.fill("  <i>Better</i> ")
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("link", name="<i>Better</i>")).to_be_focused()
    assert chat.page.title() == "Second · llama2"  # which is open still
    chat.page.reload()
    expect(chat.page.get_by_role("link", name="<i>Better</i>")).to_be_visible()
    assert chat.page.locator("#list i").count() == 0


def test_on_a_phone_the_composer_has_one_line_of_buttons_and_the_title_its_own(chat: Chat) -> None:
    page = chat.page
    names = ("smollm2-135m-instruct", "llama-2-7b-chat-q4_k_m")
    cards = [{"id": name, "object": "model", "max_model_len": 16384} for name in names]
    body = json.dumps({"object": "list", "data": cards})
    page.route("**/v1/models", lambda route: route.fulfill(content_type="application/json", body=body))
    scripted(page, "Yes.")
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    page.wait_for_selector("body[data-ready]")
    chat.say("A title of some length that")
    box = page.locator("#sampling").bounding_box()
    assert box is not None
    assert box["height"] <= 44
    expect(page.get_by_role("button", name="Temperature 0.6 · top-p 0.9")).to_be_visible()
    title, context = page.locator("#title").bounding_box(), page.locator("#context").bounding_box()
    assert title is not None
    assert context is not None
    assert title["width"] > 220
    assert context["y"] >= title["y"] + title["height"] - 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    ("width", "scheme"), [(1200, "light"), (1200, "dark"), (640, "light"), (390, "light"), (390, "dark")]
)
def test_axe_finds_nothing_serious_in_what_is_being_written(chat: Chat, width: int, scheme: str) -> None:
    """640 pixels are a window of 1280 at 200 % zoom."""
    page = chat.page
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 450 if width == 640 else 844})
    scripted(page, "Yes.")
    attach(chat, a_txt=b"one", b_png=b"\x89")
    expect(page.locator(".toast")).to_be_visible()
    assert violations(page) == []
    chat.press("Send")
    chat.answered()
    page.locator(".file summary").click()
    assert violations(page) == []
    if width < 800:
        chat.press("Conversations")
    page.get_by_role("link", name="a.txt").hover()
    page.get_by_role("button", name=re.compile("^Rename")).click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
