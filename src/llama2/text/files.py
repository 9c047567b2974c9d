"""A tokenizer's files: which reader takes each. A folder of them is Hugging Face's (`tokenizer_folder.py`)."""

from __future__ import annotations

from pathlib import Path

from llama2 import files
from llama2.errors import TokenizerError
from llama2.text import tiktoken, tokenizer, tokenizer_bin, tokenizer_folder
from llama2.text.tokenizer import Tokenizer


def read(path: Path, size: int) -> Tokenizer:
    """The tokenizer of one file, for a model with `size` rows of embeddings.

    A file is a `tokenizer.model` of SentencePiece or of Llama 3, a `tokenizer.json` with what is beside it, or
    llama2.c's `tokenizer.bin`. Raises TokenizerError when it is missing or damaged, or does not have `size` tokens.
    """
    if not files.exists(path):
        raise TokenizerError(f"no tokenizer in {path}; give its file with --tokenizer")
    if tokenizer_bin.matches(path):
        made = tokenizer_bin.read(path, size)
    elif path.name == "tokenizer.json":
        made = tokenizer_folder.read(path.parent, size=size)
    elif tiktoken.matches(data := tokenizer.read(path)):
        made = tiktoken.tokenizer(path, data, size)
    else:
        made = tokenizer.sentencepiece_model(path, data)
    if made.vocab_size != size:
        raise TokenizerError(
            f"{path}: has {made.vocab_size} tokens, and the model {size}; give the model's own tokenizer"
        )
    return made
