"""How the tokens of an answer are sampled, and what ends it: fields of a request → the engine's `Request`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request as HttpRequest

from llama2.engine.request import Request, Sampling
from llama2.serve.errors import Refusal
from llama2.serve.service import Service
from llama2.serve.surfaces.context import models_of, warn
from llama2.serve.surfaces.wire import SamplingRequest


def base_request(
    body: SamplingRequest, service: Service, http: HttpRequest, max_tokens: int | None, logprobs: int | None
) -> Request:
    """The engine's request without a prompt."""
    return Request(
        (),
        max_tokens,
        sampling_of(body, service),
        stop_strings(http, body.stop, "an empty stop ends nothing"),
        frozenset(body.stop_token_ids or ()),
        logprobs,
        score_from=1 if max_tokens == 0 else None,  # no token is sampled
        lookup=models_of(http).settings.lookup if body.lookup is None else body.lookup,
    )


def sampling_of(body: SamplingRequest, service: Service) -> Sampling:
    """How tokens are sampled; fields that are not given have the server's defaults."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise Refusal(400, "logit_bias: names must be token ids", param="logit_bias", code="invalid_value") from None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    seed = secrets.randbits(32) if body.seed is None else body.seed % (1 << 64)
    return replace(service.sampling, **given, seed=seed, logit_bias=bias)


def stop_strings(http: HttpRequest, given: str | Sequence[str] | None, note: str) -> tuple[str, ...]:
    """Texts that end an answer. Empty ones end nothing; `note` is the warning about them."""
    texts = [given] if isinstance(given, str) else given or []
    if "" in texts:
        warn(http, note)
    return tuple(filter(None, texts))


def min_tokens_of(body: SamplingRequest) -> int | None:
    """How many tokens an answer has at least; None: as many as it may have."""
    return None if body.ignore_eos else body.min_tokens or 0
