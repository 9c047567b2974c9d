"""Are the results of two versions the same, bit by bit? Each version is an environment, given by its Python.

Both do the same work, each in a folder and a cache of its own, and say the SHA-256 of every result:

- logits, greedy answers and log-probabilities of prompts: the default model and tiny ones, by every runner and
  instruction set of this machine;
- packed weights, as they are written to the cache;
- a model converted to every format, and quantized to every one;
- a corpus built from Python's own library, 20 steps of pretraining on it and 20 of tuning: every loss, and the weights.

The table goes to stderr, one JSON object to stdout; exit code 1 if anything differs. Needs what the tests need. A
setting that has another name in the other version is given by `--renamed NEW=OLD`.

    python bench/same_results.py OTHER/bin/python --renamed optimizer.lr=optimizer.rate > same_results.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

CLONE = Path(__file__).parents[1]
INSTRUCTION_SETS = ("avx512_bf16", "avx512_vnni", "avx2", "plain")
QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
FORMATS = {"gguf": "model.gguf", "hf": "folder", "meta": "meta", "llama2c": "model.bin"}
PROMPT = "The capital of France is Paris, and the capital of Italy"

#: Pretraining and tuning: settings by their names in this version.
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "tied_embeddings": True}
TRAINING = {
    "steps": 20,
    "seed": 1,
    "compile": False,
    "evaluate": 10,
    "data.length": 128,
    "batch.size": 8,
    "batch.micro_size": 4,
    "optimizer.lr": 3e-3,
    "optimizer.warmup": 5,
    "save.every": 10,
}
CORPUS = """\
output = "corpus"
dir = "stdlib"
[tokenizer]
vocabulary = 512
[sources.text]
files = ["json/*.py", "email/*.py"]
[sources.docstrings]
files = ["json/*.py", "email/*.py"]
format = "docstrings"
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def answers(model: str, runner: Any) -> str:
    """The SHA-256 of a model's logits, tokens and log-probabilities over a greedy answer; run by each version."""
    import llama2

    digest = hashlib.sha256()
    with llama2.load(model, runner=runner) as loaded:
        prompt = tuple(loaded.encode(PROMPT))

        def logits(row: Any, tokens: Any, length: int) -> None:
            digest.update(row.tobytes())

        sampling = llama2.Sampling(temperature=0)
        fields: Any = {"logprobs": 5, "processors": (logits,)}
        named = "score_from" in llama2.Request.__dataclass_fields__  # a version before that scores whole prompts
        fields |= {"score_from": 1} if named else {"prompt_logprobs": True}
        asked = llama2.Request(prompt, 32, sampling, **fields)
        for event in loaded.engine.run(asked):
            digest.update(repr((event.token, event.text, event.finish)).encode())
            for each in (event.logprob, *(event.prompt_logprobs or ())):
                digest.update(repr(each and (each.token, each.logprob, each.top)).encode())
    return digest.hexdigest()


class Version:
    """One version at work in a folder of its own."""

    def __init__(self, python: str, folder: Path, renamed: Mapping[str, str]) -> None:
        self.python, self.folder, self.renamed = python, folder, renamed
        self.results: dict[str, str] = {}
        folder.mkdir(exist_ok=True)

    def run(self, *arguments: object, **environment: str) -> str:
        """What a program of this version prints. Raises CalledProcessError, after its errors were printed."""
        command = [self.python, *map(str, arguments)]
        home = {"LLAMA2_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        variables = {**os.environ, **home, **environment}
        done = subprocess.run(command, cwd=self.folder, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def add_files(self, what: str, root: Path, pattern: str = "**/*") -> None:
        for path in sorted(root.glob(pattern)) if root.is_dir() else [root]:
            # A receipt has the time in it.
            if path.is_file() and "receipt" not in path.name:
                self.results[f"{what}: {path.name}"] = sha256(path.read_bytes())

    def settings(self, **more: object) -> list[str]:
        given = {**TRAINING, **more}
        return [f"{self.renamed.get(name, name)}={json.dumps(value)}" for name, value in given.items()]

    def answer(self, models: Mapping[str, Path]) -> None:
        from llama2 import native

        for name, path in models.items():
            runs = [("native", isa) for isa in INSTRUCTION_SETS if isa in native.supported()]
            for runner, isa in [*runs, ("numpy", ""), *([("torch", "")] if name != "default" else [])]:
                chosen = {"LLAMA2_ISA": isa} if isa else {}
                said = self.run(__file__, "--answers", path, runner, **chosen)
                self.results[f"answers of {name}: {runner} {isa}".strip()] = said.strip()
        packed = [path.read_bytes() for path in (self.folder / "home").rglob("*") if path.is_file()]
        # Their names depend on where and when the model was written.
        for i, each in enumerate(sorted(sha256(data) for data in packed if len(data) > 1 << 12)):
            self.results[f"packed weights {i}"] = each

    def convert(self, source: Path) -> None:
        for format, name in FORMATS.items():
            self.run("-m", "llama2", "convert", source, name, "--to", format, "--receipt", "tensors")
            self.add_files(f"converted to {format}", self.folder / name)
        for format in QUANTIZED:
            self.run("-m", "llama2", "quantize", source, f"{format}.gguf", "--format", format)
            self.add_files("quantized", self.folder / f"{format}.gguf")

    def train(self, precision: str) -> None:
        recipe, dialogs = self.folder / "corpus.toml", self.folder / "dialogs.jsonl"
        recipe.write_text(CORPUS)
        if not (self.folder / "corpus").exists():
            self.run("-m", "llama2", "data", "build", recipe)
            self.add_files("corpus", self.folder / "corpus", "**/*.tokens")
        dialogs.write_text("".join(map(dialog, range(64))))
        pretrain = self.folder / "pretrain.toml"
        pretrain.write_text("[model]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in SHAPE.items()))
        settings = self.settings(precision=precision, **{"data.corpus": str(self.folder / "corpus")})
        self.run("-m", "llama2", "pretrain", pretrain, *settings, "--name", f"pretrain-{precision}")
        start = self.folder / "runs" / f"pretrain-{precision}"
        tune = self.folder / "sft.toml"
        tune.write_text(f'start = "{start}"\n[data]\nfiles = ["dialogs.jsonl"]\n')
        settings = self.settings(precision=precision, **{"data.validation": 8})
        self.run("-m", "llama2", "sft", tune, *settings, "--name", f"sft-{precision}")
        for name in (f"pretrain-{precision}", f"sft-{precision}"):
            run = self.folder / "runs" / name
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [(line["step"], line["loss"], line.get("validation")) for line in lines]
            self.results[f"{name}: losses of {len(losses)} steps"] = sha256(repr(losses).encode())
            self.add_files(f"{name}: weights", run, "**/*.safetensors")


def dialog(i: int) -> str:
    question, answer = f"What is {i} plus {i + 1}?", f"{i} plus {i + 1} is {2 * i + 1}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """The default model, and tiny ones of several number formats: one set of files for both versions."""
    sys.path.insert(0, str(CLONE / "tests"))
    tiny = import_module("models")  # the tests' module, not bench/models.py

    from llama2 import hub

    yield "default", hub.locate(hub.DEFAULT)
    for format in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL"):
        path = folder / f"tiny-{format}.gguf"
        tiny.write_tiny_gguf(path, format=format, config=tiny.tiny_config(format))
        yield f"tiny {format}", path
    wide = folder / "wide-F32.gguf"
    tiny.write_tiny_gguf(wide, config=tiny.tiny_config("Q4_K", context_length=4096))
    yield "wide F32", wide


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="Python of the other version's environment")
    parser.add_argument("--renamed", action="append", default=[], metavar="NEW=OLD", help="a setting's other name")
    arguments = parser.parse_args()

    from provenance import provenance

    renamed = dict(pair.split("=", 1) for pair in arguments.renamed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = dict(models(folder))
        versions = [Version(sys.executable, folder / "this", {}), Version(arguments.other, folder / "other", renamed)]
        for version in versions:
            print(version.python, file=sys.stderr)
            version.answer(files)
            version.convert(files["wide F32"])
            for precision in ("fp32", "bf16"):
                version.train(precision)
    this, other = (version.results for version in versions)
    differ = [name for name in sorted({*this, *other}) if this.get(name) != other.get(name)]
    for name in sorted({*this, *other}):
        print(f"{'DIFFERS' if name in differ else 'same':8}{name}", file=sys.stderr)
    print(f"{len(this)} results, {len(differ)} differ", file=sys.stderr)
    json.dump({"provenance": provenance(), "differ": differ, "this": this, "other": other}, sys.stdout, indent=1)
    return bool(differ)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answers"]:
        print(answers(*sys.argv[2:4]))
    else:
        sys.exit(main())
