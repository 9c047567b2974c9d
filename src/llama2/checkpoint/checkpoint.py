"""The seam between learning and using: a Checkpoint and its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2 import files
from llama2.checkpoint.lora import Adapter
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig
from llama2.ending import section
from llama2.errors import CheckpointError, DialogError, TokenizerError
from llama2.text import chat_formats

if TYPE_CHECKING:
    from llama2.text.tokenizer import Mode, Tokenizer

#: The extra tensor (1, D) of a reward model, a scalar head, by the name that transformers has for it.
SCORE_HEAD = "score.weight"


@dataclass
class Checkpoint:
    """A model on disk: configuration, tokenizer, named tensors, chat template and licence.

    `tensors` holds every name of `config.tensor_shapes()` and no other; `extras` are tensors beside them, by names of
    their own, such as a reward model's `value_head.weight`. Hugging Face's folders alone have a place for these.
    `metadata` is what the file says of itself, for display. `notes` are sentences on what was ignored or assumed.
    `tokenizer_source` is the tokenizer, or a function that makes it on first use. `templates` are all chat templates by
    name, `template` among them as "default".
    """

    path: Path
    format: str  # "gguf", "huggingface", "meta", "llama2c"
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    template: str | None = None  # Jinja source of the chat template
    licence: str | None = None
    name: str = ""
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokenizer_mode: Mode = "auto"  # which parts of a text get a space in front (text.tokenizer.Mode)
    base: Checkpoint | None = None  # the model without its `adapters`, where some were merged
    adapters: tuple[Adapter, ...] = ()
    tokenizer_source: Tokenizer | Callable[[], Tokenizer] | None = field(default=None, repr=False)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {name: text for name, text in self.templates.items() if name != "default"}
        self.templates = named if self.template is None else {"default": self.template, **named}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer. Raises TokenizerError when its vocabulary is damaged or unsupported."""
        if self.tokenizer_source is None:
            raise TokenizerError(f"{self.path}: has no tokenizer; give one with --tokenizer")
        with self.naming(), section:
            source = self.tokenizer_source
            tokenizer = source() if callable(source) else source
            if self.tokenizer_mode != "auto":
                tokenizer.choose(self.tokenizer_mode)
        return tokenizer

    def template_for(self, *, tools: bool) -> str | None:
        """The chat template of a dialog, with `tools` declared or without: as transformers chooses among several.

        Raises DialogError when a file has several and calls none of them default.
        """
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if self.template is None and self.templates:
            raise DialogError(
                f"{self.path}: has the chat templates {', '.join(self.templates)}, and none for every dialog; "
                "choose one with --template NAME"
            )
        return self.template

    @property
    def template_to_write(self) -> str | None:
        """The chat template for files written from this model: Llama 2's where a SentencePiece model has none.

        Such a model's folder then names the format that is used for it. Raises DialogError as `template_for` does.
        """
        template = self.template_for(tools=False)
        if template is None and self.tokenizer.kind == "sentencepiece":
            return chat_formats.source(chat_formats.LLAMA2, bos=True)
        return template

    @property
    def assumes_format(self) -> str | None:
        """What to say where a model names no chat format, and gets Llama 2's for want of one; None if sure.

        Without a template, a model is Llama 2 Chat by its vocabulary and its name; Meta's own files say no more.
        """
        if self.templates or self.tokenizer.kind != "sentencepiece":
            return None
        names = f"{self.name} {self.path.name} {self.metadata.get('_name_or_path')}"
        if self.tokenizer.vocab_size == 32000 and re.search(r"llama[-_ ]?v?2\b.*chat", names, re.IGNORECASE):
            return None
        return f"{self.name} names no chat format; Llama 2's is used; --template NAME chooses another"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Whatever is wrong with the vocabulary, the message begins with the checkpoint's path, or a file's in it."""
        try:
            yield
        except TokenizerError as error:
            message = str(error)
            raise TokenizerError(message if message.startswith(str(self.path)) else f"{self.path}: {message}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_finite(self) -> None:
        """Raise CheckpointError when a weight is NaN or infinite. Reads every float and every block's scales once."""
        from llama2.checkpoint import quantization

        for tensor in (*self.tensors.values(), *self.extras.values()):
            if not quantization.is_finite(tensor.data, tensor.format):
                changed = [a for a in self.adapters if tensor.name in a.updates or tensor.name in a.replacements]
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} holds weights that are not finite numbers; "
                    + (f"{changed[-1].path} changed it, give it a smaller scale" if changed else "download it again")
                )

    def refuse_extras(self, format: str) -> None:
        """Raise CheckpointError, for a format of files that has no place for extra tensors, where there are some."""
        if self.extras:
            name = files.quote(min(self.extras))
            raise CheckpointError(
                f"{self.path}: has the extra tensor {name}, which {format} has no place for; choose hf"
            )

    def release_pages(self) -> None:
        """Take the pages of all mapped files of the model out of memory (`MappedFile.release_pages`)."""
        tensors = (*self.tensors.values(), *self.extras.values())
        for file in {file for tensor in tensors for file in tensor.mapped}:
            file.release_pages()

    def close(self) -> None:
        """Release the mapping, and end the tokenizer's process. Views still in use keep their pages until they die."""
        self.tensors = self.extras = {}
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
        if self.base is not None:
            self.base.close()
