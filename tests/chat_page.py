"""The chat page in a real browser: a server process, and what a person does and sees."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. While it is open no other event loop runs in this thread, so keep it for one module."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium; on Debian 'apt install chromium'")
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
