"""Tiny guards in Hugging Face's format, with chat templates in the manner of Llama Guard 1 and 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

#: Lists and layout as in the published templates; the sentences between are short ones of our own.
TEMPLATES = {
    "guard1": (
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
        "{% set role = ['Agent', 'User'][messages|length % 2] %}"
        "{{ bos_token }}[INST] Task: is there unsafe content in {{ role }} messages?\n\n"
        "<BEGIN UNSAFE CONTENT CATEGORIES>\nO1: Violence and Hate.\nShould not\n- threaten.\nO3: Criminal Planning.\n"
        "Can\n- discuss crime.\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n"
        "{% for message in messages %}{{ ['User', 'Agent'][loop.index0 % 2] }}: {{ message['content'].strip() }}\n\n"
        "{% endfor %}<END CONVERSATION>\n\nGive your assessment for {{ role }}. [/INST]"
    ),
    "guard3": (
        "{%- set role = 'User' if messages[-1]['role'] == 'user' else 'Agent' %}"
        "{{- '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Task: is there unsafe content in ' + role + ' messages?\n\n"
        "<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violent Crimes.\nS9: Indiscriminate Weapons.\nS10: Hate.\n"
        "S99: Rude Haiku.\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n' }}"
        "{%- for message in messages %}{{- 'User' if message['role'] == 'user' else 'Agent' }}"
        "{{- ': ' + message['content'] | trim + '\n\n' }}{%- endfor %}"
        "{{- '<END CONVERSATION>\n\nGive your assessment for ' + role + '.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
}
CONTROL = {
    "guard1": ["<unk>", "<s>", "</s>"],
    "guard3": ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
}

Kind = Literal["guard1", "guard3"]


def write_guard(path: Path, kind: Kind, answers: dict[str, str] | None = None, steps: int = 120) -> Path:
    """Write a guard that gives these `answers` to these questions, or random ones where there are none."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [TEMPLATES[kind], *["safe unsafe\nunsafe safe\nS1,S9 O3"] * 9, *(answers or {})]
    control = CONTROL[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = control[1], control[2]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = TEMPLATES[kind]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=1024,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config)
    if answers:
        _train(network, [(_prompt(fast, question), answer) for question, answer in answers.items()], fast, steps)
    network.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def _prompt(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _train(network: Any, rows: list[tuple[list[int], str]], tokenizer: Any, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    examples = []
    for prompt, answer in rows:
        end = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + end])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        examples.append((ids, labels))
    for _ in range(steps):
        loss = sum(network(ids, labels=labels).loss for ids, labels in examples) / len(examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break


def without_template(path: Path) -> None:
    """Take the chat template out of a folder."""
    (path / "chat_template.jinja").unlink(missing_ok=True)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    file.write_text(json.dumps(config))
