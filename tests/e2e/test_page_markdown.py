"""The page's Markdown in Chromium against markdown-it-py, and against whoever means it harm."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Page

from chat_page import chromium
from models import write_tiny_gguf
from serving import serving


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A document of the server's, in which the page's modules can be imported."""
    path = tmp_path_factory.mktemp("markdown") / "tiny.gguf"
    write_tiny_gguf(path)
    with chromium() as browser, serving([path]) as server:
        page = browser.new_page()
        page.goto(server.url + "/docs/")
        yield page


RENDER = """async texts => {
    const { markdown } = await import("/markdown.js");
    return texts.map(text => {
        const body = document.createElement("div");
        body.append(markdown(text));
        return body.innerHTML;
    });
}"""


class Outline(HTMLParser):
    """HTML as nested brackets: what a reader sees of it, without what only one of the two renderers adds."""

    VOID = ("br", "hr", "input", "use")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.names: list[str | None] = []
        self.silent = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        name: str | None = tag
        if tag in ("h3", "h4", "h5", "h6") and values.get("class"):
            name = values["class"]
        if tag == "a":
            name = f"a {values['href']}"
        if tag == "ol" and values.get("start", "1") != "1":
            name = f"ol {values['start']}"
        if tag in ("div", "tbody", "span"):  # a span has a colour of code
            name = None
        if values.get("class") == "code-bar":
            self.silent = len(self.names) + 1
        if tag in self.VOID:
            self.say(f"⟨{tag}⟩")
            return
        self.names.append(name)
        if name:
            self.say(f"⟨{name} ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if self.names.pop():
            self.say("⟩")
        if len(self.names) < self.silent:
            self.silent = 0

    def handle_data(self, data: str) -> None:
        inside = any(name and name.split()[0] in INLINE for name in self.names)
        if inside or data.strip():
            self.say(data if "pre" in self.names else data.strip("\n"))

    def say(self, part: str) -> None:
        if not self.silent:
            self.parts.append(part)


INLINE = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "td", "th", "em", "strong", "a", "code", "s", "del")


def outline(html: str) -> str:
    return "".join(Outline(html).parts).replace("⟨del ", "⟨s ")


def expected(text: str) -> str:
    renderer = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return outline(renderer.render(text)).replace("\n⟩⟩", "⟩⟩")  # its code ends with a line break


TEXTS = (
    """\
Plain text.
---
Two
lines of one paragraph

and another
---
# One
## Two ##
###### Six
####### seven
#none
---
Title
=====
Another
-------
text
---
*em* **strong** ***both*** _em_ __strong__ snake_case_name 2*3*4 **a*b*c** *a **b** c*
---
**unclosed *and* this** * a * ** b ** a*"b"*c **(x)** _(y)_ ~~gone~~ ~one~ ~~~~
---
*foo**bar**baz* foo***bar***baz ***a** b* ****four**** *a `*` b*
---
`code` ``a ` b`` ` ` `` ` `` `unclosed \\`
---
\\*not em\\* \\a \\\\ &amp; &lt; &copy &#65; &#x42; &nope;
---
line one  \nline two\\\nline three \nline four
---
[text](https://example.org) [with *em*](https://example.org/a_b_c "title") [not(x.org)
---
[a](https://example.org/(b)) [](https://example.org) [a [b] c](https://example.org) *[a*](https://example.org)
---
<https://example.org/?q=1&r=2> <mailto:a@example.org> <b>not</b> <not a link>
---
- one
- two
  continued
lazy
- three
---
- one

- two

  paragraph
---
- a
  - b
    - c
- d
---
1. one
2. two
   1. inner
   2. more
3) other
---
5. five
6. six
   ```py
   code
   ```
---
* star
+ plus
- minus
---
- item

      code
- ```
  fenced

  code
  ```
- > quote
  more
---
> quote
> more
lazy

> another
> > nested
> - list
---
```python
def f(x):
    return x

```
after
---
~~~
```
~~~
````
```
````
---
```unclosed
code
---
    indented

    code
not
---
***
* * *
_ _ _
text
***
---
| a | b | c |
|---|:-:|--:|
| 1 | `x` | **y** |
| only |
| 1 | 2 | 3 | 4 |

after
---
a | b
--|--
1 \\| 2 | 3
---
text
- list right after
1. and numbers
---
2. does not interrupt
text
3. nor this
---
Emoji 🙂 and *日本語* **عربي** “quotes”
---
-
- a
-

text
---
1.  wide
    second line

    para
---
\t- tabbed code
-\ttab item
\t- inner
""".encode()
    .decode("unicode_escape")
    .encode("latin-1")
    .decode()
    .split("\n---\n")
)


def test_it_reads_markdown_as_markdown_it_does(page: Page) -> None:
    for text, html in zip(TEXTS, page.evaluate(RENDER, TEXTS), strict=True):
        assert outline(html) == expected(text), text


def test_random_emphasis_is_read_as_markdown_it_does(page: Page) -> None:
    rng = random.Random(1)
    words = ["*", "**", "***", "_", "__", "a", "b", " ", ".", "`", "~~", "\\"]
    texts = ["x" + "".join(rng.choice(words) for _ in range(rng.randint(1, 14))) for _ in range(4000)]
    texts = [text for text in texts if "~~~" not in text]  # GitHub: three or more strike nothing; markdown-it does
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert outline(html) == expected(text), text


def test_random_blocks_are_read_as_markdown_it_does(page: Page) -> None:
    rng = random.Random(2)
    starts = ["", "", "", "- ", "* ", "1. ", "2. ", "> ", "  ", "   ", "    ", "# ", "```", "---", "> - ", "- > "]
    ends = ["a", "b", "", "c", "d"]
    lines = [[rng.choice(starts) + rng.choice(ends) for _ in range(rng.randint(1, 6))] for _ in range(4000)]
    texts = ["\n".join(each).rstrip() for each in lines]
    # Two blank lines after an empty item end the list for markdown-it, and not for CommonMark.
    texts = [text for text in texts if not re.search(r"([-*>]|\d\.) *\n *\n *\n", text)]
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert outline(html) == expected(text), text


def test_a_text_that_grows_ends_as_if_it_had_come_at_once(page: Page) -> None:
    texts = [*TEXTS, "\n\n".join(TEXTS)]
    grown = """async texts => {
        const { MarkdownView } = await import("/markdown.js");
        return texts.map(text => {
            const body = document.createElement("div");
            const view = new MarkdownView(body);
            for (let end = 0; end < text.length; end += 7) view.update(text.slice(0, end));
            view.update(text);
            return body.innerHTML;
        });
    }"""
    assert page.evaluate(grown, texts) == page.evaluate(RENDER, texts)


def test_blocks_that_are_done_are_left_alone(page: Page) -> None:
    kept = """async () => {
        const { MarkdownView } = await import("/markdown.js");
        const body = document.createElement("div");
        const view = new MarkdownView(body);
        view.update("one\\n\\ntwo");
        const [one, two] = body.children;
        view.update("one\\n\\ntwo three");
        return [body.children[0] === one, body.children[1] === two];
    }"""
    assert page.evaluate(kept) == [True, False]


def test_bare_addresses_become_links_without_the_sentence_around_them(page: Page) -> None:
    text = "See https://example.org/a_b_c. (Or http://example.org/(x)?) xhttps://no https:// ftp://no"
    [html] = page.evaluate(RENDER, [text])
    assert outline(html) == (
        "⟨p See ⟨a https://example.org/a_b_c https://example.org/a_b_c⟩. "
        "(Or ⟨a http://example.org/(x) http://example.org/(x)⟩?) xhttps://no https:// ftp://no⟩"
    )


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "//example.org", "/v1/models", "x"])
def test_only_web_and_mail_addresses_become_links(page: Page, address: str) -> None:
    [html] = page.evaluate(RENDER, [f"[x]({address}) ![y]({address}) <{address}>"])
    assert outline(html) == f"⟨p [x]({address}) ![y]({address}) <{address}>⟩"


def test_an_image_is_a_link_and_nothing_is_fetched_for_it(page: Page) -> None:
    [html] = page.evaluate(RENDER, ["![a cat](https://example.org/cat.png)"])
    assert outline(html) == "⟨p ⟨a https://example.org/cat.png a cat⟩⟩"


def test_every_letter_of_random_text_is_shown_and_only_known_elements_are_made(page: Page) -> None:
    rng = random.Random(3)
    pieces = [
        "<img src=x onerror=hacked()>",
        "<script>",
        "[",
        "](",
        "javascript:x",
        "https://e.org",
        ")",
        "![",
        "&#60;",
    ]
    pieces += [
        "|",
        "\n|-|-|\n",
        "\n",
        "\n\n",
        "- ",
        "> ",
        "    ",
        "```",
        "`",
        "*",
        "**",
        "_",
        "~~",
        "\\",
        "#",
        "Z",
        "Q ",
    ]
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 40))) for _ in range(3000)]
    look = """async texts => {
        const { markdown } = await import("/markdown.js");
        return texts.map(text => {
            const body = document.createElement("div");
            body.append(markdown(text));
            const elements = [...body.querySelectorAll("*")];
            const names = elements.flatMap(e => [e.localName, ...[...e.attributes].map(a => "@" + a.name)]);
            const links = [...body.querySelectorAll("a")].map(a => a.href);
            return { text: body.textContent, names: [...new Set(names)], links };
        });
    }"""
    elements = {
        "p",
        "br",
        "hr",
        "h3",
        "h4",
        "h5",
        "h6",
        "em",
        "strong",
        "del",
        "code",
        "a",
        "ul",
        "ol",
        "li",
        "blockquote",
    }
    elements |= {"pre", "div", "span", "button", "svg", "use", "input"}
    elements |= {"table", "thead", "tbody", "tr", "th", "td"}
    elements |= {"@" + name for name in ("dir", "class", "href", "target", "rel", "start", "tabindex", "role", "type")}
    elements |= {"@aria-label", "@aria-hidden", "@disabled", "@checked"}
    for text, seen in zip(texts, page.evaluate(look, texts), strict=True):
        assert set(seen["names"]) <= elements, text
        assert all(link.startswith("https://e.org") for link in seen["links"]), text
        if (
            "|-|" not in text and "```" not in text and "~~~" not in text
        ):  # a table's row may have cells too many, and a fence a language
            assert [seen["text"].count(letter) for letter in "ZQ"] == [text.count(letter) for letter in "ZQ"], text


@pytest.mark.parametrize(
    "piece",
    [
        *[
            "[",
            "](",
            "![a](",
            "*",
            "*a ",
            "_a_ ",
            "**a*",
            "`",
            "`a``",
            "> ",
            "- ",
            "1. ",
            "|",
            "\\",
            "<",
            "&",
            "http://",
        ],
        *["~~a", "> \n", "- a\n", "|a\n|-\n", "#", "```\n", "a\n", " ", "[a](https://e.org)", "*a_b"],
    ],
)
def test_no_text_holds_the_page_up(page: Page, piece: str) -> None:
    """A hundred thousand characters of what makes careless parsers take minutes; pytest's time limit is the judge."""
    text = piece * (100_000 // len(piece))
    nested = "\n".join("  " * i + "- a" for i in range(300)) + "\n" + "> " * 300 + "a"
    deepest = """async texts => {
        const { markdown } = await import("/markdown.js");
        const depth = node => 1 + Math.max(0, ...[...node.children].slice(0, 50).map(depth));
        return texts.map(text => {
            const body = document.createElement("div");
            body.append(markdown(text));
            return depth(body);
        });
    }"""
    assert max(page.evaluate(deepest, ["a" + text, text, nested])) < 100
