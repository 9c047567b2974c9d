"""Watermarks in the engine, their key files, and the detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

import llama2
from llama2.cli.main import program
from llama2.engine.answer import collect
from llama2.engine.request import Request, Sampling
from llama2.engine.sampling import Sampler
from llama2.engine.watermark import HISTORY, Kgw, Marking, SynthId
from llama2.errors import RequestError, SafetyError
from llama2.safety import keys
from llama2.safety.detection import LEAST, binomial_tail, detect
from serving import write_model

rng = np.random.default_rng(1)
SYNTHID = SynthId(tuple(rng.integers(0, 2**63, 30).tolist()))
KGW = Kgw(987654321)
V = 1000


def drawn(watermark: Any, count: int, temperature: float = 1.0, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    """An answer of a model whose logits are flat over 50 random tokens at each place."""
    sampler = Sampler(Request((1,), sampling=Sampling(temperature, 1.0, seed=seed), watermark=watermark))
    generator, tokens = np.random.default_rng(seed), [1]
    for _ in range(count):
        logits = np.full(V, -np.inf, np.float32)
        logits[generator.choice(V, 50, replace=False)] = 0
        tokens.append(sampler.draw(logits, np.array(tokens, np.int32)))
    return np.array(tokens[1:], np.int32)


@pytest.mark.parametrize("watermark", [SYNTHID, KGW])
def test_what_is_marked_is_found_by_its_key_alone(watermark: Any) -> None:
    marked = drawn(watermark, 100)
    found = detect(watermark, marked, V)
    assert (found.verdict, found.scored) == ("marked", 100 - watermark.context)
    assert found.p_value is not None
    assert found.p_value < 1e-6
    other = SynthId(tuple(key + 12345 for key in SYNTHID.keys[:5])) if watermark is SYNTHID else Kgw(4711)
    assert detect(other, marked, V).verdict == "not marked"
    assert detect(watermark, drawn(None, 100), V).verdict == "not marked"
    half = detect(watermark, marked[50:], V)
    assert half.verdict == "marked"


def test_too_little_text_is_no_evidence() -> None:
    found = detect(SYNTHID, drawn(SYNTHID, LEAST + 3), V)
    assert (found.verdict, found.scored, found.p_value) == ("cannot say", LEAST - 1, None)
    assert detect(SYNTHID, drawn(SYNTHID, LEAST + 4), V).verdict != "cannot say"
    assert detect(SYNTHID, np.array([], np.int32), V).verdict == "cannot say"
    repeated = np.tile(drawn(SYNTHID, 20), 40)  # one text again and again is no more evidence than once
    assert detect(SYNTHID, repeated, V).scored < LEAST


def test_nothing_is_marked_at_temperature_0() -> None:
    assert (drawn(SYNTHID, 30, temperature=0) == drawn(None, 30, temperature=0)).all()


@pytest.mark.parametrize("watermark", [SYNTHID, KGW])
def test_what_is_far_below_the_likeliest_keeps_its_share(watermark: Any) -> None:
    """Two likely tokens, and 40,000 whose logits are 9 lower: these are drawn in 40000 e⁻⁹ / (2 + 40000 e⁻⁹) of all."""
    logits = np.full(40_002, -9, np.float32)
    logits[:2] = 0
    sampler = Sampler(Request((1,), sampling=Sampling(1.0, 1.0, seed=2), watermark=watermark))
    tokens = [1]
    for _ in range(600):
        tokens.append(sampler.draw(logits.copy(), np.array(tokens, np.int32)))
    tail = 40_000 * np.exp(-9)
    bias = np.exp(KGW.bias) if watermark is KGW else 1  # a green list may lift the likely ones
    share = np.mean(np.array(tokens[1:]) > 1)
    assert tail / (2 * bias + tail) - 0.06 < share < tail / (2 + tail) + 0.06


@pytest.mark.parametrize("watermark", [SYNTHID, KGW])
def test_p_values_of_unmarked_text_are_uniform(watermark: Any) -> None:
    """1,000 texts of 100 random tokens. A sum has few values, so ties are broken at random for the test."""
    found = [detect(watermark, rng.integers(0, V, 100).astype(np.int32), V) for _ in range(1000)]
    p = [each.p_value or 0.0 for each in found]
    above = [binomial_tail(each.set_bits + 1, each.bits, each.expected) for each in found]
    broken = [low + rng.random() * (high - low) for low, high in zip(above, p, strict=True)]
    assert kstest(broken, "uniform").pvalue > 0.001
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level / 1000)


@given(st.integers(0, 3000), st.integers(1, 3000), st.floats(0.05, 0.95))
def test_the_tail_is_scipys(successes: int, trials: int, probability: float) -> None:
    successes = min(successes, trials)
    assert binomial_tail(successes, trials, probability) == pytest.approx(
        binom.sf(successes - 1, trials, probability), rel=1e-8, abs=1e-12
    )


def test_a_context_marks_once() -> None:
    marking = Marking(SynthId((1,), ngram=3), prompt_length=1)
    places = [marking.at(np.array([9, *answer], np.int32)) is not None for answer in ([], [1], [1, 2], [1, 2, 1])]
    assert places == [False, False, True, True]
    assert marking.at(np.array([9, 1, 2, 1, 2], np.int32)) is None
    assert marking.at(np.array([9] * (HISTORY + 5) + [2, 1], np.int32)) is not None  # long ago


def test_an_engines_answers_are_marked_and_the_same_in_company(tmp_path: Path) -> None:
    with llama2.load(write_model(tmp_path), threads=1) as model:
        bias = {2: -100.0, 0: -100.0}
        options: dict[str, Any] = {"max_tokens": 80, "sampling": Sampling(1.0, 1.0, logit_bias=bias, seed=3)}
        prompt = tuple(model.encode("to be or not"))
        asked = [Request(prompt, **options, watermark=mark, lookup=n) for mark in (SYNTHID, KGW, None) for n in (0, 8)]
        together = [answer.token_ids for answer in collect(model.engine.run(*asked), asked)]
        alone = [collect(model.engine.run(one), [one])[0].token_ids for one in asked]
        assert together == alone
        assert together[0] == together[1] != together[4]
        size = model.config.vocab_size
        verdicts = [detect(SYNTHID, np.array(tokens, np.int32), size).verdict for tokens in together[::2]]
        assert verdicts == ["marked", "not marked", "not marked"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SynthId(()),
        lambda: SynthId((1,) * 33),
        lambda: SynthId((-1,)),
        lambda: SynthId((1,), 1),
        lambda: Kgw(0),
        lambda: Kgw(1, share=1.0),
        lambda: Kgw(1, bias=0),
        lambda: Request((1,), watermark="key"),  # type: ignore[arg-type]
    ],
)
def test_a_watermark_out_of_range_is_refused(make: Any) -> None:
    with pytest.raises(RequestError, match="watermark"):
        make()


def test_key_files(tmp_path: Path) -> None:
    for scheme in ("synthid", "kgw"):
        path = tmp_path / f"{scheme}.toml"
        made = keys.create(path, scheme)  # type: ignore[arg-type]
        assert keys.load(path) == made
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(SafetyError, match="is there already"):
            keys.create(path, scheme)  # type: ignore[arg-type]
    assert len(set(made.keys if isinstance(made, SynthId) else ())) in (0, 30)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("-----BEGIN PRIVATE KEY-----\nMIGH", "it is not TOML"),
        ('[categories.spam]\naction = "log"', "its scheme is None"),
        ('scheme = "gumbel"\nkey = 1', "its scheme is 'gumbel'"),
        ('scheme = "kgw"\nkey = 1\nshare = 0.5', "bias is missing"),
        ('scheme = "kgw"\nkey = 1\nshare = 0.5\nbias = 2\ndelta = 1', "delta is unknown"),
        ('scheme = "kgw"\nkey = "x"\nshare = 0.5\nbias = 2', "'x' is not a whole number"),
        ('scheme = "synthid"\nkeys = []\nngram = 5', "needs 1 to 32 keys"),
        ('scheme = "synthid"\nkeys = 5\nngram = 5', "not iterable"),
    ],
)
def test_a_key_file_of_the_wrong_kind_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "key.toml"
    path.write_text(text)
    with pytest.raises(SafetyError) as found:
        keys.load(path)
    assert str(found.value).startswith(f"{path}: is not a watermark's key (")
    assert problem in str(found.value)
    assert "\n" not in str(found.value)


def test_the_commands_make_a_key_mark_an_answer_and_find_it(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default model, whose text is tokenized anew as it was drawn."""

    def run(command: str, *words: str) -> str:
        program(command)([command, *words], prog_name="llama2", standalone_mode=False)
        return capsys.readouterr().out

    model, key = str(model_path), str(tmp_path / "key.toml")
    assert key in run("watermark", "key", "--out", key)
    bias = [word for token in ("0", "2") for word in ("--logit-bias", f"{token}=-100")]  # both end a text
    sampling = ("--temperature", "1", "--top-p", "1", "--seed", "5", "--max-tokens", "100", *bias)
    marked = run("generate", "-m", model, "The history of bread began", "--watermark", key, *sampling)
    plain = run("generate", "-m", model, "The history of bread began", *sampling)
    found = json.loads(run("watermark", "detect", marked, "-m", model, "--key", key, "--json"))
    assert (found["verdict"], found["level"]) == ("marked", 0.01)
    assert "not marked" in run("watermark", "detect", plain, "-m", model, "--key", key)
    assert "cannot say" in run("watermark", "detect", "short", "-m", model, "--key", key)
