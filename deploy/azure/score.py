"""Azure ML's scoring script: chat completions of OpenAI's form, one at a time.

Azure's server calls `init` once and `run` with each request's body. A deployment of the container (deployment.yml) has
all routes and streams, and answers several at once; this is for those who must use Azure's server.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import llama2
from llama2.errors import Llama2Error

#: Fields of a request that are options of an answer; others are refused.
OPTIONS = ("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "max_tokens")

_model: llama2.Model | None = None


def model_file(folder: Path) -> Path:
    """The one model in the folder that Azure mounts. Raises FileNotFoundError for none or several."""
    found = sorted(folder.rglob("*.gguf")) or sorted(path.parent for path in folder.rglob("config.json"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: has {len(found)} models; register one GGUF file, or one folder")
    return found[0]


def init() -> None:
    """Load the model that the deployment names."""
    global _model  # noqa: PLW0603  (Azure's interface is two functions)
    _model = llama2.load(model_file(Path(os.environ["AZUREML_MODEL_DIR"])))


def run(body: str) -> Any:
    """The answer to a body with `messages`; an error of the client's has OpenAI's form and status 400."""
    assert _model is not None
    try:
        return completion(_model, json.loads(body))
    except (Llama2Error, ValueError, TypeError) as error:
        return _refused(str(error))


def completion(model: llama2.Model, request: Any) -> dict[str, Any]:
    """A chat completion in OpenAI's form. Raises ValueError for a field that is not known."""
    if not isinstance(request, dict):
        raise ValueError(f"the body must be an object with messages, not a {type(request).__name__}")
    messages = request.pop("messages", None)
    if not isinstance(messages, list):
        raise ValueError("messages: must be a list of messages with a role and a content")
    name = request.pop("model", None) or "llama2"
    unknown = sorted(request.keys() - {*OPTIONS, "stream"})
    if unknown or request.pop("stream", False):
        raise ValueError(f"{unknown[0] if unknown else 'stream'}: is not supported by this deployment; leave it out")
    answer = model.chat(messages, **request)
    used = len(answer.token_ids)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": used,
            "total_tokens": answer.prompt_tokens + used,
        },
    }


def _refused(message: str) -> Any:
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    try:
        from azureml_inference_server_http.api.aml_response import AMLResponse
    except ImportError:  # not under Azure's server
        return error
    return AMLResponse(error, 400, json_str=True)
