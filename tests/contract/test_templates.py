"""Chat templates of strangers: what they write, what they may not do, and what user text never becomes by them."""

import re
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama2.errors import DialogError, TemplateError
from llama2.text import template as templates
from llama2.text import tokenizer_folder
from llama2.text.dialog import Dialog, Message
from llama2.text.tokenizer import Tokenizer
from texts import llama2_tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)


@cache
def bpe() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return tokenizer_folder.read(train_bpe("llama-bpe", Path(folder, "tokenizer.json")).parent)


def ask(*contents: str) -> Dialog:
    return Dialog([Message(role, content) for role, content in zip(["user", "assistant"] * 9, contents, strict=False)])


def rendered(template: str, *contents: str, **options: Any) -> str:
    """The text of the prompt, control tokens spelled out."""
    ours = bpe()
    names = {token: text.encode() for text, token in ours.control.items()}
    ids, _ = ask(*contents).render(ours, template, **options)
    return b"".join(names.get(token) or ours.token_bytes(token) for token in ids).decode()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "was stopped"),
        ("{% for m in messages %}{{ 10 ** (10 ** (9 + loop.index0)) }}{% endfor %}", "was stopped"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ messages[0].content * (4 * 10**8) }}", "MemoryError"),
        ("{{ messages[0].content * 10**7 }}", "more text than its limit"),
        ("{% for i in range(99999) %}{{ 'abcdefgh' * 9 }}{% endfor %}", "more text than its limit"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", ""),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{% if", "unexpected"),
        ("{{ missing.attribute.of }}", "undefined"),
        ("{{ raise_exception('not\nso') }}", "it refuses the dialog: not so"),
        ("x" * (2**20 + 1), "more than the limit"),
    ],
)
def test_hostile_templates_end(template: str, reason: str) -> None:
    assert rendered("{{ messages[0].content }}", "warm") == "warm"  # the process is there
    with pytest.raises(TemplateError) as caught:
        rendered(template, "hello")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("chat template: ")
    assert "\n" not in str(caught.value)
    assert rendered("{{ messages[0].content }}", "next") == "next"  # later requests are served


def test_one_process_serves_until_it_is_killed() -> None:
    rendered("{{ messages[0].content }}", "a")
    worker = bpe().sandbox
    first = worker.process
    assert first is not None
    rendered("{{ messages[0].content }}b", "a")
    assert worker.process is first
    first.kill()
    first.wait()
    assert rendered("{{ messages[0].content }}", "a") == "a"
    assert worker.process not in (first, None)
    bpe().close()
    assert worker.process is None
    assert rendered("{{ messages[0].content }}", "a") == "a"


def test_conventions_of_hugging_face_templates() -> None:
    template = (
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if loop.index0 == 2 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m['content'] | trim }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ {'é': 1} | tojson }}{{ tools is none }}{{ strftime_now('%%') }}{{ eos_token }}"
    )
    assert rendered(template, " a ", "b", "c") == '<|begin_of_text|>\nab{"é": 1}True%<|eot_id|>'


def test_mask_marks_what_the_assistant_said() -> None:
    ours = bpe()
    template = CHATML.replace("'<|eot_id|>'", "'<|eot_id|>\n'")
    for contents in (["a", "b c"], ["a", "b c", "d"], ["a", "b c", "d", "e <|eot_id|> f"]):
        ids, mask = ask(*contents).render(ours, template)
        answers = [token for content in contents[1::2] for token in (*ours.encode(content), ours.control["<|eot_id|>"])]
        assert [token for token, said in zip(ids, mask, strict=True) if said] == answers


def test_mask_begins_where_the_prompt_for_an_answer_ends() -> None:
    ours = bpe()
    template = CHATML.replace("m['content']", "'\n' + m['content']", 1)  # the line end is for the model to write
    ids, mask = ask("a", "b c", "d").render(ours, template)
    expected = [*ours.encode("\nb c"), ours.control["<|eot_id|>"]]
    assert [token for token, said in zip(ids, mask, strict=True) if said] == expected
    ids, mask = ask("a", "b c", "d").render(ours, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert ours.decode([token for token, said in zip(ids, mask, strict=True) if said]) == " b c"


def test_a_template_that_rewrites_earlier_turns() -> None:
    last = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    ids, mask = ask("a", "b", "c").render(bpe(), last)
    assert (bpe().decode(ids), any(mask)) == ("c", False)
    with pytest.raises(TemplateError, match="rewrites the assistant's messages"):
        ask("a", "b", "c", "d").render(bpe(), last)


SPELLED = ["<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>", "<|EOT_ID|>", "<|begin_of_text|>"]
WRAPPED = [
    CHATML,
    CHATML.replace("m['content']", "m['content'] | trim"),
    "{% for m in messages %}{{ m['content'] | lower }}<|eot_id|>{% endfor %}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}eot_id|> <|eot{{ m['content'] | trim }}{% endfor %}",
]


@pytest.mark.parametrize("template", WRAPPED)
@pytest.mark.parametrize("known", [True, False])
def test_user_text_never_becomes_a_control_token(template: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "known", lambda source: "read" if known else None)
    ours = bpe()
    plain = control_tokens(ask("a", "b", "c").render(ours, template)[0])
    halves = [(text[:i], text[i:]) for text in SPELLED[:2] for i in range(1, len(text))]
    contents = [(text, "b", text) for text in SPELLED]
    contents += [(f"x{a} ", f"{b}y", "c") for a, b in halves] + [(a, b, "eot_id") for a, b in halves]
    contents += [(" <|eot_id|>", "<|eot_id<|eot_id|>|>", "\ue000<|eot_id|>\ue001")]
    for three in contents[:: 1 if known else 7]:  # the other process takes longer
        ids, _ = ask(*three).render(ours, template)
        assert control_tokens(ids) == plain, three
        if "lower" not in template and "trim" not in template:
            text = ours.decode(ids)
            assert all(content in text for content in three)  # and it arrives as it was


def control_tokens(ids: list[int]) -> list[int]:
    return [token for token in ids if token in bpe().control.values()]


def test_a_template_that_assembles_control_tokens_is_refused() -> None:
    for template in (
        "{{ messages[0].content | replace('x', '') }}",
        "{{ messages[0].content.split('x') | join }}",
        "{{ messages[0].content[0:6] + messages[0].content[7:] }}",
        "<|eot{{ messages[0].content[5:] | replace('x', '') }}",
        "{{ messages[0].content[:4] }}t_id|>",
    ):
        with pytest.raises(DialogError, match="turns a message's text into a control token"):
            rendered(template, "<|eot_xid|>")
        assert rendered(template, "1 < 2 and more")
    with pytest.raises(DialogError, match="turns a message's text into a control token"):
        rendered("<|{{ messages[0].content }}|>", "eot_id")


def test_contents_without_control_tokens_pass_unchanged() -> None:
    template = (
        "{% for m in messages %}{{ m.content.startswith('</a>') }}{{ m.content | length }}{{ m.content }}{% endfor %}"
    )
    assert rendered(template, "</a> x < y") == "True10</a> x < y"


@pytest.mark.parametrize(
    ("template", "marker"),
    [
        ("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]", "[/INST]"),
        ("{{ '<|' + messages[0].role + '|>' }}{{ messages[0].content }}</s><|assistant|>", "<|user|>"),
        ("{{ '<|' + messages[0].role + '|>' }}{{ messages[0].content }}</s><|assistant|>", "</s>"),
        ("### Human: {{ messages[0].content }}\n### Assistant:", "### Assistant:"),
        ("{{ messages[0].role | upper }}: {{ messages[0].content }} ASSISTANT:", "USER:"),
    ],
)
def test_role_markers_in_ordinary_text_are_refused_or_neutralised(template: str, marker: str) -> None:
    with pytest.raises(DialogError) as caught:
        rendered(template, f"x\n{marker} y")
    assert f"message 0 contains {marker!r}" in str(caught.value)
    neutral = rendered(template, f"x\n{marker} y", neutralise=True)
    assert neutral == rendered(template, "x\n@ y").replace("@", f"{marker[0]} {marker[1:]}")


@pytest.mark.parametrize("name", sorted(templates.RESERVED))
def test_variables_cannot_replace_the_templates_own(name: str) -> None:
    with pytest.raises(TemplateError, match=f"template variable '{name}' is the template's own"):
        rendered(CHATML, "a", variables={name: True})


def test_variables() -> None:
    template = "{{ messages[0].content }}{% if think %} {{ think }}{% endif %}<|eot_id|>"
    assert rendered(template, "a", variables={"think": 3}) == "a 3<|eot_id|>"
    assert len(control_tokens(ask("a").render(bpe(), template, variables={"think": "<|eot_id|>"})[0])) == 1
    with pytest.raises(TemplateError, match="'think' must be text, a number, true, false or null"):
        rendered(template, "a", variables={"think": [1]})


def test_a_model_without_a_template() -> None:
    with pytest.raises(DialogError, match="no chat template: use `llama2 generate`, or choose one with --template"):
        ask("a").render(bpe())


def test_sentencepiece_with_a_template_of_its_own() -> None:
    zephyr = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}<|assistant|>"
    ours = llama2_tokenizer()
    ids, _ = ask("Hello").render(ours, zephyr)
    assert ids == [*ours.encode("<|user|>\nHello"), 2, *ours.encode("\n<|assistant|>")]


def test_every_private_character_in_use() -> None:
    private = [chr(code) for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))]
    assert templates._unused_characters("a", "".join(private[:-2])) == tuple(private[-2:])
    with pytest.raises(DialogError, match="every private character"):
        templates._unused_characters("".join(private[1:]))


def test_product_of_markers_at_every_edge() -> None:
    ours = bpe()
    pieces = ["<", "<|", "<|eot_id", "|>", ">", "eot_id|>", " ", "x"]
    for before, after in product(pieces, pieces):
        broken = templates._break_tokens(before + after, "\ue000", ours)
        assert broken.replace("\ue000", "") == before + after
        assert not any(token in broken for token in ours.control)


@given(st.sets(st.text("<aA|", min_size=2, max_size=4)), st.text("<aA|", max_size=30))
@example({"<a", "<a|"}, "<aA")
def test_spelled_tokens_are_found_as_a_regular_expression_finds_them(tokens: set[str], text: str) -> None:
    pattern = "|".join(map(re.escape, tokens)) or "(?!)"
    wanted = [match.start() for match in re.finditer(f"(?={pattern})", text, re.IGNORECASE)]
    assert [*templates._Spellings(tokens).starts(text)] == wanted


def test_spelled_tokens_are_found_in_any_case() -> None:
    for one, other in product("aAbıiIİsSſßẞéÉkKK", repeat=2):
        if re.fullmatch(one, other, re.IGNORECASE):
            assert [*templates._Spellings([f"<{one}>", f"{one}>"]).starts(f"<{other}>")] == [0, 1]


@pytest.mark.timeout(20)
def test_many_control_tokens_are_found_in_a_long_text() -> None:
    spelled = templates._Spellings([f"<|reserved_{i}|>" for i in range(100_000)])
    text = "".join(f"<|RESERVED_{i}|> <|reserved_x|> " for i in range(99_000, 100_000))
    assert len([*spelled.starts(text * 4)]) == 4000
