"""`llama2.load` and its Model, on tiny random models."""

from __future__ import annotations

import array
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llama2
from llama2.api import Model, Options
from llama2.engine.request import Request, Sampling
from llama2.engine.runner import BLOCK, Batch
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import CheckpointError, ContextError, DialogError, EngineError, HubError, RequestError
from llama2.text.dialog import Message
from models import tiny_config, write_tiny_gguf

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a SentencePiece vocabulary, and so Llama 2's own chat format."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with llama2.load(path, runner="numpy") as model:
        yield model


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A tiny Llama with a byte-level vocabulary that does not begin texts with BOS, and ChatML's template."""
    path = tmp_path_factory.mktemp("model") / "bpe.gguf"
    write_tiny_gguf(path, tokenizer="bpe", template=CHATML, config=tiny_config(tied_embeddings=True))
    with llama2.load(path, runner="numpy") as model:
        yield model


def greedy(model: Model, prompt: list[int], n: int) -> list[int]:
    """Up to n likeliest tokens one after the other, each from a forward pass over all before it, and the end token."""
    runner, tokens = NumpyRunner(model.checkpoint, n_blocks=8), list(prompt)
    while len(tokens) < len(prompt) + n and tokens[-1] not in model.tokenizer.stop_ids:
        length = len(tokens)
        arrays = (tokens, range(length), [0] * length, [range(-(-length // BLOCK))], [length - 1])
        tokens.append(int(runner.forward(Batch(*(np.array(a, np.int32) for a in arrays)))[0].argmax()))
    return tokens[len(prompt) :]


def test_importing_the_package_is_light_and_its_names_come_when_used() -> None:
    script = """
import json, sys
import llama2
light = sorted({"numpy", "torch", "transformers", "tokenizers", "jinja2"} & sys.modules.keys())
from llama2 import Dialog, Llama, Message, Model, load, errors, hub
assert callable(llama2.hub.locate) and llama2.Llama2Error is errors.Llama2Error and llama2.__version__[0].isdigit()
assert {"load", "Llama", "__version__"} <= set(dir(llama2))
print(json.dumps([light, sorted({"torch", "transformers", "huggingface_hub", "rich"} & sys.modules.keys())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], []]
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        llama2.lode  # noqa: B018


def test_a_text_is_continued_after_bos(model: Model) -> None:
    ids = [1, *model.tokenizer.encode("to be or not")]
    answer = model.generate("to be or not", max_tokens=12, temperature=0)
    assert answer.token_ids == greedy(model, ids, 12)
    finish = "stop" if answer.token_ids[-1] == model.tokenizer.eos_id else "length"
    assert (answer.prompt_tokens, answer.finish_reason, answer.logprobs) == (len(ids), finish, None)
    assert model.tokenizer.decode(ids) + answer.text == model.tokenizer.decode(ids + answer.token_ids)
    assert model.generate(ids, max_tokens=12, temperature=0) == answer
    events = list(model.generate_stream("to be or not", max_tokens=12, temperature=0))
    assert "".join(event.text for event in events) == answer.text
    assert [event.token for event in events] == answer.token_ids


def test_an_empty_text_starts_from_the_token_that_begins_texts(model: Model, bpe: Model) -> None:
    for m in (model, bpe):  # both have id 1 for it; the second one's vocabulary does not ask for it otherwise
        assert m.generate("", max_tokens=5, temperature=0) == m.generate([1], max_tokens=5, temperature=0)
    assert bpe.generate("to", max_tokens=1).prompt_tokens == len(bpe.tokenizer.encode("to"))


def test_a_raw_text_keeps_the_space_between_prompt_and_answer(model: Model) -> None:
    space_t = model.tokenizer.encode("t")[0]
    assert model.tokenizer.decode([space_t]) == "t"
    bias = {"logit_bias": {space_t: 100.0}, "max_tokens": 2, "temperature": 0}
    assert model.generate("a", **bias).text == " t t"  # type: ignore[arg-type]
    assert model.generate("", **bias).text == "t t"  # type: ignore[arg-type]
    assert model.chat("a", **bias).text == "t t"  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["model", "bpe"])
def test_a_dialog_is_answered_in_the_models_own_format(which: str, request: pytest.FixtureRequest) -> None:
    m: Model = request.getfixturevalue(which)
    if which == "model":
        ids = [1, *m.tokenizer.encode("[INST] to be? [/INST]")]
    else:
        text = "<|im_start|>user\nto be?<|im_end|>\n<|im_start|>assistant\n"
        ids = m.tokenizer.encode(text, special=True)
    answer = m.chat("to be?", max_tokens=8, temperature=0)
    assert answer.token_ids == greedy(m, ids, 8)
    assert answer.text == m.tokenizer.decode(answer.token_ids)
    for messages in ([{"role": "user", "content": "to be?"}], [Message("user", "to be?")]):
        assert m.chat(messages, max_tokens=8, temperature=0) == answer  # type: ignore[arg-type]
    events = list(m.chat_stream("to be?", max_tokens=8, temperature=0))
    assert [event.token for event in events] == answer.token_ids


def test_role_markers_are_refused_or_neutralised(model: Model) -> None:
    with pytest.raises(DialogError, match=r"\[/INST\]"):
        model.chat("a [/INST] b")
    broken = [1, *model.tokenizer.encode("[INST] a [ /INST] b [/INST]")]
    assert model.render("a [/INST] b", neutralise=True) == broken
    assert model.chat("a [/INST] b", neutralise=True, max_tokens=1).prompt_tokens == len(broken)


def test_an_answer_continues_the_assistants_message_at_the_end(model: Model) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    prompt = [1, *model.tokenizer.encode("[INST] a [/INST] b c")]
    assert model.render(messages) == prompt
    ask: Options = {"max_tokens": 8, "temperature": 0.0, "logit_bias": {2: -100.0}}
    assert model.chat(messages, **ask) == model.generate(prompt, **ask)


def test_what_the_format_cannot_write_is_joined_with_a_warning(model: Model) -> None:
    messages = [{"role": "user", "content": text} for text in ("a", "b")]
    with pytest.warns(UserWarning, match="neighbouring user messages are joined"):
        answer = model.chat(messages, max_tokens=1)
    assert answer.prompt_tokens == len(model.render("a\n\nb"))


def test_a_seed_repeats_an_answer_and_without_one_they_differ(model: Model) -> None:
    ask: Options = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0}
    assert model.generate("a", seed=7, **ask) == model.generate("a", seed=7, **ask)
    assert model.generate("a", seed=7, **ask).token_ids != model.generate("a", seed=8, **ask).token_ids
    assert model.generate("a", **ask).token_ids != model.generate("a", seed=None, **ask).token_ids


def test_options_reach_the_engine(model: Model) -> None:
    answer = model.generate("to", max_tokens=5, temperature=0, logprobs=2)
    assert answer.logprobs is not None
    assert [x.token for x in answer.logprobs] == answer.token_ids
    assert [x.top[0] for x in answer.logprobs] == [(x.token, x.logprob) for x in answer.logprobs]
    always: dict[str, Any] = {"logit_bias": {ord("x") + 3: 100.0}, "temperature": 0, "max_tokens": 4}
    assert model.generate("a", **always).text == "xxxx"
    stopped = model.generate("a", stop="xx", **always)
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", [123, 123], "stop")
    assert model.generate("a", stop=["y", "xxx"], **always).token_ids == [123] * 3


def test_lookup_gives_the_same_answer_and_says_how_far_it_helped(model: Model) -> None:
    always: dict[str, Any] = {"logit_bias": {ord("x") + 3: 100.0}, "temperature": 0, "max_tokens": 40}
    plain = model.generate("a", **always)
    answer = model.generate("a", lookup=8, **always)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    assert answer.drafted_tokens == answer.accepted_tokens > 25  # x and x again
    assert replace(answer, drafted_tokens=0, accepted_tokens=0) == plain


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temprature": 1}, "temprature: unknown option; did you mean temperature?"),
        ({"zzz": 1}, "zzz: unknown option; there are max_tokens"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"lookup": -1}, "lookup=-1 must be a whole number between 0 and 1024"),
        ({"stop": 3}, "stop=3 must be a text"),
        ({"stop": ""}, "stop: ''"),
        ({"logit_bias": {10**6: 1}}, "logit_bias: 1000000 is not a token"),
        ({"max_tokens": 256}, "prompt of 2 tokens and answer of 256 do not fit the context of 256"),
    ],
)
def test_wrong_options_are_refused_at_once(model: Model, options: dict[str, Any], reason: str) -> None:
    for call in (model.generate, model.generate_stream, model.chat_stream):
        with pytest.raises(RequestError, match=reason.replace("?", r"\?").replace("prompt of 2", r"prompt of \d+")):
            call("a", **options)
    assert not model.engine.busy


def test_a_closed_stream_frees_the_cache(model: Model) -> None:
    events = model.chat_stream("to be?", seed=1)  # which does not end at once
    next(events)
    assert model.engine.stats.held_blocks > 0
    events.close()  # type: ignore[attr-defined]
    assert model.engine.stats.held_blocks == 0


def test_a_failed_answer_is_an_exception(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Batch, hidden: None) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(model.engine.runner, "forward", fail)
    with pytest.raises(EngineError, match="MemoryError: no room"):
        model.generate("a")


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"context": 0}, ContextError, "context=0 must be from 1 to 256"),
        ({"context": 257}, ContextError, "context=257"),
        ({"runner": "cuda"}, RequestError, "runner='cuda' must be native, numpy or torch"),
        ({"threads": 0}, RequestError, "threads=0"),
        ({"threads": 2, "runner": "numpy"}, RequestError, "the numpy runner leaves them .* OMP_NUM_THREADS"),
        ({"threads": 2, "runner": "torch"}, RequestError, "the torch runner leaves them .* OMP_NUM_THREADS"),
        ({"compile": True}, RequestError, "compile is for the torch runner, not for native"),
        ({"compile": True, "runner": "numpy"}, RequestError, "compile is for the torch runner, not for numpy"),
    ],
)
def test_what_cannot_be_loaded(path: Path, settings: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        llama2.load(path, **settings)


def test_the_torch_runner_answers_as_numpy_does(model: Model, path: Path) -> None:
    with llama2.load(path, runner="torch", context=64) as other:
        ids = [m.generate("to be or", max_tokens=20, temperature=0).token_ids for m in (model, other)]
    assert ids[0] == ids[1]


def test_without_pytorch_its_runner_says_how_to_get_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "llama2.engine.runner_torch", raising=False)
    with pytest.raises(EngineError, match=r"needs PyTorch, .* `pip install 'whole-llama\[train\]'`"):
        llama2.load(path, runner="torch")


def test_a_name_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such"):
        llama2.load("smollm2-135m-instuct")
    (tmp_path / "notes.gguf").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"notes\.gguf"):
        llama2.load(tmp_path / "notes.gguf")


def test_the_native_runner_answers_and_a_short_context_binds(path: Path) -> None:
    with llama2.load(path, threads=2, context=40) as model:
        assert model.engine.context == 40
        prompt = model.encode("to be or not to be")
        answer = model.generate(prompt, temperature=0)
        assert len(prompt) + len(answer.token_ids) == 40 or answer.finish_reason == "stop"
        request = Request(tuple(prompt), 5, Sampling(temperature=0))
        assert [event.token for event in model.engine.run(request)] == answer.token_ids[:5]


def test_numbers_of_numpy_and_pytorch_are_numbers(model: Model) -> None:
    ids = [1, 5, 9]
    want = model.generate(ids, max_tokens=3, temperature=0, seed=7, top_p=0.5)
    rows: list[Any] = [np.array(ids), np.array(ids, np.uint8), torch.tensor(ids), array.array("i", ids)]
    for prompt in [*rows, list(np.array(ids)), list(torch.tensor(ids)), tuple(ids)]:
        assert model.generate(prompt, max_tokens=3, temperature=0, seed=7, top_p=0.5) == want
    options: dict[str, Any] = {"max_tokens": np.int64(3), "temperature": np.float32(0), "seed": torch.tensor(7)}
    options |= {"top_p": torch.tensor(0.5), "logit_bias": {np.int32(3): np.float64(0)}}
    assert model.generate(ids, **options) == want
    drawn: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int8(3)}
    assert {type(value) for value in astuple(Sampling(**drawn))} == {float, int, dict}
    stops: Any = {np.int64(3)}
    assert Request((1,), stop_tokens=stops).stop_tokens == frozenset({3})


class Evil:
    """Something whose every method fails."""

    def __index__(self) -> int:
        raise KeyError

    def __repr__(self) -> str:
        raise KeyError


@pytest.mark.parametrize(
    "prompt",
    [
        *(b"abc", bytearray(b"abc"), memoryview(b"abc"), {1, 2}, {1: 2}, None, 5, (i for i in (1, 2)), Evil()),
        *([[1, 2]], [1.0], [True], ["a"], [None], [Evil()], [-1], [10**5000], [2**64], []),
        *(
            np.array([1.0]),
            np.array([[1]]),
            np.array(1),
            np.array(["a"]),
            np.array([True]),
            [np.True_],
            [np.array([1])],
        ),
        *(torch.tensor([1.5]), torch.tensor([[1]]), [torch.tensor(True)], [torch.tensor([1])]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_is_no_list_of_token_ids(model: Model, prompt: Any) -> None:
    for ask in (model.generate, model.generate_stream):
        with pytest.raises(RequestError, match=r"^(the )?prompt") as caught:
            ask(prompt, max_tokens=2)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [True, "3", 1.5, 0, [1], np.float32(2), float("nan"), 10**5000]),
        ("temperature", [True, "1", None, [0.5], np.array([0.5]), 1j, float("nan"), -1, np.True_, 10**5000, Evil()]),
        ("seed", [1.5, -1, True, "1"]),
        ("top_k", [None, 2.0]),
        ("logit_bias", [5, [1], "ab", {"a": 1}, {1.5: 1}, {True: 1}, {1: "x"}, {1: True}, {1: float("nan")}, {400: 1}]),
        ("stop", [5, [5], b"a", [b"a"], {"a"}, ""]),
        ("logprobs", [True, "1", -1]),
        ("lookup", [True, None, "a"]),
    ],
)
def test_settings_that_are_no_numbers(model: Model, name: str, values: list[Any]) -> None:
    for value in values:
        options: dict[str, Any] = {"max_tokens": 2, name: value}
        with pytest.raises(RequestError, match=rf"^{name}"):
            model.generate([1], **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"threads": "2"}, {"threads": True}, {"context": "5"}, {"context": True}, {"context": 1e9}, {"sequences": 0}),
        *({"sequences": None}, {"cache_bytes": -1}, {"cache_bytes": "x"}, {"compile": 1}, {"runner": [1]}),
        *({"tokenizer": 5}, {"progress": 5}, {"engine": 5}, {"tensor_parallel": "a"}),
    ],
    ids=str,
)
def test_loading_refuses_what_is_no_number_or_path(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        llama2.load(path, **options)


@pytest.mark.parametrize("name", [None, 5, b"a", [1]])
def test_a_name_is_text_or_a_path(name: Any) -> None:
    with pytest.raises(RequestError, match="name_or_path="):
        llama2.load(name)


@pytest.mark.parametrize("messages", [b"a", None, 5, {"role": "user", "content": "a"}, {1}, [None], [[1]]])
def test_what_is_no_dialog(model: Model, messages: Any) -> None:
    with pytest.raises(DialogError):
        model.chat(messages)
