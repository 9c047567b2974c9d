"""Tools: declarations, three families' formats, what may come next, and answers to calls."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.engine.request import Event
from llama2.errors import DialogError, RequestError, TemplateError
from llama2.serve.constrain.constrainer import Constrainer
from llama2.serve.constrain.constraints import grammar, json_schema, regex
from llama2.serve.constrain.tools import CallArguments, CallReader, CallStart, Piece, Text, Toolset
from llama2.text import tokenizer_folder
from llama2.text.bpe import LETTERS
from llama2.text.calls import ID, CallFormat, call_format
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import CONTROL, NORMAL, Ends, Tokenizer, from_merges, from_sentencepiece
from texts import train_bpe, train_sentencepiece
from tool_templates import HERMES, LLAMA3, MISTRAL

MISTRAL_TOKENS = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Wien"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}}}
TOOLS = [WEATHER, CLOCK]
SCHEMAS = {"weather": CITY, "clock": {"type": "object", "maxProperties": 0}}


@cache
def family(name: str) -> tuple[str, Tokenizer]:
    """A template and a vocabulary that has its control tokens."""
    if name == "hermes":
        pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "<tool_call>", "</tool_call>"]
        types = [CONTROL] * 3 + [NORMAL] * 256 + [4, 4]
        return HERMES, from_merges(pieces, types, [], "smollm", Ends(eos_id=2))
    with TemporaryDirectory() as folder:
        if name == "llama3":
            return LLAMA3, tokenizer_folder.read(train_bpe("llama-bpe", Path(folder, "tokenizer.json")).parent)
        path = Path(folder, "tokenizer.model")
        path.write_bytes(train_sentencepiece())
        return MISTRAL, from_sentencepiece(path, added=[(text, CONTROL) for text in MISTRAL_TOKENS])


FAMILIES = ("hermes", "llama3", "mistral")


def spelled(ours: Tokenizer, ids: Sequence[int]) -> str:
    """Text in which control tokens stand between ⟦ and ⟧."""
    names = {token: f"⟦{text}⟧".encode() for text, token in ours.control.items()}
    return b"".join(names.get(token) or ours.token_bytes(token) for token in ids).decode()


def toolset(name: str, choice: Any = None, parallel: bool | None = None, tools: Any = TOOLS) -> Toolset:
    return Toolset(tools, choice, parallel, *family(name))


def test_formats_are_read_from_what_templates_write() -> None:
    assert call_format(*family("hermes")) == CallFormat(
        '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>",
        '}\n</tool_call>\n<tool_call>\n{"name": "', "<tool_call>",
    )  # fmt: skip
    assert call_format(*family("llama3")) == CallFormat('{"name": "', '", "parameters": ', "}", None, "")
    assert call_format(*family("mistral")) == CallFormat(
        '[TOOL_CALLS] [{"name": "', '", "arguments": ', f', "id": "{ID}"}}]',
        f', "id": "{ID}"}}, {{"name": "', "[TOOL_CALLS]",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "knows no tools"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}", "does not write calls as a name and then"),
        ("{{ tools }}{{ messages[1].tool_calls }}", "does not write calls"),  # not what follows the prompt
        ("{{ tools }}{{ raise_exception('no') }}", "does not write calls"),
        (
            "{{ tools | length }} {% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}go{% endif %}",
            "does not write calls",  # after another prompt than the one for an answer
        ),
    ],
)
def test_templates_without_calls_are_refused(template: str, reason: str) -> None:
    _, ours = family("llama3")
    with pytest.raises(TemplateError, match=reason):
        call_format(template, ours)
    with pytest.raises(RequestError, match=f"^tools: .*{reason}"):
        Toolset(TOOLS, None, None, template, ours)
    assert Toolset(TOOLS, "none", None, template, ours).declared is None
    with pytest.raises(RequestError, match=r"^tools: .*knows no tools"):
        Toolset(TOOLS, "auto", None, None, ours)


def called(*cities: str, content: str | None = None) -> list[dict[str, Any]]:
    """A question, its calls of `weather`, and their answers."""
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps({"city": city})},
        }
        for i, city in enumerate(cities)
    ]
    answers = [
        {"role": "tool", "tool_call_id": f"call_{i}", "content": f"{city}: sun"} for i, city in enumerate(cities)
    ]
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *answers,
    ]


def test_dialogs_with_calls_in_three_formats() -> None:
    """Worked out by hand from the templates."""
    template, ours = family("hermes")
    ids, said = Dialog(called("Rom", "Wien", content="Both.")).render(ours, template)
    assert spelled(ours, ids) == (
        "⟦<|im_start|>⟧user\nWhere?⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\nBoth."
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Wien"}}\n</tool_call>⟦<|im_end|>⟧\n'
        "⟦<|im_start|>⟧user\n<tool_response>\nRom: sun\n</tool_response>⟦<|im_end|>⟧\n"
        "⟦<|im_start|>⟧user\n<tool_response>\nWien: sun\n</tool_response>⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n"
    )
    assert not any(said)
    template, ours = family("llama3")
    ids, _ = Dialog(called("Rom")).render(ours, template)
    head = "⟦<|start_header_id|>⟧{}⟦<|end_header_id|>⟧\n\n".format
    assert spelled(ours, ids) == (
        f"⟦<|begin_of_text|>⟧{head('user')}Where?⟦<|eot_id|>⟧{head('assistant')}"
        f'{{"name": "weather", "parameters": {{"city": "Rom"}}}}⟦<|eot_id|>⟧'
        f'{head("ipython")}"Rom: sun"⟦<|eot_id|>⟧{head("assistant")}'
    )
    with pytest.raises(TemplateError, match="one call at a time"):
        Dialog(called("Rom", "Wien")).render(ours, template)
    template, ours = family("mistral")
    ids, _ = Dialog([*called("Rom"), {"role": "assistant", "content": "Sun."}, *called("Wien", "Rom")]).render(
        ours, template
    )
    text = spelled(ours, ids)
    assert '"city": "Rom"}, "id": "000000000"}]' in text  # the id that the template asks for, whatever the client's
    assert '"call_id": "000000000"}⟦[/TOOL_RESULTS]⟧' in text
    assert '{"city": "Rom"}, "id": "000000002"}]⟦</s>⟧' in text
    assert '{"content": "Wien: sun", "call_id": "000000001"}⟦[/TOOL_RESULTS]⟧' in text


def test_an_answer_may_name_the_function_instead_of_an_id() -> None:
    template, ours = family("mistral")
    messages = called("Rom", "Wien")
    messages[1]["tool_calls"][0]["function"]["name"] = "clock"
    for message, name in zip(messages[2:], ("weather", "clock"), strict=True):
        del message["tool_call_id"]
        message["name"] = name
    text = spelled(ours, Dialog(messages).render(ours, template, tools=TOOLS)[0])
    assert '{"content": "Rom: sun", "call_id": "000000001"}' in text
    assert '{"content": "Wien: sun", "call_id": "000000000"}' in text


def test_what_transformers_makes_of_the_same_dialogs() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for name in FAMILIES:
        template, ours = family(name)
        theirs = called("Rom")
        theirs[1]["content"] = ""
        call = theirs[1]["tool_calls"][0]
        call["function"]["arguments"], call["id"] = {"city": "Rom"}, "000000000"
        theirs[2]["tool_call_id"] = "000000000"
        texts = {token: text for text, token in ours.control.items()}
        (expected,), _ = render_jinja_template(
            [theirs], TOOLS, chat_template=template, add_generation_prompt=True,
            bos_token=texts.get(ours.bos_id, ""), eos_token=texts.get(ours.eos_id, ""),
        )  # fmt: skip
        ids, _ = Dialog(called("Rom")).render(ours, template, tools=TOOLS)
        parts = [part for part, token in ours.split(expected) if token is None]
        assert spelled(ours, ids).replace("⟦", "").replace("⟧", "").split() == expected.split()
        assert [token for token in ids if token in texts] == [t for _, t in ours.split(expected) if t is not None]
        assert parts


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_of_a_request_becomes_a_control_token(name: str) -> None:
    template, ours = family(name)
    evil = "".join(ours.control)
    if name == "hermes":
        evil = evil.replace("tool_call", "")
    messages = called("Rom")
    messages[1]["tool_calls"][0]["function"]["arguments"] = {evil: [evil, {evil: evil}]}
    messages[2]["content"] = evil
    parameters = {"type": "object", "properties": {evil: {"type": "string", "description": evil, "enum": [evil]}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": evil, "parameters": parameters}}]
    calm = json.loads(json.dumps([messages, tools]).replace(json.dumps(evil)[1:-1], "calm"))
    expected, _ = Dialog(calm[0]).render(ours, template, tools=calm[1])
    ids, _ = Dialog(messages).render(ours, template, tools=tools)
    control = set(ours.control.values())
    assert [token for token in ids if token in control] == [token for token in expected if token in control]
    assert spelled(ours, ids).count(evil) == 9


@pytest.mark.parametrize(
    ("content", "where"),
    [("<tool_response>", "message 2"), ("</tool_response> and", "message 2"), ("<tool_call>", "message 2")],
)
def test_tags_of_the_format_are_refused_or_broken(content: str, where: str) -> None:
    template, ours = family("hermes")
    messages = called("Rom")
    messages[2]["content"] = content
    with pytest.raises(DialogError, match=f"{where} contains '{content.split(maxsplit=1)[0]}'"):
        Dialog(messages).render(ours, template)
    ids, _ = Dialog(messages).render(ours, template, neutralise=True)
    assert f"{content[0]} {content[1:]}" in spelled(ours, ids)
    tools = [{"type": "function", "function": {"name": "f", "description": content}}]
    with pytest.raises(DialogError, match="tools contains"):
        Dialog(called("Rom")).render(ours, template, tools=tools)


def test_a_template_that_joins_letters_of_an_argument_is_refused() -> None:
    _, ours = family("llama3")
    template = (
        "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.city | replace('-', '') }}{% endfor %}{{ m.content }}<|eot_id|>{% endfor %}"
    )
    messages = called("<-|eot_id|->")
    with pytest.raises(DialogError, match="turns a message's text into a control token"):
        Dialog(messages).render(ours, template)


def edited(change: Any) -> list[dict[str, Any]]:
    messages = called("Rom", "Wien")
    change(messages)
    return messages


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop(), "message 2: the call of 'weather' has no answer"),
        (lambda m: m.pop(1), "message 1: role tool where assistant must come"),
        (
            lambda m: m.__setitem__(3, {"role": "user", "content": "x"}),
            "message 3: the call of 'weather' before it has no",
        ),
        (lambda m: m[2].update(tool_call_id="other"), "message 2: no call before it with the id 'other'"),
        (lambda m: m[3].update(tool_call_id="call_0"), "message 3: no call before it with the id 'call_0'"),
        (lambda m: m[2].pop("tool_call_id"), None),  # answers the first
        (lambda m: m[2].update(name="clock"), "message 2: no call before it with the id 'call_0' of 'clock'"),
        (lambda m: m[2].update(content=""), None),
        (lambda m: m[2].update(content=None), "message 2: content must be text"),
        (lambda m: m[2].update(name="weather"), None),
        (lambda m: m[2].update(extra=1), "message 2: a message has"),
        (lambda m: m[0].update(tool_calls=m[1]["tool_calls"]), "message 0: a message has"),
        (lambda m: m[1].update(tool_calls=5), "message 1: tool_calls must be a list"),
        (lambda m: m[1].update(tool_calls=[5]), "message 1: tool_calls[0] must be"),
        (lambda m: m[1]["tool_calls"][1].pop("function"), "message 1: tool_calls[1] must be"),
        (lambda m: m[1]["tool_calls"][0]["function"].update(arguments="{"), "tool_calls[0].function.arguments must be"),
        (
            lambda m: m[1]["tool_calls"][0]["function"].update(arguments="[1]"),
            "tool_calls[0].function.arguments must be",
        ),
        (lambda m: m[1]["tool_calls"][0]["function"].update(arguments="[" * 10**5), "function.arguments must be"),
        (lambda m: m[1].update(tool_calls=[]), "message 1: content must be text, not NoneType"),
        (lambda m: m.append({"role": "user", "content": "And?"}), None),
    ],
)
def test_rules_of_calls_in_a_dialog(change: Any, reason: str | None) -> None:
    if reason is None:
        Dialog(edited(change))
        return
    with pytest.raises(DialogError) as caught:
        Dialog(edited(change))
    assert reason in str(caught.value)


def test_a_deep_declaration_is_refused() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"a": deep}
    template, ours = family("hermes")
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    with pytest.raises(DialogError, match="more than 64 levels"):
        Dialog([{"role": "user", "content": "a"}]).render(ours, template, tools=tools)


def one(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ({}, None, "tools must be a list"),
        ([WEATHER] * 129, None, "tools must be a list of at most 128"),
        ([5], None, "tools[0].type must be 'function'"),
        ([WEATHER, {"type": "retrieval"}], None, "tools[1].type must be 'function'"),
        ([{"type": "function"}], None, "tools[0].function must be an object"),
        (one(name=5), None, "tools[0].function.name must be 1 to 64"),
        (one(name="a b"), None, "tools[0].function.name must be 1 to 64"),
        (one(name="a" * 65), None, "tools[0].function.name must be 1 to 64"),
        ([WEATHER, WEATHER], None, "tools[1].function.name: 'weather' is declared twice"),
        (one(description=5), None, "tools[0].function.description must be text"),
        (one(parameters=[]), None, "tools[0].function.parameters must be a JSON schema of type 'object'"),
        (one(parameters={"type": "string"}), None, "tools[0].function.parameters must be"),
        (
            [WEATHER, *one(parameters={"properties": {"a": {"type": "strin"}}})],
            None,
            "tools[1].function.parameters: Inv",
        ),
        (
            one(parameters={"properties": {"a": {"pattern": "(", "type": "string"}}}),
            None,
            "tools[0].function.parameters: ",
        ),
        (
            one(parameters={"properties": {"a": {"not": {}}}}, strict=True),
            None,
            "tools[0].function.parameters: keywords",
        ),
        (TOOLS, "sometimes", "tool_choice must be"),
        (TOOLS, {"type": "function"}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "tool_choice.function.name: 'other' is not one"),
        ([], "required", "tool_choice is 'required', but there are no tools"),
        (None, {"type": "function", "function": {"name": "f"}}, "tool_choice.function.name: 'f' is not one"),
    ],
)
def test_malformed_tools_are_refused_and_name_their_place(tools: Any, choice: Any, reason: str) -> None:
    def ask() -> None:
        asked = toolset("hermes", choice, None, tools)
        constrainer("hermes").processor(asked.constraints[0])

    with pytest.raises(RequestError) as caught:
        ask()
    assert str(caught.value).startswith(reason[:10])
    assert reason in str(caught.value)


@cache
def constrainer(name: str) -> Constrainer:
    return Constrainer(family(name)[1])


def test_without_tools_all_is_text() -> None:
    for asked in (toolset("hermes", None, None, None), toolset("hermes", "auto", None, []), toolset("hermes", "none")):
        assert asked.declared is None
        assert asked.constraints == ()
        text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
        reader = asked.reader()
        assert reader.push(Event(0, None, text, "stop")) == [Text(text)]
        assert reader.message() == {"content": text}
        assert reader.finish_reason("stop") == "stop"


def answer(name: str, asked: Toolset, seed: int, start: str = "") -> tuple[str, str, CallReader]:
    """What a network with random logits answers after `start`: text as spelled, finish, reader."""
    _, ours = family(name)
    (constraint,) = asked.constraints
    process, rng = constrainer(name).processor(constraint), np.random.default_rng(seed)
    reader, stream = asked.reader(), ours.stream()
    tokens = [ours.eos_id or 0]
    begun = ours.encode(start, special=True)
    for at in range(300):
        logits = rng.gumbel(0, 1, ours.vocab_size).astype(np.float32)
        process(logits, np.array(tokens, np.int32), 1)
        token = begun[at] if at < len(begun) else int(logits.argmax())
        assert np.isfinite(logits[token])
        if token in ours.stop_ids:
            reader.push(Event(0, token, stream.flush(), "stop"))
            return spelled(ours, tokens[1:]), "stop", reader
        tokens.append(token)
        reader.push(Event(0, token, stream.push(token)))
    reader.push(Event(0, None, stream.flush(), "length"))
    return spelled(ours, tokens[1:]), "length", reader


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), choice=st.sampled_from(["required", "weather", "clock"]))
def test_required_answers_are_calls(name: str, seed: int, choice: str) -> None:
    wanted: Any = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    _, finish, reader = answer(name, toolset(name, wanted), seed)
    message = reader.message()
    calls = message.get("tool_calls", [])
    if finish == "stop":
        assert message["content"] is None
        assert reader.finish_reason("stop") == "tool_calls"
        assert len(calls) == 1 or (choice == "required" and name != "llama3")
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
            assert choice in ("required", call["function"]["name"])


@pytest.mark.parametrize("name", FAMILIES)
def test_required_answers_end(name: str) -> None:
    counts = []
    for seed in range(12):
        _, finish, reader = answer(name, toolset(name, "required"), seed)
        if finish == "stop":
            counts.append(len(reader.message()["tool_calls"]))
        _, finish, reader = answer(name, toolset(name, "required", parallel=False), seed)
        assert finish != "stop" or len(reader.message()["tool_calls"]) == 1
    assert len(counts) > 6
    assert (max(counts) > 1) == (name != "llama3")


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("hermes", "I look.<tool_call>"),
        ("hermes", "<tool_call>"),
        ("llama3", '{"name": "'),
        ("llama3", ' { "name":"'),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", "Yes.[TOOL_CALLS]"),
    ],
)
def test_auto_makes_whole_calls_of_what_begins_as_one(name: str, begun: str) -> None:
    ended = 0
    for seed in range(8):
        text, finish, reader = answer(name, toolset(name, "auto"), seed, begun)
        message = reader.message()
        if finish == "stop":
            ended += 1
            assert message["content"] == {"I": "I look.", "Y": "Yes."}.get(begun[0])
            for call in message["tool_calls"]:
                jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    assert ended > 3, text


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_leaves_text_alone(name: str) -> None:
    """Every token of text and the end may come, and no control token but the one that begins a call."""
    _, ours = family(name)
    (constraint,) = toolset(name, "auto").constraints
    for text in ("", "Good", "{", '{"a": "name"', "<tool", "[TOOL"):
        logits = np.zeros(ours.vocab_size, np.float32)
        constrainer(name).processor(constraint)(logits, np.array([0, *ours.encode(text)], np.int32), 1)
        control = set(ours.control.values()) - ours.stop_ids
        masked = set(np.flatnonzero(np.isneginf(logits)).tolist())
        marker = {ours.control["[TOOL_CALLS]"]} if name == "mistral" else set()
        assert masked & control == control - marker
        assert not masked & ours.stop_ids
        letters = {token for letter in 'Aa1 {"<\n' for token in ours.encode(letter)}
        assert not masked & letters


def pieces_of(reader: CallReader, parts: Sequence[str], finish: Any = "stop") -> list[Piece]:
    read = [piece for part in parts for piece in reader.push(Event(0, None, part))]
    return read + reader.push(Event(0, None, "", finish))


HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "R}\\"{om"}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"a": ["}", {"b": "\\\\"}]}}'


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Just text.", "Just text.", []),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", HERMES_CALL, None, ['{"city": "R}\\"{om"}']),
        ("hermes", "Look: " + HERMES_CALL + "\n" + HERMES_CALL, "Look:", ['{"city": "R}\\"{om"}'] * 2),
        ("hermes", HERMES_CALL + "\nDone.", "\nDone.", ['{"city": "R}\\"{om"}']),
        ("hermes", '<tool_call>{"name":"clock","arguments":{}}</tool_call>', None, ["{}"]),
        ("hermes", '<tool_call>{"name": "no", "arguments": {}}', '<tool_call>{"name": "no", "arguments": {}}', []),
        ("hermes", '<tool_call>{"name": "clock", "x": 1}', '<tool_call>{"name": "clock", "x": 1}', []),
        ("hermes", '<tool_call>{"name": "clock", "arguments": 5', '<tool_call>{"name": "clock", "arguments": 5', []),
        ("hermes", "<tool_call>\nnonsense", "<tool_call>\nnonsense", []),
        ("hermes", '<tool_call>\n{"name": "we', '<tool_call>\n{"name": "we', []),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {"a', None, ['{"a']),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {}', None, ["{}"]),
        ("hermes", "<tool_call><tool_call>" + HERMES_CALL, "<tool_call><tool_call>", ['{"city": "R}\\"{om"}']),
        ("llama3", LLAMA_CALL, None, ['{"a": ["}", {"b": "\\\\"}]}']),
        ("llama3", " " + LLAMA_CALL, None, ['{"a": ["}", {"b": "\\\\"}]}']),
        ("llama3", LLAMA_CALL + LLAMA_CALL, LLAMA_CALL, ['{"a": ["}", {"b": "\\\\"}]}']),
        ("llama3", "See: " + LLAMA_CALL, "See: " + LLAMA_CALL, []),
        ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ("llama3", '{"named": 1}', '{"named": 1}', []),
    ],
)  # fmt: skip
def test_what_a_reader_makes_of_an_answer(name: str, text: str, content: str | None, calls: list[str]) -> None:
    reader = toolset(name).reader()
    pieces_of(reader, [text])
    message = reader.message()
    said = message["content"]
    assert (said.strip() if said and content and not content.startswith("\n") else said) == content
    assert [call["function"]["arguments"] for call in message.get("tool_calls", [])] == calls
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in message.get("tool_calls", []))
    assert reader.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert reader.finish_reason("length") == "length"


texts = st.lists(
    st.sampled_from(
        [
            HERMES_CALL,
            LLAMA_CALL,
            "<tool_call>",
            "</tool_call>",
            '{"name": "clock", ',
            '"arguments": {}}',
            "\n",
            " ",
            "x",
            '{"name": "',
            "weather",
            '", "arguments": ',
            "{",
            "}",
            "[TOOL_CALLS] [",
            ', "id": "abcdefghi"}]',
            '"',
            "\\",
        ]
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_how_an_answer_is_cut_does_not_matter(name: str, text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b] for a, b in pairwise(edges)]
    whole, cut = toolset(name).reader(), toolset(name).reader()
    pieces_of(whole, [text])
    streamed = pieces_of(cut, parts)
    for reader in (whole, cut):
        for call in reader._calls:
            call.id = ""
    assert "".join((whole.message()["content"] or "").split()) == "".join((cut.message()["content"] or "").split())
    assert whole.message().get("tool_calls") == cut.message().get("tool_calls")
    rebuilt: list[list[str]] = []
    said = ""
    for piece in streamed:
        if isinstance(piece, Text):
            said += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(rebuilt)
            rebuilt.append([piece.name, ""])
        else:
            assert isinstance(piece, CallArguments)
            assert piece.index == len(rebuilt) - 1
            rebuilt[-1][1] += piece.text
    assert said == (cut.message()["content"] or "")
    functions = [call["function"] for call in cut.message().get("tool_calls", [])]
    assert rebuilt == [[function["name"], function["arguments"]] for function in functions]


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    reader = toolset("hermes").reader()
    assert reader.push(Event(0, None, "Hm, <")) == [Text("Hm,")]
    assert reader.push(Event(0, None, "b ")) == [Text(" <b")]
    assert reader.push(Event(0, None, '<tool_call>{"name": "weather"')) == []
    (start,) = reader.push(Event(0, None, ', "arguments": {'))[:1]
    assert isinstance(start, CallStart)
    assert reader.push(Event(0, None, '"city"')) == [CallArguments(0, '"city"')]
    assert start.delta() == {
        "tool_calls": [
            {"index": 0, "id": start.id, "type": "function", "function": {"name": "weather", "arguments": ""}}
        ]
    }
    other = toolset("hermes").reader()
    assert other.push(Event(0, None, '<tool_call>{"name": "weatherX')) == [
        Text('<tool_call>{"name": "'),
        Text("weatherX"),
    ]
    assert CallArguments(0, "x").delta() == {"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}
    assert Text("x").delta() == {"content": "x"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_schema_and_tools_together(name: str) -> None:
    """The answer is a call, or what the schema says; with `none` or a forced call, that alone."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    response = json_schema(schema, "response_format.json_schema.schema")

    def ask(choice: Any) -> Toolset:
        return Toolset(TOOLS, choice, None, *family(name), response)

    assert ask("none").constraints == (response,)
    assert ask("required").constraints == toolset(name, "required").constraints
    kinds = set()
    for seed in range(30):
        _, finish, reader = answer(name, ask("auto"), seed)
        message = reader.message()
        if finish == "stop":
            kinds.add("tool_calls" in message)
            if "tool_calls" not in message:
                jsonschema.validate(json.loads(message["content"]), schema)
    assert kinds == {True, False}
    for other in (regex("a+", "guided_regex"), grammar("root ::= [a]", "grammar")):
        assert Toolset(TOOLS, "none", None, *family(name), other).constraints == (other,)
        with pytest.raises(RequestError, match=f"^{other.field}: an answer that may be a call cannot follow it too"):
            Toolset(TOOLS, "auto", None, *family(name), other)
    with pytest.raises(RequestError, match=r"^response_format.json_schema.schema: keywords"):
        constrainer(name).processor(
            Toolset(TOOLS, None, None, *family(name), json_schema({"not": {}}, response.field)).constraints[0]
        )


def test_control_tokens_of_a_call_are_distinguished() -> None:
    _, ours = family("mistral")
    format = CallFormat("[TOOL_CALLS]", "[INST]", "[/INST]", None, "[TOOL_CALLS]")
    begin, middle, end = (ours.control[text] for text in ("[TOOL_CALLS]", "[INST]", "[/INST]"))

    def read(*parts: int | str) -> dict[str, Any]:
        reader = CallReader(format, {"f"}, ours)
        for part in parts:
            reader.push(Event(0, part, "") if isinstance(part, int) else Event(0, None, part))
        reader.push(Event(0, None, "", "stop"))
        return reader.message()

    (call,) = read("a", begin, "f", middle, "{}", end, "b")["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": "{}"}
    assert read("a", begin, "f", end, "{}", end, "b") == {"content": "af{}b"}
    assert read("a", "[TOOL_CALLS]", "f", "[INST]", "{}") == {"content": "a[TOOL_CALLS]f[INST]{}"}
