"""A chat that can be saved and taken up again: a JSON file that says who said what to which model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
        """Write the file whole or not at all. Raises OSError, or Llama2Error if it is of another kind."""
        import llama2

        if path.exists():
            self.load(path)
        text = json.dumps({"format": _FORMAT, "version": llama2.__version__, **asdict(self)}, indent=2)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises OSError, or Llama2Error when the file is damaged or something else."""
        from llama2.text.dialog import Dialog

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
            sampling = {**sampling}
            if "logit_bias" in sampling:  # JSON has no numbers as names
                sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
            Sampling(**sampling)
            Dialog(messages)
            if messages[-1]["role"] != "assistant":
                raise ValueError("its last message is not the assistant's")
        except (Llama2Error, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise Llama2Error(f"{path}: damaged conversation: {reason}") from error
        return cls(model, sampling, messages)
