"""The chat page over a tiny random model, for the modules that look at it in Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from chat_page import Chat, chromium
from models import tiny_config, write_tiny_gguf
from serving import serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("page") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=16384))
    with serving([path]) as server:
        yield server.url + "/"


@pytest.fixture
def chat(browser: Browser, url: str) -> Iterator[Chat]:
    with browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True) as context:
        chat = Chat(context, url)
        yield chat
        chat.check()
