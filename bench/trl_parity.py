"""Losses beside TRL's: the same tiny Llama, rows, order and optimizer, float32, step by step.

Four comparisons: rows of one dialog each, rows that TRL packed, an adapter (LoRA), and a reward model with margins.
Both sides begin with the same weights; an adapter's are those that peft drew. Each loss must agree within 1e-4. The
table goes to stderr, one JSON object with all losses to stdout. Exit code 1 says that they do not agree. TRL needs an
environment of its own:

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0
    trl-env/bin/pip install trl==1.16.0 peft==0.21.2 '.[train]'
    trl-env/bin/python bench/trl_parity.py > trl_parity.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance

from llama2 import checkpoint
from llama2.align.ranking import ranking
from llama2.data.loader import IGNORED, TokenBatch
from llama2.data.pairs import Pairs, TokenizedPair
from llama2.model.heads import RewardTransformer
from llama2.model.transformer import Transformer
from llama2.records import installed
from llama2.train import adapters
from llama2.train.settings import LoraSettings, OptimizerSettings
from llama2.train.step import Step

VOCABULARY, LENGTH, ROWS = 320, 96, 4
PAD, BOS, EOS = 0, 1, 2
RATE, LORA_RATE, CLIP, BETAS, EPS, DECAY = 1e-3, 1e-2, 1.0, (0.9, 0.95), 1e-5, 0.1
RANK, ALPHA, TARGETS = 8, 32, ["q_proj", "v_proj"]
ALLOWED = 1e-4

#: Losses of both sides, ours first.
Losses = tuple[list[float], list[float]]


def write_model(folder: Path) -> None:
    """A tiny random Llama with grouped queries, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def dialogs(count: int, vocabulary: int = VOCABULARY, most: int = LENGTH // 2) -> list[dict[str, list[int]]]:
    """Dialogs of random tokens, at most so many, of which the second part is the answer."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        prompt, answer = (rng.integers(3, vocabulary, rng.integers(5, most // 2)) for _ in range(2))
        tokens = [BOS, *prompt.tolist(), *answer.tolist(), EOS]
        found.append({"input_ids": tokens, "completion_mask": [0] * (1 + len(prompt)) + [1] * (len(answer) + 1)})
    return found


def tokenizer() -> Any:
    """What TRL asks for its special tokens; the rows have ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel(words, "w3")),
        **{f"{name}_token": f"w{i}" for name, i in {"pad": PAD, "bos": BOS, "eos": EOS}.items()},
    )


def common(folder: Path, steps: int, *, rate: float, rows: int, length: int, bf16: bool = False) -> dict[str, Any]:
    """Settings of TRL's trainers: the optimizer, no schedule, nothing written but to `folder`."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": CLIP,
        "max_length": length,
        "bf16": bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "seed": 0,
    }


def in_order(kind: Any) -> Any:
    """A trainer of TRL that takes rows in their order, and keeps each step's loss in `losses`."""

    class InOrder(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.losses: list[float] = []

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **settings: Any) -> Any:
            loss = super().training_step(*arguments, **settings)
            self.losses.append(loss.item())
            return loss

    return InOrder


def trainer(  # 9 parameters: TRL's own settings
    model: Path,
    folder: Path,
    data: list[dict[str, list[int]]],
    steps: int,
    *,
    packing: bool,
    lora: bool,
    rows: int = ROWS,
    length: int = LENGTH,
    bf16: bool = False,
) -> Any:
    """TRL's trainer of a model, which writes to `folder`, takes rows in their order and keeps each step's loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rate = LORA_RATE if lora else RATE
    config = SFTConfig(
        **common(folder, steps, rate=rate, rows=rows, length=length, bf16=bf16),
        packing=packing,
        completion_only_loss=True,
    )
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    made = in_order(SFTTrainer)(
        model=LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        peft_config=peft if lora else None,
    )
    whole = len(made.train_dataset) // rows * rows  # or the last step of an epoch would have fewer rows
    made.train_dataset = made.train_dataset.select(range(whole))
    return made


def batches(made: Any, steps: int) -> Iterator[TokenBatch]:
    """What TRL's trainer reads, epoch after epoch, as ours reads it."""
    count = 0
    while count < steps:
        for batch in made.get_train_dataloader():
            labels = batch["labels"].numpy()
            targets = np.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
            documents = (batch["position_ids"] == 0).cumsum(1).int().numpy() if "position_ids" in batch else None
            yield TokenBatch(batch["input_ids"].numpy(), targets, documents)
            count += 1
            if count == steps:
                return


def compare(folder: Path, steps: int, *, packing: bool = False, lora: bool = False) -> Losses:
    """Losses of fine-tuning, all weights or an adapter."""
    data = dialogs(steps * ROWS * (3 if packing else 1))
    theirs = trainer(folder, folder, data, steps, packing=packing, lora=lora)
    with checkpoint.open(folder) as base:
        if lora:
            theirs.model.save_pretrained(folder / "begun", save_embedding_layers=False)
            settings = LoraSettings(dropout=0, adapter=str(folder / "begun"))
            settings, found = adapters.continued(settings, base, Path)
            network = adapters.build(base, settings, found, precision="fp32", seed=0, device=torch.device("cpu"))
        else:
            network = Transformer.load(base)
    optimizer = OptimizerSettings(betas=BETAS, eps=EPS, weight_decay=DECAY, clip=CLIP)
    step = Step(network, optimizer=optimizer, precision="fp32")
    rate = LORA_RATE if lora else RATE
    ours = [step.step([batch], rate, i).loss for i, batch in enumerate(batches(theirs, steps), 1)]
    theirs.train()
    return ours, theirs.losses


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of random tokens that begin alike, with a margin."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        prompt = [BOS, *rng.integers(3, VOCABULARY, rng.integers(5, LENGTH // 4)).tolist()]
        sides = [[*prompt, *rng.integers(3, VOCABULARY, rng.integers(5, LENGTH // 4)).tolist(), EOS] for _ in range(2)]
        found.append({"chosen_ids": sides[0], "rejected_ids": sides[1], "margin": i % 4 / 3})
    return found


def compare_reward(folder: Path, steps: int) -> Losses:
    """Losses of a reward model with margins, all weights: the same scalar head on the same network."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    data = pairs(steps * ROWS)
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=PAD, dtype=torch.float32)
    config = RewardConfig(**common(folder, steps, rate=RATE, rows=ROWS, length=LENGTH))
    theirs = in_order(RewardTrainer)(
        model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer()
    )
    with checkpoint.open(folder) as base:
        network = RewardTransformer.load(base)
    with torch.no_grad():
        network.score.weight.copy_(model.score.weight)
    rows = [
        TokenizedPair(np.array(p["chosen_ids"], np.int32), np.array(p["rejected_ids"], np.int32), p["margin"], (1, 0))
        for p in data
    ]
    source = Pairs("pairs", rows)
    optimizer = OptimizerSettings(betas=BETAS, eps=EPS, weight_decay=DECAY, clip=CLIP)
    step = Step(network, ranking, optimizer=optimizer, precision="fp32")
    ours = [step.step([source.batch(range(i * ROWS, (i + 1) * ROWS))], RATE).loss for i in range(steps)]
    theirs.train()
    return ours, theirs.losses


#: Each comparison makes losses of both sides in a folder with the model, in so many steps.
COMPARISONS: dict[str, Callable[[Path, int], Losses]] = {
    "sft": compare,
    "sft, packed": lambda folder, steps: compare(folder, steps, packing=True),
    "sft, LoRA": lambda folder, steps: compare(folder, steps, lora=True),
    "reward, margins": compare_reward,
}


def main() -> int:
    """Compare, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of each comparison")
    steps = parser.parse_args().steps
    found, worst = {}, 0.0
    for name, comparison in COMPARISONS.items():
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # where transformers prints, too
            write_model(Path(folder))
            ours, theirs = comparison(Path(folder), steps)
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        worst = max(worst, difference)
        print(
            f"{name:20} {theirs[0]:.4f} → {theirs[-1]:.4f}, largest difference of {steps} losses {difference:.1e}",
            file=sys.stderr,
        )
        found[name] = {"ours": ours, "theirs": theirs, "largest_difference": difference}
    versions = {name: installed(name) for name in ("trl", "transformers", "peft", "torch")}
    agree = worst <= ALLOWED
    print(json.dumps(provenance() | {"versions": versions, "allowed": ALLOWED, "agree": agree, "comparisons": found}))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
