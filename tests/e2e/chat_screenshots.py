"""Takes the pictures of the chat page in docs/images, with answers of the default model.

PYTHONPATH=tests python tests/e2e/chat_screenshots.py docs/images
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser

from chat_page import Chat, chromium
from serving import serving

TABLE = "Which planets are larger than Earth? Name each with one fact."
CODE = "Write a Python function that adds the numbers of a list, and explain it."


def converse(browser: Browser, url: str, scheme: str, width: int, height: int) -> Chat:
    """A page with a few conversations, the last one open."""
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    chat = Chat(context, url)
    chat.set(seed="4", temperature="0.3", max_tokens="400")
    chat.press("Settings")
    chat.press("Use for new conversations")
    chat.page.keyboard.press("Escape")
    for text in ("Explain how a rainbow forms", TABLE, CODE):
        chat.page.evaluate("history.replaceState(null, '', '/')")
        chat.page.reload()
        chat.page.wait_for_selector("body[data-ready]")
        chat.say(text)
    chat.press("Good answer")
    chat.page.locator("#prompt").focus()
    chat.page.wait_for_timeout(300)
    return chat


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, serving(["smollm2-135m-instruct"]) as server:
        for name, scheme, width, height in (
            ("chat-light", "light", 1280, 800),
            ("chat-dark", "dark", 1280, 800),
            ("chat-phone", "light", 390, 844),
        ):
            chat = converse(browser, server.url + "/", scheme, width, height)
            if name == "chat-phone":
                chat.page.locator("#thread").evaluate("element => element.scrollTop = 0")
                chat.page.wait_for_timeout(200)
            chat.page.screenshot(path=folder / f"{name}.png")
            chat.check()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
