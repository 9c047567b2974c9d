"""Chat formats by name, for models whose files bring none: Jinja sources of our own, and what ends an answer in them.

The files in `templates/` write a dialog as the formats' authors published it, without the token that begins a text.
That is put in front where the vocabulary begins a text with one, as FastChat and llama.cpp do. Their names are
llama.cpp's or FastChat's. Llama 2's own format begins each turn so, and says it itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from llama2 import files
from llama2.errors import TemplateError
from llama2.text.tokenizer import Tokenizer

LLAMA2 = "llama2"

#: Texts that end an answer in each format: who speaks next, or an end of turn that the vocabulary may lack as a token.
STOPS: Mapping[str, tuple[str, ...]] = {
    LLAMA2: (),
    "llama3": ("<|eot_id|>",),
    "chatml": ("<|im_end|>",),
    "vicuna": ("USER:",),
    "vicuna-v0": ("### Human:",),
    "vicuna-orca": ("USER:",),
    "alpaca": ("### Instruction:",),
    "mistral-v1": ("[INST]",),
    "mistral-v3": ("[INST]",),
    "mistral-v3-tekken": ("[INST]",),
    "mistral-v7-tekken": ("[INST]",),
    "zephyr": ("<|user|>",),
    "tulu": ("<|user|>",),
    "phi3": ("<|end|>",),
    "openchat": ("<|end_of_turn|>",),
    "deepseek-coder": ("<|EOT|>",),
    "pygmalion": ("<|user|>",),
}

#: Other programs' names of some of them.
ALIASES = {"llama-2": LLAMA2, "llama-3": "llama3", "deepseek": "deepseek-coder", "metharme": "pygmalion"}

_BOS = "{{ bos_token }}"
_LONGEST = 1 << 20  # bytes of a file


def source(name: str, *, bos: bool) -> str:
    """The Jinja source of a name in STOPS; with `bos`, for a vocabulary that begins a text with such a token."""
    text = Path(__file__).with_name("templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    return _BOS + text if bos and name != LLAMA2 else text


def named(template: str) -> str | None:
    """The name of a template of ours, by its whole text, or None."""
    return _names().get(template)


def choose(wanted: str, own: Mapping[str, str], tokenizer: Tokenizer) -> str:
    """The template that is `wanted`: by its name among the model's `own`, by one in STOPS, or a Jinja file.

    Raises TemplateError when there is no such name and no such file, or the file is not text.
    """
    if wanted in own:
        return own[wanted]
    name = ALIASES.get(wanted, wanted)
    if name in STOPS:
        return source(name, bos=tokenizer.add_bos)
    path = Path(wanted).expanduser()
    if not path.is_file():
        there = ", ".join([*(other for other in own if other != "default"), *STOPS])
        raise TemplateError(f"template {wanted}: neither a file nor a chat format; these are: {there}")
    try:
        return files.read(path, limit=_LONGEST, error=TemplateError).decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: is not UTF-8 text at byte {error.start}; convert it first") from None


@cache
def _names() -> dict[str, str]:
    return {source(name, bos=bos): name for name in STOPS for bos in (False, True)}
