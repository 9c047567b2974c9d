"""Real model folders beside transformers: does each open as it was published, and does it say the same?

    python bench/wild.py WILD --reference PYTHON [--newer PYTHON] [--only NAME] [--json FILE] [--table FILE]

WILD holds metadata of public models, a folder each: configurations, tokenizers, indices, no weights. Each is copied.
Its config.json is shrunk in widths and layers alone, and tiny random weights are written under the names of its index.
PYTHON is an environment with transformers 4.57, torch and sentencepiece (`--newer`: another with transformers 5).

For a folder of Llama's arithmetic it compares ids of at least 500 strings (each added token in the middle of text, at
its ends and doubled; spaces, newlines, emoji, digits), dialogs where transformers renders them, and 30 greedy tokens
with their log-probabilities in float32. Any other folder must be refused in one line. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama2 import checkpoint
from llama2.convert import samples
from llama2.engine.runner import BLOCK, Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import Llama2Error
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Tokenizer

ROWS, COUNT = 500, 30
LFS = b"version https://git-lfs.github.com/spec/v1"
#: Files that a repository keeps in Git LFS or that were too long to keep here, and where the same content is.
SUBSTITUTES = {
    **{
        (name, "tokenizer.model"): "llama2.c/tokenizer.model"
        for name in ("llama1-7b-hf", "vicuna-7b-delta-v0", "vicuna-13b", "llama2-7b-hf", "llama2-70b-chat-hf")
    },
    ("wizard-vicuna-30b", "tokenizer.model"): "llama2.c/tokenizer.model",
    ("mistral-7b-instruct-v0.3", "tokenizer.model"): "mistral-common/tokenizer.model.v3",
    **{
        (name, "tokenizer.json"): "npm-llama3/tokenizer.json"
        for name in ("llama3-8b-merge", "llama3.2-3b", "llama3.1-8b-instruct-bnb", "lora-llama3.1-70b-with-config")
    },
}
#: Folders that are not of Llama's arithmetic, or hold no model, and a word that their refusal must have.
REFUSED = {
    "gemma-2b": "emma",
    "mixtral-dolphin": "ixtral",
    "phi3-split": "hiMoE",
    "wizard-vicuna-30b-gptq": "GPTQ",
    "llama3.1-8b-instruct-bnb": "itsandbytes",
    "orpheus-3b": "itsandbytes",
    "lora-llama2-7b-qlora": "adapter",
    "lora-llama3.1-70b-with-config": "adapter",
}
#: What people call the folders.
FAMILIES = {
    "llama1-7b-hf": "Llama 1, an early conversion in `.bin` files",
    "llama2-7b-hf": "Llama 2 7B",
    "llama2-7b-chat-hf-bin": "Llama 2 7B chat, in `.bin` files",
    "llama2-70b-chat-hf": "Llama 2 70B chat",
    "codellama-7b-ft": "Code Llama 7B",
    "vicuna-7b-delta-v0": "Vicuna 7B v0",
    "vicuna-13b": "Vicuna 13B",
    "wizard-vicuna-30b": "Wizard-Vicuna 30B",
    "openllama-3b-zh": "OpenLLaMA 3B",
    "meta-llama3": "Llama 3 8B, in Meta's own format",
    "llama3-8b-merge": "Llama 3.1 8B",
    "llama3.2-3b": "Llama 3.2 3B",
    "mistral-7b-instruct-v0.3": "Mistral 7B v0.3",
    "devstral-small-2507": "Devstral Small 2507",
    "yi-1.5-6b-merge": "Yi 1.5 6B",
    "semcoder-deepseek-coder-6.7b": "DeepSeek Coder 6.7B",
    "granite-3b-code-128k": "Granite Code 3B",
    "gemma-2b": "Gemma 2B",
    "mixtral-dolphin": "Mixtral 8x7B",
    "phi3-split": "Phi-tiny-MoE",
    "wizard-vicuna-30b-gptq": "a GPTQ model",
    "llama3.1-8b-instruct-bnb": "a bitsandbytes model, 8 bits",
    "orpheus-3b": "a bitsandbytes model, 4 bits",
    "lora-llama2-7b-qlora": "a LoRA adapter alone",
    "lora-llama3.1-70b-with-config": "a LoRA adapter beside a config.json",
}
#: Tokenizers without a model, which are given Llama 2's configuration.
BARE = ("npm-llama2", "npm-llama3", "mistral-common", "meta-llama3", "llama2.c")

#: Folders that transformers does not open, and others whose tokenizer it is.
SAME = {"meta-llama3": "npm-llama3"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


@dataclass
class Row:
    """What was found of one folder."""

    name: str
    opens: str = ""
    ids: str = ""
    template: str = ""
    tools: str = ""
    answers: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def build(wild: Path, name: str, target: Path) -> Path:
    """A folder that can be loaded: the metadata as it is, its widths shrunk, tiny random weights."""
    folder = target / name
    shutil.copytree(wild / name, folder)
    if name == "mistral-common":
        shutil.copy(folder / "tokenizer.model.v3", folder / "tokenizer.model")
    for file in sorted({*folder.iterdir(), *(folder / f for n, f in SUBSTITUTES if n == name)}):
        if not file.exists() or file.read_bytes()[: len(LFS)] == LFS:
            if source := SUBSTITUTES.get((name, file.name)):
                shutil.copy(wild / source, file)
            elif file.exists() and file.name not in ("model.safetensors", "pytorch_model.bin"):
                file.unlink()  # the other tokenizer file says as much
    path = folder / "config.json"
    if name in BARE:
        config = json.loads((wild / "llama2-7b-hf" / "config.json").read_text())
        sizes = {"npm-llama3": 128256, "meta-llama3": 128256, "mistral-common": 32768}
        config["vocab_size"] = sizes.get(name, 32000)
        if name == "npm-llama3":
            config |= {"bos_token_id": 128000, "eos_token_id": 128001}
    elif not path.exists() or (folder / "adapter_config.json").exists():
        return folder  # no weights were published with it
    else:
        config = json.loads(path.read_text())
    heads = config.get("num_attention_heads", 4)
    share = max(1, heads // (config.get("num_key_value_heads") or heads))
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["num_key_value_heads"] = max(1, 4 // min(share, 4))
    if "head_dim" in config:
        config["head_dim"] = 16
    if name == "meta-llama3":
        params: dict[str, Any] = {
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "vocab_size": 128256,
            "multiple_of": 32,
        }
        params |= {"ffn_dim_multiplier": 0.5, "norm_eps": 1e-5, "rope_theta": 500000.0}
        (folder / "params.json").write_text(json.dumps(params))
        weights(folder, {**config, "num_key_value_heads": 2, "intermediate_size": 96}, meta=True)
        return folder
    path.write_text(json.dumps(config))
    weights(folder, config)
    return folder


def weights(folder: Path, config: Mapping[str, Any], *, meta: bool = False) -> None:
    """Write random weights: in one file of the kind that the folder's index is of, or that the folder is of."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    e = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * e, (config.get("num_key_value_heads") or config["num_attention_heads"]) * e
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        linear = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        linear |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        for part, shape in linear.items():
            shapes[f"{at}{part}.weight"] = shape
            if config.get("attention_bias" if part.startswith("self") else "mlp_bias"):
                shapes[f"{at}{part}.bias"] = shape[:1]
        shapes |= {f"{at}{part}_layernorm.weight": (d,) for part in ("input", "post_attention")}
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight")
    tensors = {
        name: 1 + 0.1 * torch.randn(shape) if name.endswith("norm.weight") else torch.randn(shape) * 0.3
        for name, shape in shapes.items()
    }
    method = (config.get("quantization_config") or {}).get("quant_method")
    for name in [n for n in tensors if n.endswith("_proj.weight")] if method else []:  # as such a folder has them
        rows, columns = shapes[name]
        stem = name.removesuffix("weight")
        if method == "gptq":
            del tensors[name]
            tensors[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        elif config["quantization_config"].get("load_in_8bit"):
            tensors[name] = torch.zeros(rows, columns, dtype=torch.int8)
            tensors[f"{stem}SCB"] = torch.ones(rows)
        else:
            tensors[name] = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
            tensors[f"{stem}weight.absmax"] = torch.ones(rows * columns // 64)
    if meta:
        parts = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm"}
        parts |= {"post_attention_layernorm": "ffn_norm", "self_attn": "attention", "mlp": "feed_forward"}
        parts |= {f"{letter}_proj": f"w{letter}" for letter in "qkvo"}
        parts |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        named = {".".join(parts.get(p, p) for p in n.removeprefix("model.").split(".")): t for n, t in tensors.items()}
        torch.save(named, folder / "consolidated.00.pth")
        return
    indices = {file.name: file.read_text() for file in folder.glob("*.index.json")}
    for file in indices:
        (folder / file).unlink()
    if "pytorch_model.bin.index.json" in indices and "model.safetensors.index.json" not in indices:
        if "rotary_emb.inv_freq" in indices["pytorch_model.bin.index.json"]:
            for i in range(config["num_hidden_layers"]):
                tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(e // 2)
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def texts(tokenizer: Tokenizer) -> list[str]:
    """Strings that make a tokenizer's rules show."""
    added = [*tokenizer.control, *tokenizer.user]
    forms = ["a{0}b", "{0}", "x {0} y", "{0}{0}", " {0}", "{0} ", "{0}\n1", "1\n{0}", "你{0}😀"]
    each = [form.format(text) for text in added for form in (forms if len(added) <= 60 else forms[:2])]
    plain = [text for text in samples.strings() if all(not 0xD800 <= ord(letter) < 0xE000 for letter in text)]
    edges = [
        "",
        " ",
        "  ",
        " a",
        "a ",
        "\n",
        "\n\n",
        "\t",
        " \n ",
        "12345",
        "1 2 3",
        "😀👍🏽",
        "▁a",
        "a▁b",
        "a  b   c",
        "é",
        "\x00",
    ]
    return [*edges, *each, *plain[: max(150, ROWS - len(each) - len(edges))]]


def has_tokenizer(folder: Path) -> bool:
    """Whether a vocabulary was published with the model."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def dialogs() -> list[dict[str, Any]]:
    """With and without a system message and tools."""
    system = [{"role": "system", "content": "Answer in one word."}]
    user, again = {"role": "user", "content": "What is 2 + 2?"}, {"role": "user", "content": "  And 3 + 3? "}
    said = {"role": "assistant", "content": "Four."}
    plain = [[user], [user, said, again], [user, said], [user, said, again, {**said, "content": "Six.\nOr 6."}]]
    made: list[dict[str, Any]] = [{"messages": messages} for messages in plain]
    made += [{"messages": [*system, *messages]} for messages in plain]
    return [*made, *({"messages": [*some, user], "tools": [WEATHER]} for some in ([], system))]


def ask(python: str, folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the oracle answers."""
    file = folder.parent / f"{folder.name}-asked.json"
    file.write_text(json.dumps(asked))
    script = Path(__file__).with_name("wild_oracle.py")
    done = subprocess.run([python, script, folder, file], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def compare(row: Row, folder: Path, theirs_of: Path, reference: str, newer: str | None) -> None:
    """Fill in a row about a folder that opens. transformers is given `theirs_of`, which is the folder or its like."""
    if not has_tokenizer(folder):
        row.ids = "no tokenizer"
        return compare_answers(row, folder, reference)
    with checkpoint.open(folder) as model:
        tokenizer, template = model.tokenizer, model.template
        vocab = model.config.vocab_size
    strings, talks = texts(tokenizer), dialogs()
    theirs = ask(reference, theirs_of, {"strings": strings, "dialogs": talks})
    if "error" in theirs:
        row.ids = f"no reference: {theirs['error'][:90]}"
    else:
        other = ask(newer, theirs_of, {"strings": strings, "dialogs": talks}) if newer else {}
        known = wrong = differ = 0
        for i, text in enumerate(strings):
            ids = theirs["ids"][i]
            if max(ids, default=0) >= vocab:
                continue  # a token without a row
            known += 1
            ours = tokenizer.encode(text, special=True)
            differ += other.get("ids", theirs["ids"])[i] != ids
            if ours != ids:
                wrong += 1
                row.wrong.append(f"{text!r}: {theirs['version']} {ids}, ours {ours}")
        for i, ids in enumerate(theirs["whole"] if theirs_of == folder else ()):
            ours = tokenizer.encode(strings[i], special=True, bos=tokenizer.add_bos, eos=tokenizer.add_eos)
            if ours != ids and max(ids, default=0) < vocab:
                wrong += 1
                row.wrong.append(f"whole {strings[i]!r}: {ids}, ours {ours}")
        row.ids = f"{known - wrong}/{known} ({theirs['class']})" + (f", 5.x differs in {differ}" if differ else "")
        told: dict[bool, list[bool]] = {False: [], True: []}
        for talk, answer in zip(talks, theirs["dialogs"], strict=True):
            if template is None or "error" in answer:
                continue
            try:
                ours, _ = Dialog(talk["messages"]).render(tokenizer, template, tools=talk.get("tools"))
            except Llama2Error as error:
                if "tools" in talk and "knows no tools" in str(error):
                    continue
                ours = [str(error)]  # type: ignore[list-item]
            told["tools" in talk].append(ours == answer["ids"])
            if ours != answer["ids"]:
                row.wrong.append(f"dialog {talk}: {answer['text']!r} {answer['ids']}, ours {ours}")
        row.template, row.tools = (f"{sum(told[k])}/{len(told[k])}" if told[k] else "none" for k in (False, True))
    if theirs_of == folder:
        compare_answers(row, folder, reference)


def compare_answers(row: Row, folder: Path, reference: str) -> None:
    """Greedy tokens and their log-probabilities."""
    prompts = [[1, 5, 9, 200, 31, 7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    answers = ask(reference, folder, {"prompts": prompts, "count": COUNT})
    if "error" in answers:
        row.answers = f"no reference: {answers['error'][:90]}"
        return
    worst, equal = {"numpy": 0.0, "native": 0.0}, {"numpy": 0, "native": 0}
    with checkpoint.open(folder) as model:
        for runner, kind in (("numpy", NumpyRunner), ("native", NativeRunner)):
            for prompt, answer in zip(prompts, answers["greedy"], strict=True):
                tokens, logprobs = follow(kind(model, 4), prompt, answer["tokens"])
                equal[runner] += sum(a == b for a, b in zip(tokens, answer["tokens"], strict=True))
                worst[runner] = max(worst[runner], float(np.abs(np.array(logprobs) - answer["logprobs"]).max()))
    total = COUNT * len(prompts)
    row.answers = "; ".join(f"{name} {equal[name]}/{total}, within {worst[name]:.0e}" for name in worst)
    if equal["numpy"] < total or worst["numpy"] > 1e-3:  # the native runner keeps keys and values in 16 bits
        row.wrong.append(row.answers)


def follow(runner: Runner, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest token and its log-probability at each place where `tokens` follow the prompt."""
    ids = np.array([*prompt, *tokens[:-1]], np.int32)
    table = np.arange(-(-len(ids) // BLOCK), dtype=np.int32)[None]
    places = np.arange(len(ids), dtype=np.int32)
    outputs = np.arange(len(prompt) - 1, len(ids), dtype=np.int32)
    logits = runner.forward(Batch(ids, places, np.zeros_like(ids), table, outputs)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = logprobs.argmax(-1)
    return best.tolist(), logprobs[np.arange(len(best)), best].tolist()


def rows(wild: Path, names: list[str], reference: str, newer: str | None) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            row = Row(name)
            folder = build(wild, name, Path(scratch))
            try:
                with checkpoint.open(folder) as model:
                    row.notes = [
                        *model.notes,
                        *(getattr(model.tokenizer, "notes", ()) if has_tokenizer(folder) else ()),
                    ]
                row.opens = "yes"
            except Llama2Error as error:
                row.opens, row.reason = "no", str(error).replace(str(folder), name)
            word = REFUSED.get(name)
            if word is not None:
                if row.opens == "yes" or word not in row.reason:
                    row.wrong.append(f"must be refused by a line with {word!r}: {row.reason}")
            elif row.opens == "no":
                row.wrong.append(row.reason)
            else:
                same = build(wild, SAME[name], Path(scratch)) if name in SAME else folder
                compare(row, folder, same, reference, newer)
            for made in Path(scratch).iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            yield row


def table(found: list[Row]) -> str:
    """The rows of families as Markdown."""
    lines = [
        "| family | opens | tokens as transformers has them | dialogs | with tools |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows_of = {row.name: row for row in found}
    for name, family in FAMILIES.items():
        row = rows_of[name]
        if row.opens == "yes":
            ids = row.ids.partition(" (")[0]
            lines.append(f"| {family} | yes | {ids} | {row.template or 'none'} | {row.tools or 'none'} |")
        else:
            reason = row.reason.partition(": ")[2].partition("; ")[0]
            lines.append(f"| {family} | no: {reason} | | | |")
    return "\n".join(lines) + "\n"


def put_between(file: Path, text: str) -> None:
    """Replace what stands between the two marks of the families in a Markdown file."""
    before, begin, rest = file.read_text().partition("<!-- families -->\n")
    _, end, after = rest.partition("<!-- end of families -->")
    if not (begin and end):
        raise SystemExit(f"{file}: has no marks <!-- families --> and <!-- end of families -->")
    file.write_text(before + begin + text + end + after)


def main() -> int:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wild", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--newer")
    parser.add_argument("--only", action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, action="append", help="Markdown files to put the table into")
    parser.add_argument("--wrong", type=int, default=3, help="differences shown of each folder")
    asked = parser.parse_args()
    names = asked.only or sorted(path.name for path in asked.wild.iterdir() if path.is_dir())
    found = []
    for row in rows(asked.wild, names, asked.reference, asked.newer):
        found.append(row)
        print(" | ".join([row.name, row.opens, row.ids, row.template, row.tools, row.answers, row.reason]), flush=True)
        for line in row.wrong[: asked.wrong]:
            print("    ", line[:400], flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([vars(row) for row in found], indent=1, ensure_ascii=False) + "\n")
    for file in asked.table or ():
        put_between(file, table(found))
    return int(any(row.wrong for row in found))


if __name__ == "__main__":
    sys.exit(main())
