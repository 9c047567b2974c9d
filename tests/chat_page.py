"""The chat page in a real browser: a server process, and what a person does and sees."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

#: The headless shell has the same engine without a browser's windows, and takes half of its processor time.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser"))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. While it is open no other event loop runs in this thread, so keep it for one module."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium; on Debian 'apt install chromium-headless-shell'")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Chat:
    """The page in one browser context, and everything it complains of or asks of a server."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url = context, url
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.allowed = ""  # a pattern of complaints that belong to the test
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        context.on("weberror", lambda error: self.problems.append(str(error.error)))
        context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective, e.blockedURI))"
        )
        self.page = self.open()

    def open(self, path: str = "") -> Page:
        """The page in another window."""
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        page.goto(self.url + path)
        if "docs" not in path:
            page.wait_for_selector("body[data-ready]")
        return page

    def check(self) -> None:
        """Nothing was complained of, and nothing asked of anyone but this server."""
        strangers = [url for url in self.requests if not url.startswith((self.url, "blob:" + self.url, "data:"))]
        assert not strangers
        assert not [text for text in self.problems if not (self.allowed and re.search(self.allowed, text))]

    # What a person does

    def say(self, text: str, wait: bool = True) -> None:
        """Send a message, and wait for the whole answer."""
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        if wait:
            self.answered()

    def answered(self) -> None:
        """Wait until no answer is coming."""
        expect(self.page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)

    def press(self, name: str, within: Locator | None = None) -> None:
        """Press a button."""
        (within or self.page).get_by_role("button", name=name, exact=True).click()

    def set(self, **values: str) -> None:
        """Change settings by the names of their fields."""
        self.press("Settings")
        if self.page.locator("details:not([open]) [name=top_k]").count():
            self.page.get_by_text("More sampling").click()
        for name, value in values.items():
            field = self.page.locator(f"#settings [name={name}]")
            field.fill(value)
            field.blur()
        self.page.keyboard.press("Escape")

    def download(self, button: str) -> str:
        """What a button of the settings offers as a file."""
        if not self.page.locator("#settings").is_visible():
            self.press("Settings")
        with self.page.expect_download() as offered:
            self.press(button)
        text = Path(offered.value.path()).read_text()
        self.page.keyboard.press("Escape")
        return text

    def upload(self, text: str) -> str:
        """Import a file; what the page says of it."""
        if not self.page.locator("#settings").is_visible():
            self.press("Settings")
        self.page.evaluate("document.querySelector('#outcome').textContent = ''")
        file = {"name": "chats.json", "mimeType": "application/json", "buffer": text.encode()}
        self.page.locator("#file").set_input_files(files=[file])
        outcome = self.page.locator("#outcome")
        expect(outcome).not_to_be_empty(timeout=60_000)
        said = outcome.inner_text()
        self.page.keyboard.press("Escape")
        return said

    def exported(self) -> list[dict[str, Any]]:
        """The conversations as Export all writes them."""
        conversations: list[dict[str, Any]] = json.loads(self.download("Export all"))["conversations"]
        return conversations

    # What a person sees

    @property
    def questions(self) -> Locator:
        return self.page.locator(".question")

    @property
    def replies(self) -> Locator:
        return self.page.locator(".reply")

    def texts(self) -> list[str]:
        """What was said, in order."""
        return self.page.locator(".question .bubble, .reply .prose").all_inner_texts()


def scripted(page: Page, *replies: str | dict[str, Any]) -> list[dict[str, Any]]:
    """Answers chat completions in turn with a text, or with a route's own answer. Returns the requests as they come."""
    asked: list[dict[str, Any]] = []

    def fulfil(route: Route) -> None:
        asked.append({**json.loads(route.request.post_data or ""), "headers": route.request.headers})
        reply = replies[min(len(asked), len(replies)) - 1]
        if isinstance(reply, str):
            chunks = [{"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": reply}}]
            chunks += [{"delta": {}, "finish_reason": "stop"}]
            events = [{"choices": [{"finish_reason": None, **chunk}], "system_fingerprint": "fp_1"} for chunk in chunks]
            events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            reply = {"status": 200, "content_type": "text/event-stream", "body": body}
        route.fulfill(**reply)

    page.route("**/v1/chat/completions", fulfil)
    return asked


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return {
        "status": status,
        "headers": headers,
        "content_type": "application/json",
        "body": json.dumps({"error": error}),
    }


def _axe() -> str:
    package = importlib.util.find_spec("axe_playwright_python")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("axe.min.js").read_text()


def violations(page: Page) -> list[str]:
    """What axe-core calls serious or critical."""
    page.evaluate(_axe())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {node['html']} {node['failureSummary']}" for each in bad for node in each["nodes"]]
