"""What vLLM is asked for, and what is refused before. How it answers is tested in contract/test_engine_events.py."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llama2
from llama2 import checkpoint
from llama2.checkpoint import hf_folder
from llama2.engine.cluster import ClusterEngine, sampling_params
from llama2.engine.request import Request, Sampling
from llama2.errors import EngineError, RequestError
from llama2.serve.constrain import constraints
from llama2.serve.errors import to_refusal
from llama2.serve.surfaces.generation import expand_choices
from models import write_tiny_gguf

#: What vLLM draws by without being told (vllm.SamplingParams()).
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
}


def drawn(**settings: Any) -> dict[str, Any]:
    """How vLLM is told to draw."""
    asked = sampling_params(Request((1,), sampling=Sampling(**{"temperature": 1, "top_p": 1} | settings)), 9)
    return {name: asked[name] for name in NEUTRAL}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2, "top_p": 0.5, "top_k": 7, "min_p": 0.25}, None),
        ({"top_p": 0}, {"temperature": 0.0}),  # nothing but the likeliest stays
        ({"repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2}, None),
        ({"logit_bias": {5: -math.inf, 6: 1e9}}, None),
    ],
)
def test_how_tokens_are_drawn(settings: dict[str, Any], changed: dict[str, Any] | None) -> None:
    assert drawn(**settings) == NEUTRAL | (settings if changed is None else changed)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.005}, {"temperature": 2.5}, {"presence_penalty": 3.0}, {"frequency_penalty": -2.1}],
)
def test_what_vllm_would_refuse_or_change_is_refused_by_name(settings: dict[str, float]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(RequestError, match=f"^{name}={value} must be .*vLLM"):
        drawn(**settings)


def test_embeddings_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^pooling: vLLM .* makes no embeddings"):
        sampling_params(Request((1,), 0, pooling="mean"), 0)


def test_continuations_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^continuations: vLLM"):
        sampling_params(Request((1,), 0, continuations=((2,),)), 0)


def test_processors_are_refused_and_so_is_the_field_that_needs_one() -> None:
    with pytest.raises(RequestError, match=r"^processors: "):
        sampling_params(Request((1,), processors=(lambda *_: None,)), 9)
    service: Any = SimpleNamespace(model=SimpleNamespace(engine=ClusterEngine))
    assert expand_choices(service, Request((1,)), 2) == [Request((1,)), Request((1,), choice=1)]
    with pytest.raises(RequestError, match=r"^response_format: ") as refused:
        expand_choices(service, Request((1,)), 1, [constraints.json_object()])
    refusal = to_refusal(refused.value)
    assert (refusal.status_code, refusal.param) == (400, "response_format")


def test_scores() -> None:
    asked = Request((1,), 5)
    for request, own, prompt in [
        (asked, None, None),
        (replace(asked, logprobs=0), 0, None),
        (replace(asked, logprobs=3, score_from=1), 3, 3),
        (replace(asked, score_from=1), None, 0),
    ]:
        told = sampling_params(request, 5)
        assert (told["logprobs"], told["prompt_logprobs"]) == (own, prompt)
        assert told["skip_reading_prefix_cache"] is (request.score_from is not None)
    assert sampling_params(replace(asked, cache_prompt=False), 5)["skip_reading_prefix_cache"]
    assert sampling_params(replace(asked, max_tokens=0, score_from=1), 0)["max_tokens"] == 1


def test_each_seed_and_choice_has_random_numbers_of_its_own() -> None:
    pairs = [(seed, choice) for seed in (0, 1, 11, (1 << 64) - 1) for choice in (0, 1, 11)]
    seeds = {
        sampling_params(Request((1,), sampling=Sampling(seed=seed), choice=choice), 9)["seed"] for seed, choice in pairs
    }
    assert len(seeds) == len(pairs)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_model_that_vllm_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    with pytest.raises(EngineError, match=r"tiny\.gguf: .*llama2 convert tiny\.gguf FOLDER --to hf"):
        llama2.load(path, engine="vllm")
    with pytest.raises(RequestError, match="tensor_parallel"):
        llama2.load(path, tensor_parallel=2)
    with pytest.raises(RequestError, match="threads"):
        llama2.load(path, engine="vllm", threads=1)
    with pytest.raises(RequestError, match="engine='other'"):
        llama2.load(path, engine="other")  # type: ignore[arg-type]
    if importlib.util.find_spec("vllm") is None:
        hf_folder.write(checkpoint.open(path), tmp_path / "folder")
        with pytest.raises(EngineError, match="needs vllm, which is not installed"):
            llama2.load(tmp_path / "folder", engine="vllm")
