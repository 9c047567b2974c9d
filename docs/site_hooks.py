"""What mkdocs.yml cannot say: folders in the navigation, pages from outside docs/, and every command's options.

Used by `make docs` alone. Links to files that are not pages of the site become their paths.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Files outside docs/ that are pages of the site, and where.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
}
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List a folder's pages where the navigation says `folder/*`."""
    for section in config.nav or []:
        for entries in section.values():
            for pattern in [entry for entry in entries if str(entry).endswith("/*")]:
                folder = ROOT / "docs" / pattern[:-2]
                pages = (path.relative_to(ROOT / "docs").as_posix() for path in sorted(folder.rglob("*.md")))
                at = entries.index(pattern)
                there = [value for entry in entries if isinstance(entry, dict) for value in entry.values()]
                entries[at : at + 1] = [page for page in pages if page not in there]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in OUTSIDE.items():
        if page != "index.md":
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_relinked(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the commands, and replace links that leave docs/."""
    uri = page.file.src_uri
    if uri in OUTSIDE.values() and uri != "index.md":
        return markdown
    return _relinked(
        markdown.replace("<!-- commands -->", _commands() if uri == "commands.md" else ""), f"docs/{uri}", uri
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name what a screen reader lists: the search, and the parts of a page's own contents."""
    output = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    return re.sub(r'(<nav class="md-nav" aria-label=")(?!Navigation)([^"]*)(">)', r"\1\2, on this page\3", output)


def _relinked(text: str, source: str, page: str) -> str:
    """Links of a file of the repository as links of its page; to no page, only the path remains."""

    def replace(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = OUTSIDE.get(path) or (path[5:] if path.startswith("docs/") else None)
        if there:
            return f"[{words}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"
        return f"{words} (`{path}`)" if path not in words and (ROOT / path).exists() else words

    return LINK.sub(replace, text)


def _commands() -> str:
    """What `--help` prints of every command."""
    import typer.main

    from llama2.cli.main import program

    return "\n".join(_helps(typer.main.get_command(program(None)), None, "llama2"))


def _helps(command: Any, parent: Any, path: str) -> list[str]:
    context = command.context_class(command, info_name=path.rpartition(" ")[2], parent=parent, terminal_width=88)
    lines = [f"## `{path}`", "", "```text", command.get_help(context), "```", ""]
    for name, child in getattr(command, "commands", {}).items():
        lines += _helps(child, context, f"{path} {name}")
    return lines
