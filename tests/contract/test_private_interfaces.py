"""Private interfaces of other libraries that this project uses (docs/decisions/0021) are still what they were."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def parameters(function: Callable[..., Any]) -> list[str]:
    return [*inspect.signature(function).parameters]


def test_uvicorn_connections() -> None:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    assert parameters(HttpToolsProtocol._start_asgi_task) == ["self", "cycle", "app"]
    assert parameters(HttpToolsProtocol._unset_keepalive_if_required) == ["self"]
    assert parameters(HttpToolsProtocol.send_400_response) == ["self", "msg"]
    for name in ("on_header", "on_headers_complete", "on_body", "on_message_complete", "on_response_complete"):
        assert callable(getattr(HttpToolsProtocol, name)), name
    source = inspect.getsource(HttpToolsProtocol)
    for name in ("loop", "transport", "parser", "headers", "cycle", "pipeline", "connections", "url"):
        assert f"self.{name}" in source, name
    source = inspect.getsource(RequestResponseCycle.__init__)
    for name in (
        *("scope", "keep_alive", "default_headers", "message_event", "more_body", "disconnected", "response_started"),
        *("response_complete", "chunked_encoding", "expected_content_length"),
    ):
        assert f"self.{name}" in source, name


def test_uvicorn_servers() -> None:
    import uvicorn

    assert parameters(uvicorn.Server.handle_exit) == ["self", "sig", "frame"]
    assert parameters(uvicorn.Server.on_tick) == ["self", "counter"]
    assert parameters(uvicorn.Server.shutdown) == ["self", "sockets"]
    server = uvicorn.Server(uvicorn.Config(lambda: None))
    assert (server.should_exit, server.force_exit, server.server_state.tasks) == (False, False, set())


def test_datatrove_executors(tmp_path: Any) -> None:
    from datatrove.executor import LocalPipelineExecutor

    assert parameters(LocalPipelineExecutor._run_for_rank) == ["self", "rank", "local_rank", "node_rank"]
    assert LocalPipelineExecutor([], tasks=1, logging_dir=str(tmp_path))._launched is False


def test_huggingface_hub_downloads() -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    assert {"url", "temp_file", "resume_size", "headers", "expected_size"} <= {*parameters(http_get)}
    assert "user-agent" in {name.lower() for name in build_hf_headers(token=False)}
    assert constants.MAX_HTTP_DOWNLOAD_SIZE >= 50 * 10**9


def test_tokenizers_parts() -> None:
    from tokenizers import normalizers

    part: Any = normalizers.Replace("a", "b")
    assert json.loads(part.__getstate__()) == {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}


@pytest.mark.parametrize(("value", "text"), [(0.005, "0.005"), (1.0, "1.0"), (1e7, "1e+07"), (float("inf"), "+Inf")])
def test_prometheus_numbers(value: float, text: str) -> None:
    from prometheus_client.utils import floatToGoString

    assert floatToGoString(value) == text


def test_llguidance_grammars() -> None:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    assert "start" in gbnf_to_lark('root ::= "yes" | "no"')


def test_lm_eval_instructions() -> None:
    """IFEval's checks find what they need where it is replaced. They are not imported, since that downloads data."""
    spec = find_spec("lm_eval")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "tasks/ifeval"
    checks = (folder / "instructions.py").read_text()
    for call in ("instructions_util.count_sentences(value)", "instructions_util.nltk.word_tokenize(value)"):
        assert checks.count(call) == 1, call
    assert "\nimport langdetect\n" in checks
    assert "nltk.download(" in (folder / "instructions_util.py").read_text()
