"""Do TRL's trainers for DPO, KTO and reward models train on preference records as they are? Two steps each.

    pip install trl                                        # 1.16, in the Python that runs this
    python bench/trl_reads.py best/preferences.jsonl

Prints the losses as one JSON object; a trainer that refuses the file ends the program with its error.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from datasets import load_dataset
from provenance import provenance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> Any:
    """A token a character."""
    names = [*map(chr, range(32, 127)), "<pad>", "<eos>", "<unk>"]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")  # noqa: S106
    library = Tokenizer(words)
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=library, chat_template=TEMPLATE, **special)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file")
    data = load_dataset("json", data_files=parser.parse_args().file, split="train")
    torch.manual_seed(0)
    words = tokenizer()
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    shape |= {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}

    def causal() -> Any:
        return LlamaForCausalLM(LlamaConfig(**shape))

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
        settings |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "output_dir": folder}
        shared = {"train_dataset": data, "processing_class": words}
        classifier: Any = LlamaForSequenceClassification
        scalar = classifier(LlamaConfig(**{**shape, "num_labels": 1}))
        trainers = {
            "dpo": DPOTrainer(causal(), ref_model=causal(), args=DPOConfig(**settings), **shared),
            "kto": KTOTrainer(causal(), ref_model=causal(), args=KTOConfig(**settings), **shared),
            "reward": RewardTrainer(scalar, args=RewardConfig(**settings), **shared),
        }
        losses = {name: trainer.train().training_loss for name, trainer in trainers.items()}
    print(json.dumps({"records": len(data), "losses": losses, "provenance": provenance()}))


if __name__ == "__main__":
    main()
