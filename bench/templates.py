"""Do chat templates render as transformers renders them? The text of our token ids beside that of its own Jinja, for
each template in folders, and for dialogs with and without a system message and functions.

    python bench/templates.py FOLDER... > templates.json

A template is a `*.jinja` file, or what a tokenizer_config.json holds, one or several with names. The vocabulary is a
byte a token, with the control tokens that the template spells. Exit code 1 says that texts differ, or that we refuse
what transformers renders, which it needs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2.errors import Llama2Error
from llama2.text import bpe, tokenizer
from llama2.text.dialog import Dialog
from llama2.text.template import knows_tools

BOS, EOS = "<s>", "</s>"
CONTROL = re.compile(r"<[|｜][^|｜<>\s{}'\"+]+[|｜]>|<(?:start|end)_of_turn>|\[/?[A-Z][A-Z_]+\]|</?s>")
SYSTEM = {"role": "system", "content": "Be brief: <b>two</b> words."}
USER = {"role": "user", "content": " Wie spät ist es?\n"}
ANSWER = {"role": "assistant", "content": "It is 12 o'clock. "}
AGAIN = {"role": "user", "content": "And in 京都?"}
RESULT = {"role": "tool", "content": '{"time": "20:00"}', "tool_call_id": "000000000", "name": "time_in"}
FUNCTION = {"name": "time_in", "arguments": {"city": "京都", "unit": 1}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "time_in",
            "description": "The time in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which."},
                    "unit": {"type": "number", "enum": [1, 2], "description": "What for."},
                },
                "required": ["city"],
            },
        },
    }
]


def calls(content: str | None, arguments: Any) -> dict[str, Any]:
    """An assistant's message that calls a function."""
    call = {"id": "000000000", "type": "function", "function": {**FUNCTION, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


ARGUMENTS = json.dumps(FUNCTION["arguments"], ensure_ascii=False)

#: Ways in which callers of transformers write such a message: templates understand some of them.
CALLS = [calls(c, a) for a in (FUNCTION["arguments"], ARGUMENTS) for c in ("", None)]

#: Dialogs by name, and whether functions are declared.
DIALOGS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "question": ([USER], False),
    "with system": ([SYSTEM, USER], False),
    "turns": ([USER, ANSWER, AGAIN], False),
    "turns with system": ([SYSTEM, USER, ANSWER, AGAIN], False),
    "answered": ([USER, ANSWER], False),
    "declared": ([USER], True),
    "declared with system": ([SYSTEM, USER, ANSWER, AGAIN], True),
    "called": ([USER, CALLS[0], RESULT], True),
}


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Every template under a folder, by what a person would call it."""
    for path in sorted(folder.rglob("*.jinja")):
        yield str(path.relative_to(folder)), path.read_text(encoding="utf-8")
    for path in sorted(folder.rglob("tokenizer_config.json")):
        value = json.loads(path.read_text(encoding="utf-8")).get("chat_template") or []
        named = [{"name": "", "template": value}] if isinstance(value, str) else value
        for entry in named:
            yield f"{path.parent.name} {entry['name']}".strip(), entry["template"]


def vocabulary(template: str) -> tokenizer.Tokenizer:
    """A byte a token, and the control tokens that the template spells."""
    control = [BOS, EOS, *sorted({*CONTROL.findall(template)} - {BOS, EOS})]
    pieces = [*control, *bpe.BYTES]
    types = [tokenizer.CONTROL] * len(control) + [tokenizer.NORMAL] * len(bpe.BYTES)
    return tokenizer.from_merges(pieces, types, [], "gpt2", tokenizer.Ends(0, 1))


def ours(template: str, messages: list[dict[str, Any]], tools: Any) -> str:
    """The text of our token ids, or why we refuse."""
    t = vocabulary(template)
    names = {token: text.encode() for text, token in t.control.items()}
    try:
        ids, _ = Dialog(messages).render(t, template, tools=tools, neutralise=True)
    except Llama2Error as error:
        return f"refused: {error}"
    return b"".join(names.get(token) or t.token_bytes(token) for token in ids).decode()


def theirs(template: str, messages: list[dict[str, Any]], tools: Any) -> str:
    """The text by transformers, or why its Jinja refuses; of calls, in the first form that the template understands."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    first = ""
    for called in CALLS if CALLS[0] in messages else [CALLS[0]]:
        given = [called if message is CALLS[0] else message for message in messages]
        asks = messages[-1]["role"] != "assistant"
        try:
            text: str = _compile_jinja_template(template).render(
                messages=given, tools=tools, documents=None, add_generation_prompt=asks, bos_token=BOS, eos_token=EOS
            )
        except Exception as error:  # a template can raise anything that Python can
            text = f"refused: {error}"
        if CALLS[0] not in messages or text.count(str(FUNCTION["name"])) > 1:
            return text
        first = first or text
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    rows = []
    for name, template in (pair for folder in folders for pair in templates(folder)):
        for dialog, (messages, declares) in DIALOGS.items():
            if declares and not knows_tools(template):
                continue
            expected = theirs(template, messages, TOOLS if declares else None)
            found = ours(template, messages, TOOLS if declares else None)
            refused = expected.startswith("refused: "), found.startswith("refused: ")
            verdict = {(True, True): "both refuse", (True, False): "only ours", (False, True): "only theirs"}.get(
                refused, "same" if expected == found else "differ"
            )
            rows.append({"template": name, "dialog": dialog, "verdict": verdict, "theirs": expected, "ours": found})
    counts = Counter(row["verdict"] for row in rows)
    for row in rows:
        if row["verdict"] != "same":
            print(f"{row['verdict']:12} {row['template']:60} {row['dialog']:20} {row['ours'][:120]!r}", file=sys.stderr)
    print(f"{len({r['template'] for r in rows})} templates:", dict(counts), file=sys.stderr)
    print(json.dumps({**provenance(), "counts": counts, "rows": rows}, indent=1, ensure_ascii=False))
    sys.exit(1 if counts["differ"] or counts["only theirs"] else 0)


if __name__ == "__main__":
    main()
