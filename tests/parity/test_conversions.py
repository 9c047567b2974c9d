"""What was converted answers in other programs as it does here: transformers, and llama.cpp where its programs are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import checkpoint
from llama2.convert import convert
from models import tiny_config, write_tiny_gguf

#: Models whose greedy text varies, and whose likeliest tokens are ahead of the next by more than caches in 16 bits err.
SEEDS = {
    "MHA": ({"n_kv_heads": 4}, 9),
    "MHA, tied": ({"n_kv_heads": 4, "tied_embeddings": True}, 46),
    "GQA": ({"n_kv_heads": 2}, 36),
    "MQA, tied": ({"n_kv_heads": 1, "tied_embeddings": True}, 52),
}

#: A folder with llama.cpp's llama-server, for the tests that need it.
LLAMA_CPP = os.environ.get("LLAMA_CPP_BIN")


@pytest.fixture(params=[*SEEDS])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    changes, seed = SEEDS[request.param]
    write_tiny_gguf(tmp_path / "source.gguf", config=tiny_config(**changes), seed=seed)
    return tmp_path / "source.gguf"


def answers(receipt: dict[str, Any]) -> tuple[list[int], list[int]]:
    assert receipt["answers"]["bitwise_equal"]
    prompt, tokens = receipt["answers"]["prompt"], receipt["answers"]["tokens"]
    assert len(tokens) == 200
    assert len(set(tokens)) > 20
    return prompt, tokens


def transformers_tokens(folder: Path, prompt: list[int], stops: list[int]) -> list[int]:
    """200 greedy tokens, none of which ends the answer, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        ids = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=200,
            do_sample=False,
            suppress_tokens=stops,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()


def test_transformers_gives_the_same_tokens(source: Path, tmp_path: Path) -> None:
    prompt, tokens = answers(convert(source, tmp_path / "hf", "hf"))
    stops = sorted(checkpoint.open(source).tokenizer.stop_ids)
    assert transformers_tokens(tmp_path / "hf", prompt, stops) == tokens


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP_BIN names no folder with llama.cpp's llama-server")
def test_llama_cpp_gives_the_same_tokens(source: Path, tmp_path: Path) -> None:
    """In float32, its cache included, by way of a folder of Hugging Face's."""
    convert(source, tmp_path / "hf", "hf", run=False)
    prompt, tokens = answers(convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf"))
    stops = sorted(checkpoint.open(source).tokenizer.stop_ids)
    with llama_server(tmp_path / "model.gguf", context=256) as port:
        assert llama_cpp_tokens(port, prompt, stops) == tokens


@contextmanager
def llama_server(model: Path, context: int) -> Iterator[int]:
    """The port of a server that runs a model in one thread."""
    options = ["-c", str(context), "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1", "-np", "1", "-ngl", "0"]
    command = [
        f"{LLAMA_CPP}/llama-server",
        "-m",
        str(model),
        *options,
        "--no-warmup",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    log = model.with_suffix(".log")
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            while not (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))):
                assert server.poll() is None, log.read_text(errors="replace")[-2000:]
            yield int(found[1])
        finally:
            server.terminate()


def llama_cpp_tokens(port: int, prompt: list[int], stops: list[int]) -> list[int]:
    request = {
        "prompt": prompt,
        "n_predict": 200,
        "temperature": 0,
        "return_tokens": True,
        "cache_prompt": False,
        "logit_bias": [[token, False] for token in stops],
    }
    body = json.dumps(request).encode()
    sent = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=120) as response:  # noqa: S310
        tokens: list[int] = json.load(response)["tokens"]
    return tokens
