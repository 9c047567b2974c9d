"""What schemathesis makes of our OpenAPI document, valid and invalid: whatever it sends, no route fails.

Models and lengths are put right, or nearly every request would end at the door. `LLAMA2_SCHEMA_EXAMPLES=500` tries that
many of each kind for every route.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from models import tiny_config, write_tiny_gguf
from serving import Server, serving
from tool_templates import HERMES

EXAMPLES = int(os.environ.get("LLAMA2_SCHEMA_EXAMPLES", "6"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("models") / "caller.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=512), tokenizer="bpe", template=HERMES)
    with serving([path], "--json") as server:
        yield server
        assert not any("Traceback" in line for line in server.messages)


def nearly(body: dict[str, Any]) -> None:
    """Make a body one that may reach the model."""
    if "model" in body:
        body["model"] = "caller"
    if isinstance(body.get("messages"), list) and len(body["messages"]) < 3:
        body["messages"] = [{"role": "user", "content": "to be"}]
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 8:
            body[name] = 8
    if isinstance(body.get("options"), dict):
        body["options"]["num_predict"] = 3


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_no_request_makes_the_server_fail(server: Server, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    for found in document.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case[Any]) -> None:
            if isinstance(case.body, dict):
                nearly(case.body)
            if "model" in case.path_parameters:
                case.path_parameters["model"] = "caller"
            response = case.call()
            statuses[case.operation.label, response.status_code] += 1
            assert response.status_code < 500, (response.status_code, response.text[:500], repr(case.body)[:1000])

        with contextlib.suppress(Unsatisfiable):  # a route that takes nothing cannot be asked wrongly
            ask()
    print(*sorted(statuses.items()), sep="\n")
    assert any(status == 200 for _, status in statuses)
