"""Real metadata, changed at random: every folder opens, or is refused in one line, quickly and in little memory.

    python bench/fuzz_folders.py WILD [--mutations 100000] [--seed 0] [--only NAME]

WILD is as in wild.py. Each mutation takes a folder's configurations, its index, or its tokenizer.json with some hundred
tokens of the vocabulary, so that a case takes milliseconds. It drops, retypes, enlarges or repeats one to three keys
or items. Opening it, tokenizer and template included, may end in one of our errors, one printable line, and in nothing
else: no other exception, no more than ten seconds, no more than the files' size and 64 MB of memory. Prints what broke
that, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llama2 import checkpoint
from llama2.errors import Llama2Error
from llama2.text.template import role_markers

TOKENS, ROWS, BATCH, SECONDS, MEMORY = 300, 400, 250, 10, 64 << 20
SCALARS: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**4000), 0.5, -0.0, 1e308, 1e-320]
SCALARS += [
    float("nan"),
    float("inf"),
    "",
    "a",
    "▁",
    "</s>",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "\x00",
    "{{ 1 }}",
    "first",
    "BPE",
]
SCALARS += [
    "x" * 2000,
    [],
    {},
    [[]],
    [1, 2],
    ["a"],
    {"a": 1},
    {"content": "<x>", "special": False},
    {"type": "Sequence"},
]


class Pairs(list[tuple[str, Any]]):
    """A JSON object in which a key may stand twice."""


def parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    """JSON, with keys that stand twice."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any, deep: int = 0) -> Iterator[tuple[Any, int]]:
    """Every container in a JSON value with an index into it; of long ones, some."""
    items = value if isinstance(value, list) else []
    for i in range(len(items)) if len(items) < 40 else random.sample(range(len(items)), 12):
        yield items, i
        item = items[i][1] if isinstance(items, Pairs) else items[i]
        if deep < 8:
            yield from places(item, deep + 1)


def mutate(value: Any, dice: random.Random) -> None:
    """Change one place of a JSON value."""
    found = list(places(value))
    if not found:
        return
    items, i = dice.choice(found)
    key, old = items[i] if isinstance(items, Pairs) else (None, items[i])
    new: Any = old
    match dice.randrange(6):
        case 0:
            del items[i]
            return
        case 1 | 2:
            new = dice.choice(SCALARS)
        case 3:
            count = dice.choice([2, 50, 2000]) if len(dump(old)) < 2000 else 2
            new = [old] * count if dice.random() < 0.7 else json.loads("[" * 150 + "]" * 150)
        case 4:
            items.insert(
                dice.randrange(len(items) + 1), items[i] if key is None else (key, dice.choice([old, *SCALARS]))
            )
            return
        case _ if isinstance(old, str):
            new = dice.choice([old * 2, old * 3000, old[: len(old) // 2], old.upper(), old + "\n", [old]])
        case _ if isinstance(old, (int, float)):
            new = dice.choice(
                [-old, old + 1, old * 2, old * 10**9, str(old), [old], float(old) if abs(old) < 2**60 else 0]
            )
    items[i] = new if key is None else (key, new)


def small(folder: Path) -> None:
    """Leave some hundred tokens of a tokenizer.json, and the merges between these."""
    path = folder / "tokenizer.json"
    source = json.loads(path.read_bytes())
    model = source["model"]
    kept = sorted(model["vocab"], key=model["vocab"].__getitem__)[:TOKENS]
    vocabulary = {text: i for i, text in enumerate(kept)}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [[a, b] for a, b in pairs if a in vocabulary and b in vocabulary and a + b in vocabulary]
    added = source["added_tokens"][:40]
    for entry in added:
        entry["id"] = vocabulary.setdefault(entry["content"], len(vocabulary))
    model["vocab"], source["added_tokens"] = {t: i for t, i in vocabulary.items() if t in kept}, added
    path.write_text(json.dumps(source))


def prepare(wild: Path, name: str, target: Path) -> Path:
    """A folder with the metadata of a public model, a small vocabulary and tiny weights."""
    folder = target / name
    shutil.copytree(wild / name, folder)
    for file in [*folder.iterdir()]:
        start = file.read_bytes()[:40]
        if file.name == "tokenizer.model" or file.suffix in (".v3", ".v1", ".v2") or start.startswith(b"version https"):
            file.unlink()
    if (folder / "tokenizer.json").exists():
        small(folder)
    config = folder / "config.json"
    if config.exists():
        values = json.loads(config.read_bytes())
        heads = (
            {"num_attention_heads": 2, "num_key_value_heads": 1}
            if "num_key_value_heads" in values
            else {"num_attention_heads": 2}
        )
        values |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": ROWS, **heads}
        values |= {"head_dim": 4} if "head_dim" in values else {}
        config.write_text(json.dumps(values))
        kv = 4 if "num_key_value_heads" in values else 8
        at = "model.layers.0."
        shapes = {"model.embed_tokens.weight": (ROWS, 8), "model.norm.weight": (8,), "lm_head.weight": (ROWS, 8)}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (kv if p in "kv" else 8, 8) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (8, 12) if p == "down" else (12, 8) for p in ("gate", "up", "down")}
        shapes |= {f"{at}{p}_layernorm.weight": (8,) for p in ("input", "post_attention")}
        save_file(
            {key: np.ones(shape, np.float32) for key, shape in shapes.items()},
            folder / "model-00001-of-00001.safetensors",
        )
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(
                {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(shapes, "model-00001-of-00001.safetensors")}
            )
        )
    return folder


def attempt(folder: Path) -> None:
    """Open everything. Raises what must not be."""
    try:
        with checkpoint.open(folder) as model:
            model.config.rope_divisors()
            tokenizer = model.tokenizer
            notes = (*model.notes, *tokenizer.notes)
            tokenizer.decode(tokenizer.encode("a b é 12 </s>", special=True))
            for template in list(model.templates.values())[:1]:
                role_markers(template, tokenizer, system=True)
            assert all(note.isprintable() for note in notes), notes
    except Llama2Error as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 700 + len(str(folder)), text


def run(folder: Path, seed: int) -> None:
    """A batch of mutations of one folder, in this process. Raises what must not be, after saying which it was."""
    originals = {path: path.read_text() for path in folder.iterdir() if path.suffix == ".json"}
    for number in range(BATCH):
        dice = random.Random(f"{seed} {number}")
        random.seed(dice.random())
        changed = []
        for path in dice.sample(sorted(originals), min(len(originals), dice.choice([1, 1, 2, 3]))):
            value = parse(path.read_text())
            mutate(value, dice)
            text = dump(value)
            if dice.random() < 0.05:  # no longer JSON, or with a very deep value
                at = dice.randrange(len(text))
                text = (
                    text[:at]
                    + dice.choice(["", "[" * 50_000, "]", '"', "\x00", "9" * 5000])
                    + text[at + dice.randrange(9) :]
                )
            path.write_text(text)
            changed.append(path)
        signal.alarm(SECONDS)
        try:
            attempt(folder)
            assert os.fstat(2).st_size == 0, os.pread(2, 300, 0)  # a library that prints beside its error
        except BaseException:
            print(f"{folder.name}: seed {seed}, number {number}: {sorted({path.name for path in changed})}", flush=True)
            traceback.print_exc(limit=-6, file=sys.stdout)
            raise
        finally:
            signal.alarm(0)
            for path in changed:
                path.write_text(originals[path])


def batch(folder: Path, seed: int) -> bool:
    """`run` in a process of its own with little memory. Whether all was well."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return status == 0
    status = 1
    os.dup2(os.open(folder.parent / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
    try:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        warnings.simplefilter("ignore")
        size = sum(path.stat().st_size for path in folder.iterdir())
        used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY + size, used + MEMORY + size))
        run(folder, seed)
        status = 0
    except BaseException as error:
        print(f"{folder.name}: seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    finally:
        os._exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wild", type=Path)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append")
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = asked.only or [
        p.name for p in sorted(asked.wild.iterdir()) if (p / "config.json").exists() or (p / "tokenizer.json").exists()
    ]
    wrong = done = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = [prepare(asked.wild, name, Path(scratch)) for name in names]
        for folder in folders:
            attempt(folder)  # imports what it needs before memory is bounded
        seed = asked.seed
        while done < asked.mutations:
            wrong += not batch(folders[seed % len(folders)], seed)
            seed, done = seed + 1, done + BATCH
            if seed % 40 == 0:
                print(f"{done} mutations, {wrong} batches wrong", file=sys.stderr, flush=True)
    print(json.dumps({"mutations": done, "folders": len(names), "wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
