"""Tiny models, tasks and rows for the tests of evaluate."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from fakes import VOCABULARY, ByteTokenizer, HistoryRunner
from llama2 import api, recipe
from llama2.engine.engine import Engine
from llama2.evaluate.queries import AnswerStore
from llama2.evaluate.task import EvaluationTask, load
from models import tiny_config, write_tiny_gguf

if TYPE_CHECKING:
    from llama2.evaluate.harness import EngineLM

#: SmolLM2's chat template in short.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Questions in the form of ARC's files.
QUESTIONS = [
    {"query": f"Question: Who is at the {place}?", "choices": ["he", "Anna and Tom", "the tern", "none"], "gold": gold}
    for gold, place in enumerate(["port", "inn", "station", "tent"])
]


def tiny_model(folder: Path, **options: Any) -> api.Model:
    """A random model on one thread."""
    path = folder / "tiny.gguf"
    if not path.exists():
        write_tiny_gguf(path, **options)
    return api.load(path, threads=1)


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write a file of JSON lines; its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sha256(path.read_bytes()).hexdigest()


def jsonl(*rows: Any) -> bytes:
    """A file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arc_task(name: str = "mine", **changes: Any) -> EvaluationTask:
    """A task over a file `mine.jsonl` in ARC's form."""
    table = {
        "name": name,
        "title": "Mine",
        "suite": "academic",
        "group": "commonsense",
        "source": "written for tests",
        "licence": "CC0",
        "files": {"mine.jsonl": ""},
        "rows": "arc",
        "prompt": "Question: {{question}}\nAnswer:",
        "choices": "{{choices.text}}",
        "target": "{{choices.label.index(answerKey)}}",
        "normalisation": "characters",
        "harness": "arc_easy",
        "harness_folder": "arc",
        "harness_metric": "acc_norm",
    }
    return recipe.make(table | changes, EvaluationTask, where=name)


def one_task(task: EvaluationTask, folder: Path, contents: dict[str, bytes]) -> EvaluationTask:
    """A task over files with these contents, which are written below a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return recipe.make(task.model_dump() | {"files": dict.fromkeys(contents, "")}, EvaluationTask, where=task.name)


def logits(history: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(history).normal(size=VOCABULARY).astype(np.float32)


def by_hand(context: int = 512) -> EngineLM:
    """A model whose every row of logits is known, and whose tokens are bytes."""
    from llama2.evaluate.harness import EngineLM  # which takes seconds

    engine = Engine(HistoryRunner(logits, n_blocks=128, context=context), cast("Any", ByteTokenizer()))
    tokenizer = engine.tokenizer
    return EngineLM(cast("api.Model", SimpleNamespace(engine=engine, tokenizer=tokenizer)))


def answered(name: str, files: dict[str, bytes], texts: list[str], folder: Path, **settings: Any) -> dict[str, Any]:
    """A run's record whose answers are these, one after the other."""
    from llama2.evaluate.run import EvaluationSettings, evaluate

    task = one_task(load(name), folder, files)
    waiting = iter(texts)

    def fill(store: AnswerStore, engine: Any, queries: Any, in_flight: int, progress: Any) -> None:
        for key in queries:
            store.add(key, {"text": next(waiting), "tokens": 1, "finish": "stop"})

    with pytest.MonkeyPatch.context() as patch, tiny_model(folder, config=tiny_config(context_length=4096)) as model:
        patch.setattr(AnswerStore, "fill", fill)
        return evaluate(model, [task], folder / "run", EvaluationSettings(data=folder, **settings))
