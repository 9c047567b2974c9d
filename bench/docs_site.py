"""Look at the documentation's site in a browser: pages, widths, colours, search, accessibility, five questions.

    make docs && .venv/bin/pip install 'whole-llama[test]'
    python bench/docs_site.py                          # JSON of what was found; exit code 1 if anything is wrong
    python bench/docs_site.py --pictures docs/images   # and three pictures

Needs Chromium. The site is served from this machine, and a request to any other host is a fault.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

#: Width, height and colours of a window.
VIEWS = {"desktop": (1280, 900, "light"), "phone": (390, 844, "light"), "dark": (1280, 900, "dark")}
#: What a search for these words must lead to.
SEARCHES = {"nginx": "clients.html", "gguf": "guides/run.html", "LLAMA2_HOME": "environment.html"}
#: A page of each kind: lists, tables, long code, signatures, headings of code, a decision, a result with figures.
FEW = {
    "index.html", "guides/serve.html", "settings.html", "commands.html", "api/api.html", "troubleshooting.html",
    "architecture.html", "decisions/0018-take-what-has-one-meaning.html", "results/2026-11-28-small.html",
}  # fmt: skip
#: What newcomers ask: the links to follow from the index, and the heading that answers.
QUESTIONS = {
    "run my GGUF": (("guides/run.html",), "run-your-gguf-file"),
    "serve it behind nginx": (("guides/serve.html", "clients.html#behind-a-proxy"), "behind-a-proxy"),
    "tune on my dialogs": (("guides/train.html#tune-on-your-dialogs",), "tune-on-your-dialogs"),
    "continue pretraining": (("guides/train.html#continue-pretraining",), "continue-pretraining"),
    "add a route": (("contributing.html#worked-examples",), "add-a-route"),
}


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site's address while it is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def open_page(browser: Browser, view: str, faults: list[str], url: str) -> Page:
    """A window of that size and colours; errors and requests to other hosts are faults."""
    width, height, scheme = VIEWS[view]
    size: ViewportSize = {"width": width, "height": height}
    context = browser.new_context(
        viewport=size, color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.on("console", lambda message: faults.append(f"{view}: {message.text}") if message.type == "error" else None)
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((url, "data:", "blob:")) else faults.append(f"{view}: asks {request.url}")
        ),
    )
    return page


def look(page: Page, view: str, place: str, axe: str, faults: list[str]) -> None:
    """Find what is wider than the window, and what axe-core finds."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0:
        faults.append(f"{view}: {place} is {wide} pixels wider than the window")
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    for violation in found["violations"]:
        targets = [" ".join(map(str, node["target"])) for node in violation["nodes"]]
        faults.append(f"{view}: {place}: {violation['id']} ({violation['impact']}): {targets[:3]}")


def search(page: Page, url: str, words: str) -> list[str]:
    """The pages that a search finds, in order."""
    page.goto(f"{url}/index.html")
    page.keyboard.press("s")
    page.locator("input.md-search__input").fill(words)
    page.wait_for_selector(".md-search-result__link")
    links = page.locator(".md-search-result__link")
    found: list[str] = links.evaluate_all("links => links.map(link => new URL(link.href).pathname.slice(1))")
    return found


def answer(page: Page, url: str, links: tuple[str, ...], heading: str) -> bool:
    """Whether following these links in the text of each page leads to the heading."""
    page.goto(f"{url}/index.html")
    for link in links:
        found = page.locator("article a").evaluate_all("links => links.map(link => link.href)")
        if f"{url}/{link}" not in found:
            return False
        page.goto(f"{url}/{link}")
    return page.locator(f"[id='{heading}']").count() == 1


def take_pictures(browser: Browser, url: str, folder: Path) -> None:
    """The index on a desktop and a phone, and a guide in dark colours."""
    for view, place in (("desktop", "index"), ("phone", "index"), ("dark", "guides/serve")):
        page = open_page(browser, view, [], url)
        page.goto(f"{url}/{place}.html")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"site-{view}.png")


def main() -> None:
    """Write what was found as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--site", type=Path, default=Path("build/site"))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--all", action="store_true", help="every page, not one of each kind")
    options = parser.parse_args()
    if not (options.site / "index.html").is_file():
        raise SystemExit(f"{options.site}: is not a built site; run `make docs` first")
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        raise SystemExit("axe_playwright_python is not installed; pip install 'whole-llama[test]'")
    axe = Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    places = sorted(path.relative_to(options.site).as_posix() for path in options.site.rglob("*.html"))
    if not options.all:
        places = [place for place in places if place in FEW]
    faults: list[str] = []
    with served(options.site) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for view in VIEWS:
            page = open_page(browser, view, faults, url)
            for place in places:
                page.goto(f"{url}/{place}")
                look(page, view, place, axe, faults)
        page = open_page(browser, "desktop", faults, url)
        searches = {words: search(page, url, words)[:5] for words in SEARCHES}
        faults += [
            f"search: {words} does not find {to}"
            for words, to in SEARCHES.items()
            if not any(found.startswith(to) for found in searches[words])
        ]
        answers = {question: answer(page, url, *way) for question, way in QUESTIONS.items()}
        faults += [f"no way to: {question}" for question, found in answers.items() if not found]
        if options.pictures:
            take_pictures(browser, url, options.pictures)
        browser.close()
    print(
        json.dumps(
            {
                "pages": len(places),
                "views": list(VIEWS),
                "searches": searches,
                "clicks": {question: len(way[0]) for question, way in QUESTIONS.items()},
                "faults": faults,
            },
            indent=1,
        )
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
