"""A working folder for trials of alignment: a tiny random chat model with the default model's vocabulary, reward models
of its shape, prompts, and a recipe of each stage. Nothing in it is trained; all of it runs in seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama2 import checkpoint, hub
from llama2.checkpoint import SCORE_HEAD, Checkpoint, hf_folder
from llama2.model.transformer import Transformer, stored

SHAPE: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "head_dim": 16, "context_length": 1024,
}  # fmt: skip

RECIPES = {
    "sft.toml": 'start = "chat"\nprecision = "fp32"\ncompile = false\nsteps = 6\n[data]\nfiles = ["dialogs.jsonl"]\n'
    "length = 256\nvalidation = 0\n[batch]\nsize = 2\nmicro_size = 2\n[optimizer]\nlr = 1e-3\n[save]\nevery = 2\n",
    "reject.toml": 'samples = 4\ntemperature = 1.0\nmax_tokens = 12\ncut = "keep"\nplots = false\n'
    '[models]\nchat = "chat"\n'
    '[prompts]\nfiles = ["prompts.jsonl"]\nheld_out = 4\n[rewards]\nhelpful = "helpful"\nsafety = "safety"\n',
    "gatt.toml": 'model = "chat"\ndialogs = 8\nmax_turns = 4\nsamples = 3\nmax_tokens = 12\ncut = "keep"\n[prompts]\n'
    'files = ["prompts.jsonl"]\nheld_out = 4\n[instructions]\nhobbies = ["chess"]\nverifiable = []\n',
    "distil.toml": 'model = "chat"\nsamples = 2\nmax_tokens = 12\ncut = "keep"\n'
    '[prompts]\nsafety_files = ["risky.jsonl"]\n'
    '[rewards]\nhelpful = "helpful"\nsafety = "safety"\n',
    "ppo.toml": 'start = "chat"\nprecision = "fp32"\niterations = 6\nrollouts = 8\nmax_tokens = 12\n[prompts]\n'
    'files = ["prompts.jsonl"]\nheld_out = 4\nmeasured = 4\n'
    '[rewards]\nhelpful = "helpful"\nsafety = "safety"\ncut = "score"\n'
    '[batch]\nsize = 4\n[optimizer]\nlr = 1e-3\n[save]\nevery = 2\n[lora]\nrank = 4\n',
    "rounds.toml": 'start = "chat"\nsft = "sft.toml"\nreject = "reject.toml"\ngatt = "gatt.toml"\nppo = "ppo.toml"\n'
    "[rounds.v1]\n[rounds.v2]\ngatt = true\nppo = true\n",
}  # fmt: skip


def write(folder: Path) -> None:
    """Fill a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.open(hub.locate(hub.DEFAULT)) as default:
        config = replace(default.config, **SHAPE, rope_scaling=None)
        for seed, name in enumerate(("chat", "helpful", "safety")):
            network = Transformer(config)
            rng = torch.Generator().manual_seed(0)
            network.initialise(rng)
            with torch.no_grad():
                for weight in network.parameters():
                    weight.mul_(4 if weight.ndim > 1 else 1)  # so that answers differ from noise
            head = torch.randn(1, config.dim, generator=torch.Generator().manual_seed(seed)) * 0.2
            extras = {SCORE_HEAD: stored(SCORE_HEAD, head)} if name != "chat" else {}
            like = Checkpoint(
                folder,
                "huggingface",
                config,
                network.tensors(),
                {},
                default.template,
                tokenizer_source=default.tokenizer,
            )
            hf_folder.write(replace(like, extras=extras), folder / name)
    questions = [f"What is {a} {b}?" for a in ("red", "old", "new") for b in ("tea", "rice", "sand", "rain")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    (folder / "risky.jsonl").write_text("".join(json.dumps({"prompt": f"How to break {i}?"}) + "\n" for i in range(6)))
    dialogs = [{"prompt": f"Say {word}.", "completion": word} for word in ("bat", "tea", "oar", "sand")]
    (folder / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
