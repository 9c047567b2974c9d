"""GGUF both ways: do llama.cpp and llama2 give the same ids and tokens? Prints JSON; exit code 1 says that they do not.

    python bench/llamacpp.py SOURCES BUILD                       vocabularies inside the sdist
    python bench/llamacpp.py SOURCES BUILD --wild FOLDERS        and models made from folders, converted both ways

SOURCES is llama.cpp's folder inside the sdist of llama-cpp-python, and BUILD where it was built (bench/peers.sh makes
both). The driver bench/drivers/llamacpp.c is compiled here by $CC or cc. There are three parts:

    vocabulary   models/ggml-vocab-*.gguf: the ids of the .inp and .out files beside them, and of further texts.
                 What is not of architecture llama must be refused in one line.
    theirs       a folder of FOLDERS with tiny random weights, converted by convert_hf_to_gguf.py and opened by us
    ours         the same folder, converted by `llama2 convert` and opened by llama.cpp

Texts have every added token in the middle, doubled and between spaces, and spaces, line ends, digits and emoji without
one. Each is encoded as a template's text, whose control tokens count, and as a user's, where they are literal text.
Greedy tokens are those of float32 arithmetic on both sides. A row is `ok`, or the reason why one of the two did not
open the model; only a model that both opened can be different.

Some texts are left out, and counted as `guarded`. Where a file calls a role's marker user-defined, llama.cpp
makes it one token of a user's text, and we never do. It also merges a control token out of a user's text, as Code
Llama's. And tokens whose names its list has (`<fim_prefix>`) are control tokens to it, which a file calls user-defined.
In a template's text, a token that transformers looks for after spaces were replaced is one that no GGUF can say; the
unknown token is often one.

llama.cpp has no key for a space that is put in front of a text's beginning alone, so a folder with that rule is
converted with `--tokenizer-mode legacy`, and read so; `mode` says it. It has none for a sliding window of this
architecture either: greedy tokens stay within the window.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from llama2 import Model, Runtime, checkpoint
from llama2.checkpoint import gguf
from llama2.errors import Llama2Error
from llama2.text.tokenizer import Tokenizer

#: Texts of the .inp files are separated by this line.
SEPARATOR = "\n__ggml_vocab_test__\n"
#: Greedy tokens that are compared after each prompt.
GREEDY = 16
PROMPTS = ("Once upon a time", "1 + 1 =")
#: At most so many added tokens of a vocabulary are put into texts, and so many differences are printed.
ADDED, SHOWN = 400, 5
#: Tokens that llama.cpp takes for control tokens by their names, whatever their type.
BY_NAME = re.compile(
    r"<[|｜]?(fim[-_▁]\w+|code_\w+|prefix|suffix|middle|file_sep|repo_name|reponame|PRE|SUF|MID|PAD|REPO)[|｜]?>|\[PAD\]"
)

PLAIN = (
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\n \n", " \n", "a", " a", "a ", "  a  ", "a  b", "a\nb",
    "a \n b", "Hello, world!", " Hello", "Hello ", "I'm he'll WE'VE", "0", "12", "123", "1234", "12345 6",
    " 1 22 333 4444", "x=1;y = 2", "naïve café", "Ünïcödé", "日本語",
    "Привет, мир", "مرحبا", "नमस्ते", "ก็", "한국어",
    "🙂", "🙂🙂 👩\u200d👩\u200d👧", "e\u0301", "\u00a0", "a\u00a0b", "\u3000", "\u200b", "▁", "a▁b", "▁▁ a",
    "<", "<|", "|>", "[INST]", "</", "<0x0A>", "def f(x):\n    return x\n", "    indented\n\t\ttabs\n",
    "......", "!!!???", "a" * 100, "=" * 70, " " * 20 + "x", "\x00", "\x7f", "a\x0bb", "aÉ ÉA DžX", "½ ² Ⅷ ٣",
)  # fmt: skip

#: Folders of --wild, and which file stands for one that they lack or have as a pointer of Git LFS (None: left out).
LLAMA2, LLAMA3 = "llama2.c/tokenizer.model", "npm-llama3/tokenizer.json"
FOLDERS: dict[str, dict[str, str | None]] = {
    "llama1-7b-hf": {"tokenizer.model": LLAMA2},
    "llama2-7b-hf": {"tokenizer.model": LLAMA2},
    "llama2-7b-chat-hf-bin": {},
    "llama2-70b-chat-hf": {"tokenizer.model": LLAMA2},
    "vicuna-13b": {"tokenizer.model": LLAMA2},
    "wizard-vicuna-30b": {"tokenizer.model": LLAMA2},
    "codellama-7b-ft": {"tokenizer.model": None},
    "openllama-3b-zh": {"tokenizer.model": None},
    "yi-1.5-6b-merge": {"tokenizer.model": None},
    "mistral-7b-instruct-v0.3": {"tokenizer.model": "mistral-7b-instruct-v0.3/tokenizer.model.v3"},
    "llama3-8b-merge": {"tokenizer.json": LLAMA3},
    "llama3.2-3b": {"tokenizer.json": LLAMA3},
    "semcoder-deepseek-coder-6.7b": {},
    "granite-3b-code-128k": {},
}
#: What else is made of a folder: by a name, the folder, and what its config.json says instead.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral with a window": ("mistral-7b-instruct-v0.3", {"sliding_window": 64}),
    "llama 2 with YaRN": (
        "llama2-7b-hf",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    ),
}


class PeerError(Exception):
    """llama.cpp or its converter failed; the message is its last line."""


@dataclass
class Row:
    """One model and one way. `status` is `ok`, `different`, or why it was not compared."""

    part: str
    name: str
    status: str = "ok"
    texts: int = 0
    guarded: int = 0
    greedy: int = 0
    mode: str = "auto"
    differences: list[Any] = field(default_factory=list)

    def differ(self, **facts: Any) -> None:
        self.status = "different"
        self.differences.append(facts)

    def report(self) -> dict[str, Any]:
        found = {**vars(self), "n_differences": len(self.differences), "differences": self.differences[:SHOWN]}
        return found


class LlamaCpp:
    """The driver with one model; see bench/drivers/llamacpp.c. Raises PeerError when it ends."""

    def __init__(self, program: Path, model: Path, what: str) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.process = subprocess.Popen(
            [program, model, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )

    def ask(self, request: bytes) -> list[int]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self.reason()) from None
        answer = self.process.stdout.readline()
        if not answer:
            raise PeerError(self.reason())
        return list(map(int, answer.split()))

    def reason(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return " ".join(lines[-2:]) or f"ended with {self.process.returncode}"

    def ids(self, text: str, *, special: bool) -> list[int]:
        data = text.encode()
        return self.ask(f"ids {special:d} {len(data)}\n".encode() + data)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        return self.ask(f"greedy {count} {' '.join(map(str, prompt))}\n".encode())

    def defaults(self) -> tuple[int, int, bool]:
        """BOS, EOS (−1 where there is none), and whether BOS is put before a text."""
        bos, eos, begins = self.ask(b"defaults\n")
        return bos, eos, bool(begins)

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def compile_driver(sources: Path, build: Path, folder: Path) -> Path:
    """The program of drivers/llamacpp.c. Raises SystemExit with the compiler's words when it fails."""
    program = folder / "llamacpp"
    source = Path(__file__).parent / "drivers" / "llamacpp.c"
    libraries = build.resolve() / "bin"
    command = [os.environ.get("CC", "cc"), "-O2", str(source), "-o", str(program)]
    command += [f"-I{sources / part}" for part in ("include", "ggml/include")]
    command += [f"-L{libraries}", "-lllama", f"-Wl,-rpath,{libraries}", f"-Wl,-rpath-link,{libraries}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-800:]}")
    return program


def texts(tokens: Iterable[str]) -> Iterator[str]:
    """Plain texts, and each of the added `tokens` in the middle, at the ends, doubled and between spaces."""
    yield from PLAIN
    for token in list(tokens)[:ADDED]:
        yield from (
            token,
            f"a{token}b",
            f"a {token} b",
            f"{token}{token}",
            f" {token}",
            f"{token} \n{token}",
            token[:-1],
        )
        yield f"x{token}\n\n🙂 12345{token} "


def added(tokenizer: Tokenizer, types: Sequence[int], pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts of unknown, control and user-defined tokens, and of those that only one of us holds to be control."""
    found = [piece for piece, kind in zip(pieces, types, strict=True) if kind in (2, 3, 4) and piece]
    guarded = [
        p
        for p, kind in zip(pieces, types, strict=True)
        if kind == 4 and (p in tokenizer.control or BY_NAME.fullmatch(p))
    ]
    return found, guarded


def compare_ids(
    row: Row,
    ours: Tokenizer,
    theirs: LlamaCpp,
    tokens: Sequence[str],
    guarded: Sequence[str],
    unknown: Sequence[str] = (),
) -> None:
    """Ids of all texts, with and without control tokens in them; `unknown` are texts of unknown tokens, if a folder's
    tokenizer is compared.
    """
    control = {*ours.control.values()}
    late = {*ours.normalized, *unknown}
    for text in texts(tokens):
        for special in (True, False):
            mine, expected = ours.encode(text, special=special), theirs.ids(text, special=special)
            left_out = any(marker in text for marker in (late if special else guarded))
            if left_out or (not special and not control.isdisjoint(expected)):
                row.guarded += 1
                continue
            row.texts += 1
            if mine != expected:
                row.differ(text=text, special=special, ours=mine[:40], llama_cpp=expected[:40])
    bos, eos, begins = theirs.defaults()
    mine_facts = (ours.bos_id, ours.eos_id, ours.add_bos)
    if begins != ours.add_bos or (ours.bos_id is not None and bos != ours.bos_id) or (ours.eos_id or eos) != eos:
        row.differ(what="BOS, EOS, whether BOS begins a text", ours=mine_facts, llama_cpp=(bos, eos, begins))


def compare_greedy(row: Row, path: Path, theirs: LlamaCpp) -> None:
    """Tokens after each prompt, by the float32 runner in NumPy."""
    with Model(checkpoint.open(path), Runtime(runner="numpy", context=256)) as model:
        for prompt in PROMPTS:
            ids = model.encode(prompt)
            expected = theirs.greedy(ids, GREEDY)
            mine: list[int] = []
            while len(mine) < GREEDY:  # an end token is a token here
                answer = model.generate(ids + mine, max_tokens=GREEDY - len(mine), temperature=0.0)
                if not answer.token_ids and answer.finish_reason == "stop":
                    break
                mine += answer.token_ids
                if answer.finish_reason == "stop":
                    break
            row.greedy += len(mine)
            if mine != expected[: len(mine)]:
                row.differ(what="greedy tokens", prompt=prompt, ours=mine, llama_cpp=expected)


@contextmanager
def opened(driver: Path, path: Path, what: str) -> Iterator[LlamaCpp]:
    peer = LlamaCpp(driver, path, what)
    try:
        yield peer
    finally:
        peer.close()


def vocabulary(row: Row, path: Path, driver: Path) -> None:
    """A file that is a vocabulary alone."""
    architecture = gguf.header(path).get("general.architecture")
    try:
        tokenizer = gguf.read_tokenizer(path)
    except Llama2Error as error:
        row.status = f"refused: {error}"
        if "\n" in str(error):
            row.differ(what="a refusal of several lines")
        return
    if architecture != "llama":
        row.differ(what=f"architecture {architecture} was opened")
        return
    inputs = path.with_name(path.name + ".inp")
    if inputs.exists():
        with open(inputs, encoding="utf-8", newline="") as file:
            cases = file.read().split(SEPARATOR)
        lines = path.with_name(path.name + ".out").read_text(encoding="utf-8").splitlines()
        for text, line in zip(cases, lines, strict=False):
            row.texts += 1
            expected = list(map(int, line.split()))
            if (mine := tokenizer.encode(text)) != expected:
                row.differ(vector=text, ours=mine[:40], expected=expected[:40])
    facts = gguf.header(path)
    tokens, guarded = added(
        tokenizer, facts["tokenizer.ggml.token_type"].tolist(), list(facts["tokenizer.ggml.tokens"])
    )
    with opened(driver, path, "vocabulary") as peer:
        compare_ids(row, tokenizer, peer, tokens, guarded)


def make_folder(wild: Path, name: str, changes: Mapping[str, Any], folder: Path) -> None:
    """A model folder with the metadata of `name`, its config.json with `changes`, the whole vocabulary, and tiny random
    float32 weights.
    """
    from safetensors.numpy import save_file

    source, substitutes = wild / name, FOLDERS[name]
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.endswith(".index.json") and file.name not in substitutes and file.stat().st_size < 8 << 20:
            shutil.copyfile(file, folder / file.name)
    for file_name, other in substitutes.items():
        if other is not None:
            shutil.copyfile(wild / other, folder / file_name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= changes
    heads = config["num_attention_heads"]
    shared = heads != config.get("num_key_value_heads", heads)
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 2 if shared else 4
    if "head_dim" in config:
        config["head_dim"] = 16
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return draw.normal(0, 0.1, shape).astype("<f4")

    d, hidden, kv, size = 64, 128, 16 * (2 if shared else 4), config["vocab_size"]
    tensors = {"model.embed_tokens.weight": matrix(size, d), "model.norm.weight": 1 + matrix(d)}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(size, d)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        shapes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (hidden, d), "mlp.up_proj": (hidden, d)}
        shapes |= {"mlp.down_proj": (d, hidden)}
        for module, shape in shapes.items():
            tensors[f"{layer}.{module}.weight"] = matrix(*shape)
            if config.get("mlp_bias" if module.startswith("mlp") else "attention_bias"):
                tensors[f"{layer}.{module}.bias"] = matrix(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = 1 + matrix(d)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    """Raises PeerError with the last line that a program wrote when it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(lines[-1] if lines else f"ended with {done.returncode}")


def both(row: Row, path: Path, tokenizer: Tokenizer, driver: Path) -> None:
    """A whole model that both open: ids, then greedy tokens; `tokenizer` is the folder's or the file's."""
    facts = gguf.header(path)
    pieces = list(facts["tokenizer.ggml.tokens"])
    types = facts["tokenizer.ggml.token_type"].tolist()
    tokens, guarded = added(tokenizer, types, pieces)
    if len(tokens) > ADDED:
        tokens = random.Random(0).sample(tokens, ADDED)
    with opened(driver, path, "model") as peer:
        unknown = [piece for piece, kind in zip(pieces, types, strict=True) if kind == 2 and row.part == "ours"]
        compare_ids(row, tokenizer, peer, tokens, guarded, unknown)
        compare_greedy(row, path, peer)


def theirs(row: Row, folder: Path, path: Path, sources: Path, python: str, driver: Path) -> None:
    """Their converter's file, opened by us."""
    path.unlink(missing_ok=True)
    converter = sources / "convert_hf_to_gguf.py"
    run(
        [str(python), converter, folder, "--outfile", path, "--outtype", "f32"],
        {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )
    both(row, path, checkpoint.open(path).tokenizer, driver)


def ours(row: Row, folder: Path, path: Path, driver: Path) -> None:
    """Our converter's file, opened by llama.cpp; the tokenizer is the folder's."""
    path.unlink(missing_ok=True)
    tokenizer = checkpoint.open(folder).tokenizer
    if tokenizer.prepend_scheme == "first":
        row.mode = "legacy"
        tokenizer.choose("legacy")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "llama2",
        "convert",
        folder,
        path,
        "--to",
        "gguf",
        "--receipt",
        "tensors",
    ]
    run([*command, "--force", "--tokenizer-mode", row.mode])
    both(row, path, tokenizer, driver)


def attempt(row: Row, work: Callable[..., None], *arguments: Any) -> Row:
    """Do it; what either side refuses becomes the row's status."""
    try:
        work(row, *arguments)
    except Llama2Error as error:
        row.status = f"refused by us: {error}"
    except PeerError as error:
        row.status = f"refused: {error}"
    for folder in (*{str(part.parent) for part in arguments if isinstance(part, Path)},):
        row.status = row.status.replace(f"{folder}/", "")
    print(f"{row.part:10}  {row.name:30}  {row.texts:6} texts  {row.status}", file=sys.stderr, flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="llama.cpp's sources")
    parser.add_argument("build", type=Path, help="where they were built")
    parser.add_argument("--wild", type=Path, help="folders with models' metadata")
    parser.add_argument("--only", nargs="*", help="names of vocabularies and folders (default: all)")
    parser.add_argument(
        "--python", default=sys.executable, help="has torch and transformers, for llama.cpp's converter"
    )
    parser.add_argument("-o", "--output", type=Path, help="a file for the JSON, instead of standard output")
    asked = parser.parse_args(arguments)

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        driver = compile_driver(asked.sources, asked.build, scratch)
        for path in sorted((asked.sources / "models").glob("ggml-vocab-*.gguf")):
            row = Row("vocabulary", path.stem.removeprefix("ggml-vocab-"))
            if not asked.only or row.name in asked.only:
                rows.append(attempt(row, vocabulary, path, driver))
        made = {**{name: (name, {}) for name in FOLDERS}, **VARIANTS} if asked.wild else {}
        for name, (wild, changes) in made.items():
            if asked.only and name not in asked.only:
                continue
            folder, file = scratch / name, scratch / "model.gguf"
            make_folder(asked.wild, wild, changes, folder)
            their_row, our_row = Row("theirs", name), Row("ours", name)
            rows.append(attempt(their_row, theirs, folder, file, asked.sources, asked.python, driver))
            rows.append(attempt(our_row, ours, folder, file, driver))
            shutil.rmtree(folder)
    text = json.dumps({**provenance(), "rows": [row.report() for row in rows]}, indent=1, ensure_ascii=False)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return any(row.status == "different" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
