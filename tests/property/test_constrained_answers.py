"""Random schemas and random answers: what follows a schema's grammar validates, with vocabularies of both kinds."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.serve.constrain.constrainer import Constrainer
from llama2.serve.constrain.constraints import Constraint, json_object, json_schema, regex
from llama2.text import tokenizer_folder
from llama2.text.tokenizer import Tokenizer, from_sentencepiece
from texts import train_bpe, train_sentencepiece

KINDS = ("sentencepiece", "bpe")


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        if kind == "bpe":
            return tokenizer_folder.read(train_bpe("llama-bpe", Path(folder, "tokenizer.json")).parent)
        path = Path(folder, "tokenizer.model")
        path.write_bytes(train_sentencepiece())
        return from_sentencepiece(path)


@cache
def constrainer(kind: str) -> Constrainer:
    return Constrainer(tokenizer(kind))


def answer(
    kind: str, constraint: Constraint, seed: int, *, prompt: str = "", raw_completion: bool = False
) -> str | None:
    """What a network with random logits answers, as its reader sees it; None if it does not end within 400 tokens."""
    ours, rng = tokenizer(kind), np.random.default_rng(seed)
    process = constrainer(kind).processor(constraint, raw_completion=raw_completion)
    tokens = [ours.bos_id or 0, *(ours.encode(prompt) if prompt else [])]
    stream = ours.stream()
    if raw_completion:
        for token in tokens:
            stream.push(token)
    n_prompt, text = len(tokens), ""
    for _ in range(400):
        logits = rng.gumbel(0, 1, ours.vocab_size).astype(np.float32)
        process(logits, np.array(tokens, np.int32), n_prompt)
        tokens.append(int(logits.argmax()))
        assert np.isfinite(logits[tokens[-1]])
        if tokens[-1] in ours.stop_ids:
            return text + stream.flush()
        text += stream.push(tokens[-1])
    return None


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=6)
numbers = st.integers(-999, 999)
leaves: Any = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, numbers, numbers),
    st.builds(
        lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m}, st.integers(0, 3), st.integers(0, 4)
    ),
    st.builds(lambda v: {"enum": v}, st.lists(words | numbers | st.booleans(), min_size=1, max_size=4)),
    st.builds(lambda v: {"const": v}, words | numbers),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": ["integer", "null"], "minimum": 5}]),
)


def objects(values: Any) -> Any:
    return st.dictionaries(words, values, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from([*properties]) if properties else st.nothing()).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )


def arrays(values: Any) -> Any:
    return st.builds(
        lambda items, n, m: {"type": "array", "items": items, "minItems": n, "maxItems": n + m},
        values, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip


schemas = st.recursive(
    leaves,
    lambda inner: (
        objects(inner) | arrays(inner) | st.builds(lambda v: {"anyOf": v}, st.lists(inner, min_size=1, max_size=3))
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32), raw_completion=st.booleans())
def test_an_answer_to_a_schema_validates(kind: str, schema: dict[str, Any], seed: int, raw_completion: bool) -> None:
    said = answer(kind, json_schema(schema, "schema"), seed, prompt="Say it:", raw_completion=raw_completion)
    if said is not None:
        jsonschema.validate(json.loads(said), schema)


@pytest.mark.parametrize("kind", KINDS)
def test_most_random_answers_end(kind: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    said = [answer(kind, json_schema(schema, "schema"), seed) for seed in range(20)]
    assert sum(text is not None for text in said) > 15
    assert {json.loads(text)["a"] for text in said if text is not None} == {1, 2}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    pattern=st.sampled_from(
        [" ?[a-e ]{1,5}", " [ab]", "[0-9]{2}", "(ab|c)*d", " *x", "é+|日本", "(ja|nein)( doch)?", "a|b| |"]
    ),
    seed=st.integers(0, 2**32),
    raw_completion=st.booleans(),
    prompt=st.sampled_from(["", "a", " "]),
)
def test_an_answer_to_a_regular_expression_matches(
    kind: str, pattern: str, seed: int, raw_completion: bool, prompt: str
) -> None:
    """To the last space: those that SentencePiece puts before a text are not the answer's."""
    said = answer(kind, regex(pattern, "regex"), seed, prompt=prompt, raw_completion=raw_completion)
    assert said is None or re.fullmatch(pattern, said)


def test_a_prompt_without_text_begins_one() -> None:
    """Also where the answer continues it, and of the answer `▁a` the space is not seen."""
    for seed in range(10):
        assert answer("sentencepiece", regex(" [ab]", "regex"), seed, raw_completion=True) in (" a", " b", None)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_object_is_one(kind: str, seed: int) -> None:
    said = answer(kind, json_object(), seed)
    assert said is None or isinstance(json.loads(said), dict)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(12)), seed=st.integers(0, 2**32))
def test_masks_depend_on_the_history_alone(kind: str, order: list[int], seed: int) -> None:
    """One processor that is given histories in any order says the same as a new one for each."""
    ours, rng = tokenizer(kind), np.random.default_rng(seed)
    constraint = json_schema({"type": "array", "items": {"type": "integer"}}, "schema")
    tokens, histories = [ours.bos_id or 0], []
    process = constrainer(kind).processor(constraint)
    for _ in range(12):
        logits = rng.gumbel(0, 1, ours.vocab_size).astype(np.float32)
        process(logits, np.array(tokens, np.int32), 1)
        histories.append((np.array(tokens, np.int32), np.isfinite(logits)))
        logits[list(ours.stop_ids)] = -np.inf
        if not np.isfinite(logits.max()):
            break
        tokens.append(int(logits.argmax()))
    for i in order:
        history, allowed = histories[i % len(histories)]
        logits = np.zeros(ours.vocab_size, np.float32)
        process(logits, history, 1)
        assert (np.isfinite(logits) == allowed).all()
