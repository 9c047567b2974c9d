"""An MLflow ChatModel, logged as code: `mlflow.pyfunc.save_model(path, python_model="mlflow_model.py", ...)`.

The model's file is the artefact `model`:

    mlflow.pyfunc.save_model(
        "llama2-chat", python_model="deploy/azure/mlflow_model.py", artifacts={"model": "model.gguf"}
    )
    mlflow.pyfunc.load_model("llama2-chat").predict({"messages": [{"role": "user", "content": "Hello"}]})
"""

from __future__ import annotations

from typing import Any

import mlflow
from mlflow.pyfunc import ChatModel
from mlflow.types.llm import (
    ChatChoice,
    ChatCompletionResponse,
    ChatMessage,
    ChatParams,
    TokenUsageStats,
)

import llama2


class Llama2Chat(ChatModel):
    """Chat with the model that lies beside it. Options that it does not have are refused by name."""

    def load_context(self, context: Any) -> None:
        """Open the artefact `model`."""
        self.model = llama2.load(context.artifacts["model"])

    def predict(self, context: Any, messages: list[ChatMessage], params: ChatParams) -> ChatCompletionResponse:
        """One answer. Raises ValueError for several, and for tools."""
        if (params.n or 1) != 1 or params.tools:
            raise ValueError("n and tools: are not supported by this model; leave them out")
        wanted = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "max_tokens", "stop")}
        wanted |= {name: getattr(params, name) for name in ("presence_penalty", "frequency_penalty")}
        options: Any = {name: value for name, value in wanted.items() if value is not None}
        answer = self.model.chat([{"role": each.role, "content": each.content or ""} for each in messages], **options)
        used = len(answer.token_ids)
        return ChatCompletionResponse(
            choices=[
                ChatChoice(
                    index=0,
                    message=ChatMessage(role="assistant", content=answer.text),
                    finish_reason=answer.finish_reason,
                )
            ],
            usage=TokenUsageStats(answer.prompt_tokens, used, answer.prompt_tokens + used),
            model="llama2",
        )


mlflow.models.set_model(Llama2Chat())
