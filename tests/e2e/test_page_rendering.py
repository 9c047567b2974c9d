"""Formulas and coloured code on the chat page in Chromium, under the page's own policy."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from chat_page import CHROMIUM, Chat, scripted, violations

FORMULAS = r"""Inline \(a^2 + b^2\) and $x_1$, and displayed:

\[
\frac{1}{2}

- \sqrt{x}
\]
$$\sum_{n=1}^\infty n^{-2}$$

1. in a list \(y\)
"""

CODE = "```python\nprint('" + "x" * 300 + "')  # a comment\n```\n"


def shown(chat: Chat, text: str) -> None:
    scripted(chat.page, text)
    chat.say("Show")


def test_formulas_are_set_under_the_policy(chat: Chat) -> None:
    shown(chat, FORMULAS)
    formulas = chat.replies.locator(".math .katex")
    expect(formulas).to_have_count(5)
    assert chat.replies.locator(".math.display .katex-display").count() == 2
    # Readers of the screen get MathML; copied, it is LaTeX.
    assert chat.replies.locator("annotation").all_text_contents() == [
        "a^2 + b^2",
        "x_1",
        "\n\\frac{1}{2}\n\n- \\sqrt{x}\n",
        r"\sum_{n=1}^\infty n^{-2}",
        "y",
    ]
    # Layout: the exponent is above its base and smaller, the numerator above its denominator, in KaTeX's own fonts.
    base, exponent = (formulas.first.locator(".katex-html .mord").filter(has_text=t).last for t in ("a", "2"))
    places = [formulas.first.get_by_text(t, exact=True).last.bounding_box() for t in ("b", "2")]
    assert places[0] is not None
    assert places[1] is not None
    assert places[1]["y"] < places[0]["y"]
    one, two = (formulas.nth(2).locator(".mfrac").get_by_text(t, exact=True).bounding_box() for t in ("1", "2"))
    assert one is not None
    assert two is not None
    assert one["y"] + one["height"] / 2 < two["y"]
    chat.page.evaluate("document.fonts.ready")
    assert chat.page.evaluate("document.fonts.check('16px KaTeX_Math')")
    size = "element => parseFloat(getComputedStyle(element).fontSize)"
    assert exponent.evaluate(size) < base.evaluate(size)


def test_prices_and_escapes_are_no_formulas(chat: Chat) -> None:
    text = r"It costs $5 and $6, US$7 or $8-$9; \$a\$ and `$b$`, $ c$ $d $, a$e$f" "\n\n    $g$\n\n```\n\\(h\\)\n```"
    shown(chat, text)
    assert chat.replies.locator(".math").count() == 0
    expect(chat.replies.locator(".prose > p")).to_have_text(
        "It costs $5 and $6, US$7 or $8-$9; $a$ and $b$, $ c$ $d $, a$e$f"
    )


HOSTILE = [
    r"\href{javascript:window.hacked=1}{x}",
    r"\htmlStyle{color:red}{x}",
    r"\htmlData{a=b}{x}",
    r"\includegraphics{https://evil.example/x.png}",
    r"\url{javascript:window.hacked=2}",
    r"<img src=x onerror=window.hacked=3>",
    r"\text{<script>window.hacked=4</script>}",
    r"\def\a{\a\a}\a",
    r"\rule{1000em}{1000em}",
    "{" * 3000,
    r"\frac" * 700,
    r"\pmb{x}\fcolorbox{red}{blue}{x}",
]


def test_hostile_formulas_do_nothing(chat: Chat) -> None:
    """Neither a script nor a request, nor a style that the policy forbids; `chat` looks at the latter two."""
    shown(chat, "\n\n".join(f"$${formula}$$" for formula in [*HOSTILE, "x"]))
    expect(chat.replies.locator(".math .katex").last).to_be_visible()
    assert chat.page.evaluate("window.hacked") is None
    assert chat.replies.locator("img, script, a[href], [onerror], [data-a]").count() == 0
    for side in ("offsetWidth", "offsetHeight"):  # a rule has a size that it cannot exceed
        assert max(chat.replies.locator(".math *").evaluate_all(f"all => all.map(each => each.{side} ?? 0)")) < 3000


def test_code_has_colours_and_is_still_the_same_text(chat: Chat) -> None:
    shown(
        chat,
        CODE + '\n```html\n<b onclick="hacked()">x</b> <script>hacked()</script>\n```\n\n```nolanguage\nx = 1\n```',
    )
    blocks = chat.replies.locator("pre code")
    expect(blocks.first.locator(".code-comment")).to_have_text("# a comment")
    expect(blocks.nth(1).locator(".code-tag").first).to_be_visible()
    assert blocks.all_text_contents() == [
        "print('" + "x" * 300 + "')  # a comment",
        '<b onclick="hacked()">x</b> <script>hacked()</script>',
        "x = 1",
    ]
    assert blocks.nth(2).locator("span").count() == 0
    assert chat.replies.locator("pre b, pre script").count() == 0
    colours = {
        blocks.first.locator(f".code-{scope}").first.evaluate("element => getComputedStyle(element).color")
        for scope in ("comment", "string", "built_in")
    }
    assert len(colours) == 3
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.replies.get_by_role("button", name="Copy code").first.click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == blocks.first.text_content()


def test_libraries_are_fetched_only_when_they_are_needed(chat: Chat) -> None:
    shown(chat, "Neither a formula nor `code` of a language.\n\n```\nplain\n```")
    assert not [url for url in chat.requests if "/vendor/" in url]


@pytest.fixture
def with_scroll_bars(browser: Browser) -> Iterator[Browser]:
    """Chromium as people have it: without a window, its scroll bars are hidden."""
    arguments = ["--no-sandbox"]
    other = browser.browser_type.launch(
        executable_path=CHROMIUM, args=arguments, ignore_default_args=["--hide-scrollbars"]
    )
    yield other
    other.close()


def test_a_long_line_of_code_has_a_scroll_bar(with_scroll_bars: Browser, url: str) -> None:
    chat = Chat(with_scroll_bars.new_context(viewport={"width": 1200, "height": 800}), url)
    shown(chat, CODE + "\n```\nshort\n```\n")
    bars = chat.replies.locator("pre").evaluate_all("all => all.map(each => each.offsetHeight - each.clientHeight)")
    assert bars[0] > 5
    assert bars[1] == 0
    chat.check()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (640, "dark"), (390, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_in_formulas_and_code(chat: Chat, width: int, scheme: str) -> None:
    page = chat.page
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 844})
    samples = {
        "python": "@a\nclass B(C):\n    '''d'''\n    def f(self, x: int = 1) -> None: return f'{x}' # e",
        "css": "a#b.c:hover { color: #fff; width: 1px !important }",
        "diff": "--- a\n+++ b\n@@ -1 +1 @@\n-x\n+y",
        "markdown": "# a\n> b\n- **c** *d* `e` [f](g)",
        "html": "<!DOCTYPE html>\n<a href='b'>&amp;</a>",
        "ruby": "def a; :b; end; @c = /d/",
    }
    shown(chat, FORMULAS + "\n\n".join(f"```{name}\n{code}\n```" for name, code in samples.items()))
    expect(chat.replies.locator(".code-comment").first).to_be_visible()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_no_code_of_any_language_holds_the_page_up(chat: Chat) -> None:
    """As much as has colours, of what makes careless patterns slow; pytest's time limit is the judge."""
    page: Page = chat.page
    rng = random.Random(1)
    languages = page.evaluate(
        "import('/vendor/highlight/highlight.min.js').then(library => library.default.listLanguages())"
    )
    pieces = ["(", "a ", "<a ", "/*", '"', "'\\", "`${", "#", "=(", "\n", "1.", "<<<", "$(", "{{", "%q(", "-", "a,"]
    texts = [(name, (rng.choice(pieces) * 20_000)[:20_000]) for name in languages]
    page.evaluate(
        """async texts => {
            const { code } = await import("/code.js");
            code("x", "python");
            await import("/vendor/highlight/highlight.min.js");
            for (const [name, text] of texts) if (code(text, name).textContent !== text) throw new Error(name);
        }""",
        texts,
    )
