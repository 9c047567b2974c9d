"""How tokens are sampled, by the names of llama.cpp and Ollama."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from pydantic import Field

from llama2.engine.processors import keep_typical, penalise_recent
from llama2.engine.request import Processor, Request, Sampling
from llama2.serve.errors import unsupported
from llama2.serve.service import Service
from llama2.serve.surfaces.wire import Wire


class LlamaCppSampling(Wire):
    """How tokens are sampled; fields that are not given have the server's defaults.

    Penalties count every token, unless `repeat_last_n` is given.
    """

    temperature: float | None = Field(None, ge=-100, le=100)  # below 0: greedy
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repeat_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    repeat_last_n: int | None = Field(None, ge=-1, lt=1 << 62)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)  # below 0: a random one


def sampling_and_processors(
    given: LlamaCppSampling, service: Service, prefix: str = ""
) -> tuple[Sampling, tuple[Processor, ...]]:
    """How tokens are sampled, and what changes logits before. Raises Refusal that names a field after `prefix`."""
    default = service.sampling
    penalties = {
        "repetition": default.repetition_penalty if given.repeat_penalty is None else given.repeat_penalty,
        "presence": default.presence_penalty if given.presence_penalty is None else given.presence_penalty,
        "frequency": default.frequency_penalty if given.frequency_penalty is None else given.frequency_penalty,
    }
    none = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    processors = []
    if given.repeat_last_n is not None and given.repeat_last_n >= 0:
        if given.repeat_last_n and penalties != none:
            processors.append(penalise_recent(given.repeat_last_n, **penalties))
        penalties = none
    if given.typical_p is not None and given.typical_p < 1:
        processors.append(keep_typical(given.typical_p))
    if processors and not service.model.engine.runs_processors:
        raise unsupported(f"{prefix}typical_p, {prefix}repeat_last_n", "this engine has neither")
    values = {
        "temperature": None if given.temperature is None else max(0.0, given.temperature),
        "top_k": None if given.top_k is None else max(0, given.top_k),
        "top_p": given.top_p,
        "min_p": given.min_p,
        "seed": secrets.randbits(32) if given.seed is None or given.seed < 0 else given.seed,
        **{f"{name}_penalty": value for name, value in penalties.items()},
    }
    chosen: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return replace(default, **chosen), tuple(processors)


def sampling_json(request: Request) -> dict[str, Any]:
    """How a request's tokens are sampled, by llama.cpp's names; nothing of its texts."""
    s = request.sampling
    return {
        "n_predict": -1 if request.max_tokens is None else request.max_tokens,
        "seed": s.seed,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "repeat_last_n": -1,
        "repeat_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "n_probs": request.logprobs or 0,
    }
