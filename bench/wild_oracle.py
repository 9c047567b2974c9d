"""What transformers makes of a model folder, as JSON: token ids, rendered dialogs, greedy tokens. See wild.py.

    PYTHON bench/wild_oracle.py FOLDER ASKED.json

Runs in an environment of its own with torch, sentencepiece and the transformers that is to be compared with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def open_tokenizer(folder: str) -> Any:
    """The folder's tokenizer: as transformers opens it, else as its class for any tokenizer.json or Llama's does."""
    import transformers

    reasons = []
    for name in ("AutoTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        try:
            found = getattr(transformers, name).from_pretrained(folder, use_fast=True)
            if found is not False:  # which it gives for names without text
                return found, name
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    try:  # a class that there never was, and names without text
        return transformers.LlamaTokenizerFast(f"{folder}/tokenizer.model", add_prefix_space=True), "tokenizer.model"
    except Exception:
        raise SystemExit("; ".join(reasons)) from None


def rendered(tokenizer: Any, dialog: dict[str, Any]) -> dict[str, Any]:
    """Text and ids of a dialog by the folder's own chat template, or why there are none."""
    asks = dialog["messages"][-1]["role"] == "user"
    options = {"tools": dialog.get("tools"), "add_generation_prompt": asks}
    try:
        text = tokenizer.apply_chat_template(dialog["messages"], tokenize=False, **options)
        return {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def greedy(folder: str, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
    """Greedy tokens after each prompt and their log-probabilities, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    options: Any = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.eval()
    answers = []
    for prompt in prompts:
        ids, tokens, logprobs = torch.tensor([prompt]), [], []
        past = None
        with torch.inference_mode():
            for _ in range(count):
                out = model(ids, past_key_values=past, use_cache=True)
                past = out.past_key_values
                scores = out.logits[0, -1].log_softmax(-1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores[tokens[-1]]))
                ids = torch.tensor([[tokens[-1]]])
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return answers


def main() -> None:
    """Print one JSON object."""
    import transformers

    log: Any = transformers.logging
    log.set_verbosity_error()
    folder, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answer: dict[str, Any] = {"version": transformers.__version__}
    if "strings" in asked:
        tokenizer, answer["class"] = open_tokenizer(folder)
        answer["ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["strings"]]
        answer["whole"] = [tokenizer(text)["input_ids"] for text in asked["strings"][:20]]
        answer["dialogs"] = [rendered(tokenizer, dialog) for dialog in asked["dialogs"]]
    if "prompts" in asked:
        answer["greedy"] = greedy(folder, asked["prompts"], asked["count"])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
