"""A text that is refused by its bytes has more tokens than the context, whatever it is and whoever encodes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama2.checkpoint.opening import open as open_checkpoint
from llama2.errors import ContextError
from llama2.serve import text_limit
from llama2.serve.text_limit import TextLimit
from llama2.text.tokenizer import Tokenizer
from models import tiny_config, write_tiny_gguf

#: Runs of one letter, words, code, parts of letters, control tokens: what a tokenizer makes the fewest tokens of.
PIECES = st.sampled_from(
    [
        "a",
        "aa",
        "the ",
        " ",
        "    ",
        "\n",
        "=",
        "#",
        "é",
        "e\u0301",
        "각",
        "\u1100\u1161\u11a8",
        "😀",
        "</s>",
        "<s>",
        "0",
    ]
)
CONTEXTS = (1, 2, 5, 13, 64)
TEXTS = st.one_of(
    st.tuples(PIECES, st.integers(1, 400)).map(lambda run: run[0] * run[1]),
    st.lists(PIECES, max_size=200).map("".join),
    st.text(max_size=100),
)


@pytest.fixture(scope="module", params=["sentencepiece", "bpe", "default"])
def limits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, list[TextLimit]]:
    """A tokenizer, and the limits of small contexts."""
    path: Path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    if request.param == "default":
        path = request.getfixturevalue("model_path")
    else:
        write_tiny_gguf(path, config=tiny_config(), tokenizer=request.param)
    tokenizer = open_checkpoint(path).tokenizer
    return tokenizer, [TextLimit(tokenizer, context) for context in CONTEXTS]


@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_refused_could_not_fit(
    limits: tuple[Tokenizer, list[TextLimit]], monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.setattr(text_limit, "_SHORT", 0)
    tokenizer, each = limits
    tokens = min(sum(len(tokenizer.encode(text, special=special)) for text in texts) for special in (False, True))
    for context, limit in zip(CONTEXTS, each, strict=True):
        assert tokens > context or fits(limit, texts)


def fits(limit: TextLimit, texts: list[str]) -> bool:
    try:
        limit.check(*texts)
    except ContextError:
        return False
    return True


def test_by_hand(model_path: Path) -> None:
    """The default model's longest token of letters a has four of them, as it encodes 100,000 in 25,000."""
    tokenizer = open_checkpoint(model_path).tokenizer
    assert len(tokenizer.encode("a" * 100_000)) == 25_000
    limit = TextLimit(tokenizer, 8192)
    limit.check("a" * 8192 * 4)
    with pytest.raises(ContextError, match="of 8192 tokens, which hold at most 32768 bytes of it"):
        limit.check("a" * (8192 * 4 + 1))
    limit.check_count(8192, "messages")
    with pytest.raises(ContextError, match="at most 8192 messages fit"):
        limit.check_count(8193, "messages")
