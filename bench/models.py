"""Writes the models of `bench/table.py` in a folder, from the default model alone; 10 GB, about two minutes.

The default model's other formats are llama-quantize's. The 1.1B and 7B shapes have random weights of a sensible size,
in the formats that llama-quantize would choose; their vocabulary is the default model's, or its first 32,000 tokens, so
that every program opens them. A file appears whole or not at all, and what is there is kept.

    python bench/models.py DIR --peers PEERS

With `--folder` it writes for `bench/quantize.py` instead: DIR/7b-hf, the 7B shape as a Hugging Face folder in BF16,
13.5 GB, whose weights are random and normal. Its SentencePiece vocabulary has Llama 2's layout and made-up words.

    python bench/models.py DIR --folder
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from llama2 import hub
from llama2.checkpoint import Checkpoint, Tensor, hf_folder
from llama2.config import SIZES, ModelConfig
from llama2.text import tokenizer
from llama2.text.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer

Mix = Literal["Q4_0", "Q4_K_M"]

#: Standard deviation of every random weight, and a typical one of a trained model.
DEVIATION = 0.02
#: Standard deviations of the integers 0 to 15 and 0 to 63, all equally likely: sqrt((n² − 1) / 12).
_SPREAD_4, _SPREAD_6 = (255 / 12) ** 0.5, (4095 / 12) ** 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with random weights."""

    name: str
    config: ModelConfig
    mix: Mix


_1_1B = ModelConfig(
    dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=49152, head_dim=64, context_length=2048
)

SHAPES = [Shape("1.1b-q4_0", _1_1B, "Q4_0"), Shape("7b-q4_0", SIZES["7B"], "Q4_0")]
SHAPES += [Shape("7b-q4_k_m", SIZES["7B"], "Q4_K_M")]


def matrices(config: ModelConfig) -> Iterator[tuple[str, int | None, tuple[int, int]]]:
    """GGUF's name, layer if any, and (rows, columns) of every matrix."""
    d, kv, h = config.dim, config.n_kv_heads * config.head_dim, config.hidden_dim
    yield "token_embd", None, (config.vocab_size, d)
    for layer in range(config.n_layers):
        yield "attn_q", layer, (d, d)
        yield "attn_k", layer, (kv, d)
        yield "attn_v", layer, (kv, d)
        yield "attn_output", layer, (d, d)
        yield "ffn_gate", layer, (h, d)
        yield "ffn_up", layer, (h, d)
        yield "ffn_down", layer, (d, h)
    yield "output", None, (config.vocab_size, d)


def format_of(name: str, layer: int | None, layers: int, mix: Mix) -> GGMLType:
    """The format that llama-quantize gives a Llama's matrix (`llama_tensor_get_type` in its llama-quant.cpp)."""
    if name == "output":
        return GGMLType.Q6_K
    if mix == "Q4_0":
        return GGMLType.Q4_0
    more_bits = layer is not None and (
        layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    )
    return GGMLType.Q6_K if name in ("attn_v", "ffn_down") and more_bits else GGMLType.Q4_K


def random_blocks(format: GGMLType, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks (count, bytes of one) whose weights have mean 0 and standard deviation DEVIATION."""
    block, size = gguf.GGML_QUANT_SIZES[format]
    data = rng.integers(0, 256, (count, size), dtype=np.uint8)
    sign = rng.choice(np.array([-1, 1], np.int8), (count, 1))
    match format:
        case GGMLType.Q4_0:  # scale · (q − 8); a scale of either sign makes the mean 0
            data[:, :2] = _half(sign * DEVIATION / _SPREAD_4)
        case GGMLType.Q4_K:  # d · s · q − dmin · m with 8 pairs of 6-bit s, m; here m = s and dmin = 7.5 d
            s = rng.integers(16, 64, (count, 8), dtype=np.uint8)
            d = DEVIATION / _SPREAD_4 / float(np.sqrt(np.mean(np.arange(16, 64) ** 2)))
            data[:, 0:2] = _half(np.full((count, 1), d))
            data[:, 2:4] = _half(np.full((count, 1), 7.5 * d))
            data[:, 4:8] = data[:, 8:12] = s[:, :4] | s[:, 4:] >> 4 << 6
            data[:, 12:16] = (s[:, 4:] & 15) * 17
        case GGMLType.Q6_K:  # d · s · (q − 32) with 16 s of 8 bits; an s of either sign makes the mean 0
            s = rng.integers(32, 128, (count, 16), dtype=np.int8)
            data[:, 192:208] = (s * rng.choice(np.array([-1, 1], np.int8), s.shape)).view(np.uint8)
            d = DEVIATION / _SPREAD_6 / float(np.sqrt(np.mean(np.arange(32, 128) ** 2)))
            data[:, 208:210] = _half(np.full((count, 1), d))
        case _:
            raise ValueError(f"no random blocks of {format.name}, whose blocks hold {block} weights")
    return data


def _half(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.astype("<f2").view(np.uint8)


def write_random(shape: Shape, vocabulary: gguf.GGUFReader, path: Path) -> None:
    """Write `shape` with random weights, norms of ones, and the first tokens of another file's vocabulary."""
    c, rng = shape.config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, shape)
    _add_vocabulary(writer, vocabulary, c.vocab_size)
    norms = ["output_norm.weight"]
    norms += [f"blk.{layer}.{name}.weight" for layer in range(c.n_layers) for name in ("attn_norm", "ffn_norm")]
    content: list[Callable[[], NDArray[Any]]] = []
    for name in norms:
        writer.add_tensor_info(name, (c.dim,), np.dtype(np.float32), 4 * c.dim)
        content.append(partial(np.ones, c.dim, np.float32))
    for name, layer, (rows, columns) in matrices(c):
        format = format_of(name, layer, c.n_layers, shape.mix)
        block, size = gguf.GGML_QUANT_SIZES[format]
        count, width = rows * columns // block, columns // block * size
        full = f"{name}.weight" if layer is None else f"blk.{layer}.{name}.weight"
        writer.add_tensor_info(full, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=format)
        content.append(partial(random_blocks, format, count, rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in content:
        writer.write_tensor_data(make())
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    c = shape.config
    writer.add_name(f"random-{shape.name}")
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{shape.mix}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: gguf.GGUFWriter, source: gguf.GGUFReader, size: int) -> None:
    """The first `size` tokens of a byte-level BPE vocabulary, and the merges that make them."""

    def contents(name: str) -> Any:
        return source.fields[f"tokenizer.ggml.{name}"].contents()

    tokens = contents("tokens")[:size]
    known = set(tokens)
    merges = [merge for merge in contents("merges") if known.issuperset((*merge.split(" "), merge.replace(" ", "", 1)))]
    writer.add_tokenizer_model(contents("model"))
    writer.add_tokenizer_pre(contents("pre"))
    writer.add_token_list(tokens)
    writer.add_token_types(contents("token_type")[:size])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(contents("bos_token_id"))
    writer.add_eos_token_id(contents("eos_token_id"))
    writer.add_unk_token_id(contents("unknown_token_id"))
    writer.add_pad_token_id(contents("padding_token_id"))
    writer.add_add_bos_token(False)


def write_folder(config: ModelConfig, path: Path) -> None:
    """Write a model of random normal weights in BF16, norms of ones, as a Hugging Face folder."""

    def weights(seed: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        count = int(np.prod(shape))
        if len(shape) == 1:
            return np.full(count, 0x3F80, np.uint16).view(np.uint8)
        x = np.random.default_rng(seed).standard_normal(count, np.float32)
        x *= DEVIATION
        return np.ascontiguousarray(x.view(np.uint16)[1::2]).view(np.uint8)  # BF16 is float32's upper half

    tensors = {
        name: Tensor(name, "BF16", shape, partial(weights, seed, shape))
        for seed, (name, shape) in enumerate(config.tensor_shapes().items())
    }
    checkpoint = Checkpoint(path, "huggingface", config, tensors, {}, name=path.name)
    checkpoint.tokenizer_source = partial(made_up_vocabulary, config.vocab_size)
    hf_folder.write(checkpoint, path)


def made_up_vocabulary(size: int) -> Tokenizer:
    """Llama 2's layout: <unk> <s> </s>, 256 bytes, then words of one letter, two, three and so on."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    special += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    words = chain.from_iterable(map("".join, product(letters, repeat=length)) for length in range(1, 6))
    pieces = special + [(word, NORMAL) for word in islice(words, size - len(special))]
    scores = [-float(i) for i in range(size)]
    return tokenizer.from_pieces([piece for piece, _ in pieces], scores, [kind for _, kind in pieces])


def requantise(model: Path, format: str, llama_quantize: Path, path: Path) -> None:
    """Write the default model in another format. Raises SystemExit with llama-quantize's last words when it fails."""
    command = [str(llama_quantize), "--allow-requantize", str(model), str(path), format]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama-quantize ended with exit code {done.returncode}:\n{done.stderr[-500:]}")


def make(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder that is not there yet; it gets its name when it is whole."""
    if path.exists():
        print(f"{path.name}: kept", file=sys.stderr)
        return
    start, temporary = time.perf_counter(), path.with_suffix(".part")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    write(temporary)
    os.replace(temporary, path)
    files = path.iterdir() if path.is_dir() else [path]
    written = sum(file.stat().st_size for file in files)
    print(f"{path.name}: {written / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s", file=sys.stderr)


def main() -> None:
    """Parse the command line, write what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("DIR", type=Path, help="where the models shall be")
    parser.add_argument("--peers", type=Path, help="the folder of bench/peers.sh, for llama-quantize")
    parser.add_argument("--folder", action="store_true", help="write the Hugging Face folder alone")
    parser.add_argument("-m", "--model", default=hub.DEFAULT, help=f"name or file of the default model ({hub.DEFAULT})")
    options = parser.parse_args()

    options.DIR.mkdir(parents=True, exist_ok=True)
    if options.folder:
        make(options.DIR / "7b-hf", partial(write_folder, SIZES["7B"]))
        return
    if options.peers is None:
        parser.error("--peers is missing; give the folder of bench/peers.sh")
    model = hub.locate(options.model).resolve()
    make(options.DIR / "default-q4_1.gguf", lambda path: path.symlink_to(model))
    quantize = options.peers / "llama.cpp" / "bin" / "llama-quantize"
    for format in ("Q4_0", "Q8_0"):
        make(options.DIR / f"default-{format.lower()}.gguf", partial(requantise, model, format, quantize))
    vocabulary = gguf.GGUFReader(model)
    for shape in SHAPES:
        make(options.DIR / f"{shape.name}.gguf", partial(write_random, shape, vocabulary))


if __name__ == "__main__":
    main()
