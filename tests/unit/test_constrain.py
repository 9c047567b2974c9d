"""Grammars: what may come next, what is refused and why, limits, and the engine around it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

import llama2
from llama2 import checkpoint
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner_native import NativeRunner
from llama2.errors import EngineError, RequestError
from llama2.serve.constrain import compiler
from llama2.serve.constrain.constrainer import Constrainer
from llama2.serve.constrain.constraints import (
    Constraint,
    choice,
    gbnf,
    json_object,
    json_schema,
    lark,
    regex,
)
from llama2.text.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer, from_pieces
from models import tiny_config, write_tiny_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTAIN = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=512), tokenizer="bpe")
    return checkpoint.open(path)


@pytest.fixture(scope="module")
def letters(opened: checkpoint.Checkpoint) -> Constrainer:
    return Constrainer(opened.tokenizer)


def allowed(constrainer: Constrainer, ours: Tokenizer, constraint: Constraint, text: str) -> set[str]:
    """The texts of tokens that may follow `text`; the end is `END`."""
    process, logits = constrainer.processor(constraint, raw_completion=True), np.zeros(ours.vocab_size, np.float32)
    prompt = ours.encode("Q")
    process(logits, np.array(prompt + ours.encode(text), np.int32), len(prompt))
    ends = ours.stop_ids
    tokens = np.flatnonzero(np.isfinite(logits)).tolist()
    return {"END" if token in ends else ours.token_bytes(token).decode(errors="replace") for token in tokens}


@pytest.mark.parametrize(
    ("constraint", "text", "expected"),
    [
        (json_object(), "", {"{"}),
        (json_object(), "{", {"}", '"', " ", "\n", "\r"}),
        (json_object(), "{}", {"END"}),
        (json_object(), '{"a": 1', {*"0123456789.eE,}", " ", "\n", "\r"}),
        (json_object(), '{"a": tru', {"e"}),
        (json_schema({"type": "integer", "minimum": 10, "maximum": 19}, "f"), "1", set("0123456789")),
        (json_schema({"type": "integer", "minimum": 10, "maximum": 19}, "f"), "15", {"END"}),
        (json_schema({"type": "integer"}, "f"), "15", {"END", *"0123456789"}),
        (json_schema({"enum": ["ab", "ac"]}, "f"), '"a', {"b", "c"}),
        (regex("a{2}b?", "f"), "aa", {"END", "b"}),
        (regex("(a+)+$", "f"), "a", {"END", "a"}),
        (lark('start: "x" | "yz"', "f"), "", {"x", "y"}),
        (lark('start: "x" | "yz"', "f"), "y", {"z"}),
    ],
)
def test_what_may_come_next(
    letters: Constrainer, opened: checkpoint.Checkpoint, constraint: Constraint, text: str, expected: set[str]
) -> None:
    assert allowed(letters, opened.tokenizer, constraint, text) == expected


def test_white_space_is_bounded(letters: Constrainer, opened: checkpoint.Checkpoint) -> None:
    """One space, or a line end and 40 spaces: else a weak model writes white space for ever."""
    assert " " not in allowed(letters, opened.tokenizer, json_object(), "{ ")
    assert " " in allowed(letters, opened.tokenizer, json_object(), "{\n" + " " * 39)
    assert allowed(letters, opened.tokenizer, json_object(), "{\n" + " " * 40) == {"}", '"'}


def test_the_space_that_sentencepiece_adds() -> None:
    """`▁{` at the start of an answer is `{`, and as natural there as it is; the byte of a space stays one."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁{", "{", "▁", '"', "▁▁"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5]
    ours = from_pieces(pieces, [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0], types)
    process, logits = Constrainer(ours).processor(json_object()), np.zeros(ours.vocab_size, np.float32)
    process(logits, np.array([1], np.int32), 1)
    assert {pieces[token] for token in np.flatnonzero(np.isfinite(logits))} == {"▁{", "{", "▁"}
    inside = Constrainer(ours).processor(json_object(), raw_completion=True)
    logits = np.zeros(ours.vocab_size, np.float32)
    inside(logits, np.array([1, 260], np.int32), 2)
    assert {pieces[token] for token in np.flatnonzero(np.isfinite(logits))} == {"{"}


def test_what_is_masked_is_minus_infinity_and_the_rest_stays(
    letters: Constrainer, opened: checkpoint.Checkpoint
) -> None:
    ours = opened.tokenizer
    logits = np.arange(ours.vocab_size + 3, dtype=np.float32)  # a network may have more rows than tokens
    letters.processor(json_object())(logits, np.array([0], np.int32), 1)
    (token,) = ours.encode("{")
    assert logits[token] == token
    assert np.isneginf(np.delete(logits, token)).all()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: json_schema({"not": {}}, "f"), 'f: keywords that are not supported: "not"'),
        (lambda: json_schema({"if": {}, "then": {}}, "f"), 'f: keywords that are not supported: "if", "then"'),
        (lambda: json_schema({"properties": {"a": {"uniqueItems": True}}}, "f"), 'not supported: "uniqueItems"'),
        (lambda: gbnf("root = 3", "f"), "f: not GBNF (Expected ::= at line 1"),
        (lambda: gbnf('root ::= "a" other', "f"), "f: "),
        (lambda: json_schema({"oneOf": [{"type": "string"}, {"const": "a"}]}, "f"), "f: oneOf"),
        (lambda: json_schema({"type": 5}, "f"), "f: type must be"),
        (lambda: json_schema({"type": "strin"}, "f"), "f: Invalid type: strin"),
        (lambda: json_schema({"properties": []}, "f"), "f: "),
        (lambda: json_schema({"type": "string", "pattern": "("}, "f"), "f: regex parse error"),
        (lambda: json_schema({"type": "string", "pattern": 5}, "f"), "f: Expected string for 'pattern'"),
        (lambda: json_schema({"$ref": "#/$defs/none"}, "f"), "f: Pointer '/$defs/none' does not exist"),
        (lambda: json_schema({"$ref": "http://169.254.169.254/"}, "f"), "f: Resource 'http://169.254.169.254/'"),
        (lambda: json_schema({"$ref": "#"}, "f"), "f: "),
        (lambda: json_schema({"type": "string", "minLength": 3, "maxLength": 2}, "f"), "f: Unsatisfiable schema"),
        (lambda: json_schema({"enum": ["\ud800"]}, "f"), "f: "),
        (lambda: json_schema({"x": float("nan")}, "f"), "f: not a JSON schema"),
        (lambda: json_schema([], "f"), "f must be a JSON schema, an object, not list"),  # type: ignore[arg-type]
        (lambda: json_schema({"x-guidance": {"lenient": True}, "not": {}}, "f"), 'not supported: "not"'),
        (lambda: json_schema({"const": "x" * (1 << 19)}, "f"), "f: its grammar has more than 524288 characters"),
        (lambda: regex("(", "f"), "f: "),
        (lambda: regex("(?=a)b", "f"), "f: "),
        (lambda: regex("a\ud800", "f"), "f: character 1 is a lone surrogate"),
        (lambda: lark("begin: x", "f"), "f: "),
        (lambda: lark('start: "a', "f"), "f: "),
        (lambda: lark('start: "a"', "f", (json_schema({"not": {}}, "part"),)), "part: keywords"),
    ],
)
def test_bad_grammars_are_refused_and_name_their_field(letters: Constrainer, make: Any, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        letters.processor(make())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def nested(levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(levels - 1)}} if levels else {"type": "string"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "works"),
    [
        (lambda: regex("(a+)+$", "f"), True),
        (lambda: regex("(a{1000}){10000}", "f"), False),
        (lambda: regex("(" * 9999 + "a" + ")" * 9999, "f"), False),
        (lambda: regex("[ab]*a[ab]{300}", "f"), True),
        (lambda: json_schema({"type": "object", "properties": {"next": {"$ref": "#"}}}, "f"), True),
        (lambda: json_schema({"enum": [f"value {i}" for i in range(10_000)]}, "f"), True),
        (lambda: json_schema({"enum": [{"a": [i]} for i in range(10_000)]}, "f"), False),
        (lambda: json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}, "f"), False),
        (lambda: json_schema(nested(50), "f"), True),
        (lambda: json_schema(nested(500), "f"), False),
        (lambda: json_schema({"allOf": CONTAIN}, "f"), False),
        (lambda: json_schema({"type": "string", "minLength": 10**9}, "f"), True),
        (lambda: json_schema({"type": "array", "minItems": 10**9}, "f"), True),
        (lambda: lark("start: " + "(" * 9999 + '"a"' + ")" * 9999, "f"), False),
    ],
)  # fmt: skip
def test_hostile_grammars_end(letters: Constrainer, make: Any, works: bool) -> None:
    letters.processor(json_object())  # the process is there
    if works:
        letters.processor(make())
    else:
        with pytest.raises(RequestError, match=r"^f: "):
            letters.processor(make())
    letters.processor(json_object())  # later requests are served


def test_the_cache_is_bounded_by_count_and_size(opened: checkpoint.Checkpoint) -> None:
    constrainer = Constrainer(opened.tokenizer, entries=5, characters=2000)
    for i in range(30):
        constrainer.processor(json_schema({"const": f"value {i}"}, "f"))
    assert len(constrainer._compiled) == 5
    kept = list(constrainer._compiled)
    constrainer.processor(json_schema({"const": "value 25"}, "f"))  # used again, so the next to go is 26
    constrainer.processor(json_schema({"const": "another"}, "f"))
    assert kept[0] in constrainer._compiled
    assert kept[1] not in constrainer._compiled
    constrainer.processor(json_schema({"const": "x" * 1500}, "f"))
    assert sum(map(len, constrainer._compiled)) <= 2000
    constrainer.processor(json_schema({"const": "x" * 3000}, "f"))  # works, but is not kept
    assert not constrainer._compiled


def test_what_others_made_of_a_grammar_does_not_matter(
    letters: Constrainer, opened: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers share a lexer with a limit on its states; one that meets it starts with a lexer of its own."""
    ours, rng = opened.tokenizer, np.random.default_rng(0)
    constraint = regex("(.*a.{300}|.*b.{200})", "f")

    def walk(steps: int) -> None:
        process, tokens = letters.processor(constraint), [0]
        for _ in range(steps):
            logits = rng.gumbel(0, 1, ours.vocab_size).astype(np.float32)
            logits[list(ours.stop_ids)] = -np.inf
            process(logits, np.array(tokens, np.int32), 1)
            tokens.append(int(logits.argmax()))

    made = []
    monkeypatch.setattr(compiler, "matcher", lambda *a, own=compiler.matcher: made.append(0) or own(*a))
    for _ in range(30):
        walk(200)
    assert len(made) > 1


def test_an_answer_that_breaks_the_grammar_is_an_error(letters: Constrainer, opened: checkpoint.Checkpoint) -> None:
    ours = opened.tokenizer
    process = letters.processor(json_object())
    with pytest.raises(EngineError, match="token 2 of the answer: "):
        process(np.zeros(ours.vocab_size, np.float32), np.array([0, *ours.encode("{{")], np.int32), 1)
    logits = np.zeros(ours.vocab_size, np.float32)
    process(logits, np.array([0, *ours.encode("{")], np.int32), 1)  # and no harm is done
    assert np.isfinite(logits).any()


def run(engine: Engine, requests: list[Request]) -> list[list[Event]]:
    """All requests at once."""
    events: dict[int, list[Event]] = {engine.add(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            events[event.request].append(event)
    return list(events.values())


def test_the_same_bytes_with_drafts_and_in_company(opened: checkpoint.Checkpoint, letters: Constrainer) -> None:
    ours = opened.tokenizer
    constraint = json_schema({**PERSON, "required": ["name", "tags"]}, "f")

    def request(seed: int, lookup: int) -> Request:
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        prompt = tuple(ours.encode('{"name": "on", "age": 3, "tags": ["new"]} ' * 2))
        return Request(prompt, 150, sampling, processors=(letters.processor(constraint),), lookup=lookup, logprobs=0)

    def essentials(events: list[Event]) -> list[Any]:
        return [(event.token, event.text, event.finish, event.logprob) for event in events]

    def engine(room: int) -> Engine:
        return Engine(NativeRunner(opened, 200, threads=1), ours, max_batch_tokens=room, max_sequences=8)

    alone = [essentials(run(engine(512), [request(seed, 0)])[0]) for seed in range(6)]
    for lookup in (0, 8):
        together = run(engine(40), [request(seed, lookup) for seed in range(6)])
        assert list(map(essentials, together)) == alone
    assert sum(events[-1].accepted_tokens for events in together) > 20
    ended = [json.loads("".join(text for _, text, *_ in one)) for one in alone if one[-1][2] == "stop"]
    assert ended
    for answer in ended:
        jsonschema.validate(answer, {**PERSON, "required": ["name", "tags"]})


def test_one_answer_that_cannot_go_on_fails_alone(opened: checkpoint.Checkpoint, letters: Constrainer) -> None:
    def broken(logits: NDArray[np.float32], tokens: NDArray[np.int32], n_prompt: int) -> None:
        raise EngineError("the grammar takes too much work")

    ours = opened.tokenizer
    good = Request((1,), 5, processors=(letters.processor(regex("ab", "f")),))
    one, other = run(Engine(NativeRunner(opened, 32, threads=1), ours), [replace(good, processors=(broken,)), good])
    assert one[-1].finish == "error"
    assert "".join(event.text for event in other) == "ab"


def test_the_default_model_answers_as_a_schema_asks(model_path: Path) -> None:
    with llama2.load(model_path, context=512) as model:
        constrainer = Constrainer(model.tokenizer)
        prompt = tuple(model.render("Describe a person as JSON with a name, an age and tags."))

        def ask(constraint: Constraint, seed: int) -> str:
            sampling = Sampling(temperature=0.8, seed=seed)
            events = list(
                model.engine.run(Request(prompt, 200, sampling, processors=(constrainer.processor(constraint),)))
            )
            assert events[-1].finish == "stop"
            return "".join(event.text for event in events)

        for seed in range(3):
            jsonschema.validate(json.loads(ask(json_schema(PERSON, "f"), seed)), PERSON)
        assert re.fullmatch("[0-9]{4}-[0-9]{2}", ask(regex("[0-9]{4}-[0-9]{2}", "f"), 0))


@pytest.mark.parametrize("format", ["password", "binary", "byte", "uri-reference", "nonsense"])
def test_unknown_formats_are_annotations(letters: Constrainer, opened: checkpoint.Checkpoint, format: str) -> None:
    said = allowed(letters, opened.tokenizer, json_schema({"type": "string", "format": format}, "f"), '"a')
    assert said == allowed(letters, opened.tokenizer, json_schema({"type": "string"}, "f"), '"a')


LOOSE: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "integer", "not": {"const": 3}}, "not"),
    ({"type": "integer", "if": {"minimum": 3}, "then": {"maximum": 5}}, "if, then"),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}}, "contains"),
    ({"type": "string", "pattern": "^(?=a)b*$"}, "pattern"),
    ({"type": "string", "pattern": r"^(a)\1$"}, "pattern"),
    ({"oneOf": [{"type": "string"}, {"const": "a"}]}, "oneOf"),
]


@pytest.mark.parametrize(("schema", "dropped"), LOOSE)
def test_what_no_grammar_can_follow_is_dropped_with_a_note_unless_strict(
    letters: Constrainer, schema: dict[str, Any], dropped: str
) -> None:
    loose = json_schema(schema, "f", strict=False)
    assert loose.warnings == (f"f: no grammar can enforce {dropped}",)
    letters.processor(loose)
    with pytest.raises(RequestError, match=r"^f: "):
        letters.processor(json_schema(schema, "f"))


def test_a_null_keyword_is_none(letters: Constrainer) -> None:
    letters.processor(json_schema({"type": "object", "properties": {}, "required": None}, "f"))
    assert json_schema({"const": None}, "f").schema is not None
    assert '"const": null' in str(json_schema({"const": None}, "f").schema)


CLOSED: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"additionalProperties": True}, False),
    ({"additionalProperties": {"type": "string"}}, False),
    ({"patternProperties": {"^b": {"type": "string"}}}, False),
]


@pytest.mark.parametrize(("more", "closed"), CLOSED)
def test_an_object_that_names_its_properties_has_no_others_unless_it_says_so(
    letters: Constrainer, opened: checkpoint.Checkpoint, more: dict[str, Any], closed: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], **more}
    assert ("," not in allowed(letters, opened.tokenizer, json_schema(schema, "f"), '{"a": 1')) is closed


def test_schemas_that_describe_an_object_together_stay_open(
    letters: Constrainer, opened: checkpoint.Checkpoint
) -> None:
    parts = [{"properties": {name: {"const": 1}}, "required": [name]} for name in "ab"]
    constraint = json_schema({"type": "object", "allOf": parts}, "f")
    assert "}" in allowed(letters, opened.tokenizer, constraint, '{"a": 1,"b": 1')


@pytest.mark.parametrize("count", [600, 1000])
def test_many_optional_properties_are_followed(letters: Constrainer, opened: checkpoint.Checkpoint, count: int) -> None:
    names = {f"p{i}": {"type": "integer"} for i in range(count)}
    constraint = json_schema({"type": "object", "properties": names}, "f")
    assert allowed(letters, opened.tokenizer, constraint, '{"p59') >= {'"', *"0123456789"}


def test_a_choice_of_texts(letters: Constrainer, opened: checkpoint.Checkpoint) -> None:
    constraint = choice(["ab", 'a"c'], "f")
    assert allowed(letters, opened.tokenizer, constraint, "a") == {"b", '"'}
    assert allowed(letters, opened.tokenizer, gbnf('root ::= "ab" | "a" [!.]{1,2}', "f"), "a") == {"b", "!", "."}
