"""Does a tuned model, exported to GGUF in F32, answer in the engine as it does where it was trained?

    python bench/align_export.py runs/ppo prompts.jsonl > export.json
    python bench/align_export.py smollm2-135m-instruct prompts.jsonl --adapter runs/mine > export.json

`llama2 convert --to gguf --format F32` writes the file. The engine answers `--prompts` prompts from it, greedily,
with up to `--tokens` tokens. So does the network in PyTorch, in float32, from what the training run saved. The
prompts' token ids must be the same, which is the template; so must the answers' tokens, and where they end.

The engine's cache holds keys and values in 16 bits. Two tokens that are nearly as likely may then change places. For an
answer that differs, the record has torch's distance between the logits of its token and of the engine's at the first
difference. Exit code 1 says that one of them is above 0.05, or that prompts or ends differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

import llama2
from llama2 import api
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptSettings
from llama2.model.transformer import ContiguousCache, Transformer
from llama2.text import template as templates

GAP = 0.05


@torch.no_grad()
def greedy(network: Transformer, prompt: list[int], tokens: int, ends: frozenset[int]) -> tuple[list[int], Any]:
    """The network's likeliest tokens after a prompt, up to an end token, which is left out; and the logits of each."""
    cache = ContiguousCache(network, 1, len(prompt) + tokens)
    logits = network(torch.tensor([prompt]), cache)[0, -1]
    found, rows = [], []
    for _ in range(tokens):
        rows.append(logits)
        token = int(logits.argmax())
        if token in ends:
            break
        found.append(token)
        logits = network(torch.tensor([[token]]), cache)[0, -1]
    return found, rows


def main() -> int:
    """Export, answer, compare, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run, or a model that an adapter is for")
    parser.add_argument("file", type=Path, help="prompts, as for `llama2 reject`")
    parser.add_argument("--adapter", help="a run or folder with an adapter")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    prompts = prompt_files.read(PromptSettings(files=[options.file]), 0)[: options.prompts]
    adapter = [options.adapter] if options.adapter else []
    differences: list[dict[str, Any]] = []
    same = same_prompts = 0
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder, "model.gguf")
        words = ["convert", options.model, str(gguf), "--to", "gguf", "--format", "F32"]
        words += ["--adapter", options.adapter] if options.adapter else []
        subprocess.run([sys.executable, "-m", "llama2", *words], check=True, stdout=sys.stderr)
        with api.open_checkpoint(options.model, adapter=adapter) as saved, llama2.load(gguf) as engine:
            network = Transformer.load(saved)
            template = saved.template_for(tools=False)
            ends = templates.ends(template, saved.tokenizer) if template else saved.tokenizer.stop_ids
            for number, prompt in enumerate(prompts):
                ids = api.prompt_of(saved, prompt.messages).tokens
                same_prompts += ids == engine.render(prompt.messages)
                theirs, rows = greedy(network, ids, options.tokens, ends)
                answer = engine.chat(prompt.messages, max_tokens=options.tokens, temperature=0)
                ours = [token for token in answer.token_ids if token not in ends]
                if ours == theirs and (answer.finish_reason == "stop") == (len(rows) > len(theirs)):
                    same += 1
                    continue
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
                at = min(at, len(rows) - 1)
                token = ours[at] if at < len(ours) else min(ends)
                gap = float(rows[at].max() - rows[at][token])
                differences.append({"prompt": number, "at": at, "gap": gap})
                print(f"prompt {number}: differs at token {at}, logits apart by {gap:.4f}", file=sys.stderr)
    good = same_prompts == len(prompts) and all(each["gap"] <= GAP for each in differences)
    print(f"{same} of {len(prompts)} answers are the same, {same_prompts} prompts", file=sys.stderr)
    found = {"prompts": len(prompts), "same_prompts": same_prompts, "same": same, "differences": differences}
    print(json.dumps(provenance() | {"met": good, "tokens": options.tokens, "measured": found}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
