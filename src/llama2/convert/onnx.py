"""A model as ONNX, for onnxruntime-genai and what is built on it: Windows' Foundry Local among others.

The model is first written in Hugging Face's form, with the receipt of any conversion. The builder of onnxruntime-genai
makes the graph of that, in a process of its own. Then the ONNX model is run beside ours: tokens of texts, the chat
template, and the logits of 200 tokens.

T tokens of the answer  V vocabulary
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2 import checkpoint, files
from llama2.checkpoint import Checkpoint
from llama2.convert import answers, samples
from llama2.convert.conversion import convert
from llama2.convert.staging import RECEIPT, carry_terms, staged
from llama2.engine import divergence
from llama2.errors import CheckpointError, ParityError
from llama2.hub import store
from llama2.hub.progress import Progress, reporting
from llama2.records import installed
from llama2.text import template
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Mode

Precision = Literal["fp32", "fp16", "int4"]
Provider = Literal["cpu", "dml"]

#: How far the next token's distributions may diverge on average, in nats: bounds of a converter that is right, and not
#: of quality. Those of conversions to F32, F16 and Q4_0.
LIMITS: dict[str, float] = {"fp32": 1e-4, "fp16": 0.01, "int4": 2.0}

#: What Foundry Local reads beside the model: its name and how a message is put to it.
FOUNDRY = "inference_model.json"

_MODULES = ("onnxruntime_genai", "onnx", "onnx_ir", "torch", "transformers")
_BUILDER = "onnxruntime_genai.models.builder"
_TEXTS = 200  # of the samples, whose tokens are compared


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the ONNX model differs from ours, which computes with the same weights in float32."""

    tokens: list[int]  # ours, greedy
    same_tokens: int  # for which both put the same token first
    first_difference: int | None  # the first of them for which not
    kl_mean: float  # KL(ours ‖ ONNX) of the next token's distributions, in nats
    kl_max: float
    largest_logprob_difference: float  # of our tokens
    texts: int  # texts whose tokens were compared
    other_tokens: list[str]  # those with other tokens in onnxruntime-genai's tokenizer
    template: bool | None  # whether a dialog has the same tokens; None: the model has no template


# 9 parameters: the program's public interface, one for each option of `llama2 export`
def export(
    source: str | Path,
    target: str | Path,
    precision: Precision = "fp32",
    provider: Provider = "cpu",
    *,
    tokenizer: str | Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model at `source` as an ONNX folder at `target`, compare it, and return the receipt, also receipt.json.

    A model for `dml` runs on Windows alone, so elsewhere only its source in Hugging Face's form is compared, and the
    receipt has no "comparison". Nothing is at `target` unless the comparison is within LIMITS. Raises CheckpointError
    for a model that the builder does not know, and where a package is missing; ParityError beyond the limits.
    """
    source, target = files.named(Path(source)), files.named(Path(target))
    given = None if tokenizer is None else Path(tokenizer)
    with (
        reporting(progress) as report,
        checkpoint.open(source, tokenizer=given, tokenizer_mode=tokenizer_mode, adapters=adapters) as model,
        staged(source, target, force=force) as stage,
    ):
        _refuse(model)
        _require()
        folder = stage / "hf"
        proof = convert(
            source,
            folder,
            "hf",
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            adapters=adapters,
            run=False,
            progress=report,
        )
        place = stage / target.name
        report("building the graph", 0, 1)
        _build(folder, place, precision, provider, stage / "cache")
        carry_terms(source, model, place)
        compared = None
        if provider == "cpu":
            with checkpoint.open(folder) as reference:
                compared = compare(reference, place, report)
            _judge(compared, precision, target)
        _write_foundry(target.name, place, model)
        for made in (folder, stage / "cache"):
            shutil.rmtree(made, ignore_errors=True)
        facts = {
            "tool": proof["tool"],
            "precision": precision,
            "provider": provider,
            "versions": {name: installed(name) for name in ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir")},
            "conversion": {name: proof[name] for name in ("configuration", "tokenizer", "chat_template", "source")},
            "comparison": None if compared is None else asdict(compared),
            "output": {"name": target.name, "format": "onnx", "files": _files(place)},
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (place / RECEIPT).write_text(text, encoding="utf-8")
    return facts


def _require() -> None:
    for name in _MODULES:
        if importlib.util.find_spec(name) is None:
            raise CheckpointError(f"{name}: is not installed; `pip install 'whole-llama[onnx]'` brings it")


def _refuse(model: Checkpoint) -> None:
    """Raise CheckpointError for what the builder would leave out in silence."""
    c, why = model.config, None
    if model.extras:
        why = f"has the extra tensor {files.quote(next(iter(model.extras)))}"
    elif c.rope_scaling is not None and c.rope_scaling.kind not in ("linear", "llama3"):
        why = f"has rotary scaling of the kind {c.rope_scaling.kind}"
    elif c.biases:
        why = "has biases"
    if why:
        raise CheckpointError(f"{model.path}: {why}, which the ONNX builder does not know; serve it as it is")


def _build(folder: Path, place: Path, precision: str, provider: str, cache: Path) -> None:
    """Run onnxruntime-genai's builder. Raises CheckpointError with its last words."""
    command = [sys.executable, "-m", _BUILDER, "-i", str(folder), "-o", str(place)]
    command += ["-p", precision, "-e", provider, "-c", str(cache)]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise CheckpointError(f"{folder.parent.name}: onnxruntime-genai's builder failed: {lines[-1][:300]}")


def compare(ours: Checkpoint, place: Path, report: Progress) -> Comparison:
    """Run the ONNX model at `place` along our greedy tokens, and compare its tokenizer and template with ours."""
    import onnxruntime_genai as genai

    tokenizer, context = ours.tokenizer, ours.config.context_length
    prompt = tokenizer.encode(samples.PROMPT, bos=tokenizer.add_bos)[: min(answers.PROMPT_TOKENS, context - 1)]
    count = min(answers.TOKENS, context - len(prompt))
    answer = answers.GreedyAnswer(ours, prompt, count, lambda done, all: report("running the source", done, all))
    model = genai.Model(str(place))
    rows = _logits(model, prompt, answer.tokens, report)
    expected, tokens = np.stack(answer.logits), np.array(answer.tokens, np.int32)
    found = divergence.compare(rows, expected, tokens)
    wrong = np.flatnonzero(~found.same_top)
    theirs = genai.Tokenizer(model)
    texts = [text for text in samples.strings() if _plain(text, ours)][:_TEXTS]
    return Comparison(
        tokens=answer.tokens,
        same_tokens=int(found.same_top.sum()),
        first_difference=int(wrong[0]) if len(wrong) else None,
        kl_mean=float(found.divergence.mean()),
        kl_max=float(found.divergence.max()),
        largest_logprob_difference=float(np.abs(found.loss - found.reference_loss).max()),
        texts=len(texts),
        other_tokens=[text for text in texts if _ids(theirs, text, ours) != tokenizer.encode(text)],
        template=_template(theirs, ours),
    )


def _logits(model: Any, prompt: Sequence[int], tokens: Sequence[int], report: Progress) -> NDArray[np.float32]:
    """The ONNX model's logits before each of `tokens`, all of which it is given: (T, V)."""
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + len(tokens) + 1, do_sample=False)
    generator = genai.Generator(model, parameters)
    rows = []
    for i, fed in enumerate((list(prompt), *([token] for token in tokens[:-1]))):
        generator.append_tokens(np.array([fed], np.int32))
        rows.append(np.array(generator.get_logits(), np.float32).reshape(-1, generator.get_logits().shape[-1])[-1])
        report("running the output", i + 1, len(tokens))
    return np.stack(rows)


def _plain(text: str, ours: Checkpoint) -> bool:
    """Whether a text has no control token in it, which would be one there and is text here, and can be encoded."""
    return text.isprintable() and text != "" and not any(mark in text for mark in (*ours.tokenizer.control, "<unk>"))


def _ids(theirs: Any, text: str, ours: Checkpoint) -> list[int]:
    """The tokens that onnxruntime-genai gives a text, without the one that begins it."""
    ids: list[int] = list(map(int, theirs.encode(text)))
    return ids[1:] if ours.tokenizer.add_bos and ids[:1] == [ours.tokenizer.bos_id] else ids


def _template(theirs: Any, ours: Checkpoint) -> bool | None:
    """Whether a dialog has the same tokens by onnxruntime-genai's template as by ours."""
    if ours.template is None:
        return None
    messages = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "Rome."},
        {"role": "user", "content": "And of France?"},
    ]
    expected, _ = Dialog(messages).render(ours.tokenizer, ours.template)
    text = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    found = list(map(int, theirs.encode(text)))
    twice = ours.tokenizer.bos_id is not None and found[:2] == 2 * [ours.tokenizer.bos_id]
    return (found[1:] if twice else found) == list(expected)


def _judge(found: Comparison, precision: str, target: Path) -> None:
    if not found.kl_mean <= LIMITS[precision]:
        raise ParityError(
            f"{target}: the ONNX model's next-token distributions diverge by {found.kl_mean:.3g} nats on average; the "
            f"limit of {precision} is {LIMITS[precision]:g}"
        )


def _write_foundry(name: str, place: Path, model: Checkpoint) -> None:
    """What Foundry Local asks for: the model's name, and a prompt with `{Content}` where a message goes."""
    prompt = "{Content}"
    if model.template is not None:
        prompt, _ = template.written(model.template, [{"role": "user", "content": prompt}], model.tokenizer, ())
    values = {"Name": name, "PromptTemplate": {"assistant": "{Content}", "prompt": prompt}}
    (place / FOUNDRY).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(place: Path) -> list[dict[str, Any]]:
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": store.digest(path, "sha256", lambda *_: None)}
        for path in sorted(place.iterdir())
        if path.is_file()
    ]
