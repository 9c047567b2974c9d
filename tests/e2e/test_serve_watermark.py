"""Watermarks over HTTP: every answer of a model, or those that ask for it; and the detector's route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2.engine.watermark import SynthId
from llama2.safety import keys
from llama2.safety.detection import detect
from serving import ENDLESS, Server, serving, write_model

BODY: dict[str, Any] = {
    **{"model": "tiny", "prompt": "to be or not", "max_tokens": 80, "temperature": 1, "top_p": 1, "seed": 3},
    **{"logit_bias": ENDLESS, "return_token_ids": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    write_model(folder)
    write_model(folder, "other")
    keys.create(folder / "key.toml", "synthid")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, model_path: Path) -> Iterator[Server]:
    """`tiny` and the default model are marked, `other` is not."""
    marks = [f"{name}={folder / 'key.toml'}" for name in ("tiny", model_path.stem)]
    options = [word for mark in marks for word in ("--watermark", mark)]
    with serving([folder / "tiny.gguf", folder / "other.gguf", model_path], *options) as server:
        yield server


def verdict(folder: Path, tokens: list[int]) -> str:
    key = keys.load(folder / "key.toml")
    assert isinstance(key, SynthId)
    return detect(key, np.array(tokens, np.int32), 1 << 20).verdict


def tokens_of(server: Server, path: str = "/v1/completions", **fields: Any) -> tuple[list[int], dict[str, str]]:
    status, headers, answer = server.post(path, {**BODY, **fields})
    assert status == 200, answer
    return answer["choices"][0]["token_ids"], headers


def test_every_answer_of_a_model_is_marked_the_same_in_company(server: Server, folder: Path) -> None:
    alone, _ = tokens_of(server)
    assert verdict(folder, alone) == "marked"
    status, _, many = server.post("/v1/completions", {**BODY, "prompt": [BODY["prompt"], "something else"]})
    assert (status, many["choices"][0]["token_ids"]) == (200, alone)
    assert tokens_of(server, lookup=8)[0] == alone
    assert tokens_of(server, watermark=True)[0] == alone
    assert verdict(folder, tokens_of(server, model="other")[0]) == "not marked"
    message = [{"role": "user", "content": "to be"}]
    chat = {name: value for name, value in BODY.items() if name != "prompt"}
    answer = server.post("/v1/chat/completions", {**chat, "messages": message})[2]
    assert verdict(folder, answer["choices"][0]["token_ids"]) == "marked"


def test_what_cannot_be_is_said(server: Server) -> None:
    for fields, problem in (
        ({"watermark": False}, "every answer of this model is marked"),
        ({"watermark": True, "model": "other"}, "this server has no key for the model"),
    ):
        status, _, answer = server.post("/v1/completions", {**BODY, **fields})
        assert (status, answer["error"]["param"]) == (400, "watermark")
        assert problem in answer["error"]["message"]
    _, headers = tokens_of(server, temperature=0)
    assert "nothing is marked" in headers["warning"]
    status, _, answer = server.post("/v1/watermark/detect", {"model": "other", "input": "x"})
    assert (status, answer["error"]["code"]) == (404, "no_watermark")
    status, _, answer = server.post("/v1/watermark/detect", {"model": "tiny", "input": "x" * 300_000})
    assert status == 400
    assert "the limit is 200000" in answer["error"]["message"]


def test_the_detectors_route_finds_the_default_models_text(server: Server, model_path: Path) -> None:
    body = {**BODY, "model": model_path.stem, "prompt": "The history of bread began", "max_tokens": 100}
    text = server.post("/v1/completions", body)[2]["choices"][0]["text"]
    asked = {"model": model_path.stem, "input": [text, "It was the best of times, " * 9, "short"]}
    found = server.post("/v1/watermark/detect", asked)[2]["data"]
    assert found[0]["verdict"] == "marked"
    assert found[0]["p_value"] < 1e-4
    assert found[2]["verdict"] == "cannot say"
    assert found[2]["p_value"] is None


def test_on_request_alone(folder: Path) -> None:
    with serving([folder / "tiny.gguf"], "--watermark", str(folder / "key.toml"), "--watermark-on-request") as server:
        assert verdict(folder, tokens_of(server)[0]) == "not marked"
        assert verdict(folder, tokens_of(server, watermark=True)[0]) == "marked"
        body = {
            "prompt": "to be",
            "n_predict": 60,
            "temperature": 1,
            "top_p": 1,
            "ignore_eos": True,
            "return_tokens": True,
        }
        assert verdict(folder, server.post("/completion", {**body, "watermark": True})[2]["tokens"]) == "marked"
        assert verdict(folder, server.post("/completion", body)[2]["tokens"]) == "not marked"
