"""Exports of ChatGPT and Open WebUI, and files that mean harm, imported into the chat page in Chromium."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from chat_page import Chat, scripted

XSS = "<img src=x onerror=window.hacked=1>"


def node(name: str, parent: str | None, role: str, *parts: Any, kind: str = "text", **message: Any) -> dict[str, Any]:
    """A node of ChatGPT's mapping."""
    content = {"content_type": kind, "parts": list(parts)}
    fields = {"id": name, "author": {"role": role}, "create_time": 1.7e9, "content": content, "metadata": {}}
    return {"id": name, "parent": parent, "children": [], "message": {**fields, **message}}


def chatgpt(**changes: Any) -> dict[str, Any]:
    """A conversation as ChatGPT exports it: with hidden instructions, a tool, an image and a second answer."""
    nodes = [
        {"id": "client-created-root", "parent": None, "children": ["s"], "message": None},
        node("s", "client-created-root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
        node("q1", "s", "user", {"content_type": "image_asset_pointer"}, "What is this?", kind="multimodal_text"),
        node("a1", "q1", "assistant", "A cat.", metadata={"model_slug": "gpt-4o"}),
        node("call", "q1", "assistant", "search()", kind="code", recipient="browser"),
        node("tool", "call", "tool", "results"),
        node("a2", "tool", "assistant", f"A **dog**. {XSS}", metadata={"model_slug": XSS}, create_time=1.7e9 + 1),
        node("q2", "a2", "user", "Thanks"),
    ]
    conversation = {
        "id": "11111111-aaaa-bbbb-cccc-222222222222",
        "title": f"Pets {XSS}",
        "create_time": 1700000000.25,
        "update_time": 1700000100.5,
        "current_node": "q2",
        "mapping": {each["id"]: each for each in nodes},
    }
    return {**conversation, **changes}


def open_webui(**changes: Any) -> dict[str, Any]:
    """A conversation as Open WebUI exports it: with a system prompt, a thought, and a second answer."""

    def message(name: str, parent: str | None, role: str, content: Any, **fields: Any) -> dict[str, Any]:
        return {
            **{"id": name, "parentId": parent, "childrenIds": [], "role": role, "content": content},
            **{"timestamp": 1700000000, **fields},
        }

    thought = (
        '<details type="reasoning" done="true" duration="2">\n<summary>Thought for 2 seconds</summary>\n> Hm\n> so\n'
    )
    messages = [
        message("m1", None, "user", "Two and two?"),
        message("m2", "m1", "assistant", "Five.", model="small"),
        message("m3", "m1", "assistant", thought + "</details>\nFour.", model="large", timestamp=1700000001),
    ]
    history = {"messages": {each["id"]: each for each in messages}, "currentId": "m3"}
    chat = {"title": "Sums", "models": ["large"], "params": {"system": "Be exact."}, "history": history, "messages": []}
    whole = {"id": "w-1", "user_id": "u", "title": "Sums", "created_at": 1700000000, "updated_at": 1700000009}
    return {**whole, "chat": chat, **changes}


def test_conversations_of_chatgpt(chat: Chat) -> None:
    assert chat.upload(json.dumps([chatgpt()])) == "1 conversation added, 0 merged, 0 here already."
    assert chat.upload(json.dumps([chatgpt()])) == "0 conversations added, 0 merged, 1 here already."
    chat.page.get_by_role("link", name="Pets").click()
    expect(chat.replies).to_have_count(1)
    assert chat.texts() == ["What is this?", f"A dog. {XSS}", "Thanks"]
    expect(chat.replies.locator(".versions")).to_have_text("2 / 2")
    expect(chat.replies.locator(".facts")).to_have_text(XSS)
    chat.press("Version before")
    assert chat.texts() == ["What is this?", "A cat."]
    expect(chat.replies.locator(".facts")).to_have_text("gpt-4o")
    assert chat.page.get_by_role("button", name="Regenerate exactly").count() == 0  # nobody knows how it was drawn
    # One can go on, and what is exported is read again.
    asked = scripted(chat.page, "Indeed.")
    chat.say("Sure?")
    assert [message["content"] for message in asked[0]["messages"]] == ["What is this?", "A cat.", "Sure?"]
    whole = chat.exported()
    assert whole[0]["created"] == "2023-11-14T22:13:20.250Z"
    chat.press("Good answer", chat.replies.first)
    [rating] = map(json.loads, chat.download("Export ratings").splitlines())
    assert [rating["source"]["model"], rating["source"]["sampling"]] == ["gpt-4o", {}]
    assert chat.page.locator("#messages img, #list img, #title img").count() == 0
    assert chat.page.evaluate("window.hacked") is None


def test_conversations_of_open_webui(chat: Chat) -> None:
    assert chat.upload(json.dumps([open_webui()])).startswith("1 conversation added")
    chat.page.get_by_role("link", name="Sums").click()
    expect(chat.replies.locator(".prose")).to_have_text("Four.")
    chat.replies.locator(".thought summary").click()
    expect(chat.replies.locator(".thought-text")).to_have_text("Hm\nso")
    expect(chat.replies.locator(".facts")).to_have_text("large")
    asked = scripted(chat.page, "Yes.")
    chat.say("Sure?")
    assert [(message["role"], message["content"]) for message in asked[0]["messages"]] == [
        ("system", "Be exact."),
        ("user", "Two and two?"),
        ("assistant", "Four."),
        ("user", "Sure?"),
    ]


def ring() -> dict[str, Any]:
    nodes = [node("a", "b", "tool", "x"), node("b", "a", "tool", "y"), node("c", "a", "user", "z")]
    return {each["id"]: each for each in nodes}


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ([{"title": "x"}], "[0]: is a conversation neither of ChatGPT's nor of Open WebUI's"),
        ([None], "[0]: is a conversation neither"),
        ([], "it holds no conversation"),
        ([chatgpt(mapping={})], "it holds no conversation"),
        ([chatgpt(id=5)], "[0].id: its id must be"),
        ([chatgpt(id="a/b")], "[0].id: its id must be"),
        ([chatgpt(), chatgpt()], "conversations[1].id: appears twice"),
        ([chatgpt(mapping=ring())], "[0]: its message a is its own ancestor"),
        ([chatgpt(mapping={"x" * 200: node("x", None, "user", "hi")})], "[0]: its id must be"),
        (
            [chatgpt(mapping={"a": node("a", "a", "user", "hi")})],
            "conversations[0].messages[0].parent: is its own ancestor",
        ),
    ],
)
def test_a_bad_export_changes_nothing(chat: Chat, file: Any, problem: str) -> None:
    outcome = chat.upload(json.dumps(file))
    assert outcome.startswith(f"chats.json: {problem}")
    assert outcome.endswith("Nothing was changed.")
    assert chat.exported() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"title": None, "create_time": None, "update_time": "soon", "current_node": "nowhere"},
        {"title": ["x"], "create_time": -1e99, "update_time": 1e300, "current_node": 7},
        {"mapping": {**chatgpt()["mapping"], "odd": None, "odder": {"message": {"content": "x", "author": []}}}},
        {"mapping": {"__proto__": node("__proto__", "constructor", "user", "Hi", 5, None, ["x"])}},
    ],
)
def test_what_is_odd_in_an_export_does_no_harm(chat: Chat, changes: dict[str, Any]) -> None:
    assert chat.upload(json.dumps([chatgpt(**changes)])).startswith("1 conversation added")
    chat.page.locator("#list a").click()
    expect(chat.questions.first).to_be_visible()
    assert json.loads(chat.download("Export all"))["conversations"]


MAKE = """([kind, whole]) => {
    const node = (id, parent, role, text) => [id, { parent, message: {
        author: { role }, content: { content_type: "text", parts: [text] } } }];
    const made = {
        deep: () => "[".repeat(200_000) + "]".repeat(200_000),
        nested: () => whole.replace('"search()"', "[".repeat(200_000) + "]".repeat(200_000)),
        chain: () => {
            const nodes = Array.from({ length: 100_000 }, (_, i) => node(`${i}`, `${i - 1}`, "tool", "x"));
            for (let i = 0; i < 100_000; i += 100) nodes.push(node(`u${i}`, `${i}`, "user", "hi"));
            return JSON.stringify([{ id: "chain", mapping: Object.fromEntries(nodes) }]);
        },
        huge: () => JSON.stringify([{ id: "huge", mapping: Object.fromEntries([
            node("a", null, "user", "q"), node("b", "a", "assistant", "*a ".repeat(3_000_000))]) }]),
        huger: () => JSON.stringify([{ id: "huger", mapping: Object.fromEntries([
            node("a", null, "user", "x".repeat(10_000_001))]) }]),
    };
    const data = new DataTransfer();
    data.items.add(new File([made[kind]()], "chats.json"));
    const input = document.querySelector("#file");
    input.files = data.files;
    input.dispatchEvent(new Event("change"));
}"""


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("deep", "Nothing was changed."),
        ("nested", "1 conversation added, 0 merged, 0 here already."),
        ("chain", "1 conversation added, 0 merged, 0 here already."),
        ("huge", "1 conversation added, 0 merged, 0 here already."),
        ("huger", "must be a text of at most ten million characters. Nothing was changed."),
    ],
)
def test_bombs_of_imports_are_met(chat: Chat, kind: str, outcome: str) -> None:
    """Deep nesting, a chain of a hundred thousand nodes, a message of megabytes; pytest's time limit is the judge."""
    chat.press("Settings")
    chat.page.evaluate(MAKE, [kind, json.dumps([chatgpt()])])
    expect(chat.page.locator("#outcome")).to_contain_text(outcome, timeout=60_000)
    chat.page.keyboard.press("Escape")
    if kind == "huge":
        chat.page.locator("#list a").click()
        expect(chat.replies.locator(".prose")).to_contain_text("8,800,000 more characters", timeout=60_000)
