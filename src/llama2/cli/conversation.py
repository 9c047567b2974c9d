"""A chat that can be saved and taken up again: a JSON file that says who said what to which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.engine.request import Sampling
from llama2.errors import Llama2Error

_FORMAT = "llama2 conversation 1"
_LIMIT = 1 << 26  # bytes of a file that is read


@dataclass
class Conversation:
    """Messages in the form of `Model.chat`, the model that answered, and the sampling settings that were chosen."""

    model: str
    sampling: dict[str, Any] = field(default_factory=dict)  # by the names of `Sampling`; the rest at its defaults
    messages: list[dict[str, str]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # as `--adapter` gave them

    @property
    def system(self) -> str | None:
        """The system prompt, the first message of a conversation that has one."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages = ([{"role": "system", "content": text}] if text else []) + self.turns

    @property
    def turns(self) -> list[dict[str, str]]:
        """What user and assistant said."""
        return self.messages[self.system is not None :]

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        del self.messages[self.system is not None :]

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. Raises OSError, or Llama2Error where it cannot be."""
        from llama2.version import package_version

        if path.exists():
            self.load(path)
        text = json.dumps({"format": _FORMAT, "version": package_version(), **asdict(self)}, indent=2)
        with files.create(path, error=Llama2Error) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises OSError, or Llama2Error when the file is damaged or something else."""
        from llama2.text.dialog import Dialog

        if path.exists() and not (path.is_file() or path.is_dir()):  # a folder is refused when it is opened
            raise Llama2Error(f"{path}: is not a regular file, which could wait or never end")
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
        if len(data) > _LIMIT:
            raise Llama2Error(f"{path}: larger than {_LIMIT >> 20} MB, which no saved conversation is")
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Llama2Error(f"{path}: not a saved conversation, since it is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise Llama2Error(f"{path}: not a saved conversation, which `/save` in `llama2 chat` writes")
        try:
            model, sampling, messages = (record[name] for name in ("model", "sampling", "messages"))
            if not isinstance(model, str):
                raise TypeError(f"model is {type(model).__name__}, not text")
            adapters = [*record.get("adapters", ())]
            if not all(isinstance(adapter, str) for adapter in adapters):
                raise TypeError("adapters are not all text")
            sampling = {**sampling}
            if "logit_bias" in sampling:  # JSON has no numbers as names
                sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
            Sampling(**sampling)
            Dialog(messages, strict=False)
            if messages[-1]["role"] != "assistant":
                raise ValueError("its last message is not the assistant's")
        except (Llama2Error, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise Llama2Error(f"{path}: damaged conversation: {reason}") from error
        return cls(model, sampling, messages, adapters)
