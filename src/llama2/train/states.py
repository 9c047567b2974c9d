"""Saved states of a run: what resumes it (torch's distributed checkpoints, DCP), and beside that the whole model.

states/step-00001000/             appears when all in it is written, by one renaming
states/step-00001000/model/       safetensors, configuration and tokenizer, which need no torch
states/step-00001000/adapter/     instead of the model, where adapters are trained
states/step-00001000/*.distcp     trained parameters, AdamW's moments, and the positions of loader and loop
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from llama2 import files
from llama2.checkpoint import Checkpoint, Tensor, hf_folder
from llama2.config import ModelConfig
from llama2.errors import CheckpointError, RunError
from llama2.model.transformer import stored
from llama2.records import ADAPTER, MODEL, STATE, states_folder
from llama2.text.tokenizer import Tokenizer
from llama2.train.processes import broadcast
from llama2.train.step import Step

#: The file that DCP writes last.
_PLAN = ".metadata"
#: Writes an adapter to a folder, from the trained parameters.
AdapterWriter = Callable[[Path, dict[str, Any]], None]


class States:
    """The states in a run's folder. All processes call every method, in the same order.

    A state is written while the run continues. A failure is in `failure` after the next call, and costs no more than
    the state: those before it stay. Saving and loading need the context that this object is, which ends by waiting for
    the last state.
    """

    def __init__(
        self,
        run: Path,
        step: Step,
        config: ModelConfig,
        tokenizer: Tokenizer,
        template: str | None,
        *,
        keep_last: int,
        adapter: AdapterWriter | None = None,
    ) -> None:
        self.run, self.folder = run, states_folder(run)
        self._step, self._keep_last, self._adapter = step, keep_last, adapter
        self._like = Checkpoint(run, "huggingface", config, {}, {}, template, tokenizer_source=tokenizer)
        self._writing: tuple[Path, Future[Any]] | None = None
        self._stack = ExitStack()
        self._frozen = adapter is not None  # all but what the adapter has
        self.failure: str | None = None  # of the last state
        # A state is written beside steps, whose messages must not be taken for its own.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.is_main = _is_main()  # the process that renames and removes
        if self.is_main:
            for part in self.folder.glob("*.part"):  # of a process that was killed
                _delete(part)

    def __enter__(self) -> States:
        self._stack.enter_context(warnings.catch_warnings())
        # DCP warns that one process saves alone, in a thread of its own: a filter around the call would miss it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if not dist.is_initialized():  # else others might wait for a process that has ended
                self.finish()

    def steps(self) -> list[int]:
        """Of which steps there are whole states, in order."""
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return sorted(int(match[1]) for path in paths if (match := re.fullmatch(STATE, path.name)) and _whole(path))

    def last(self) -> int | None:
        """The step of the last whole state, if there is one, as the main process finds it."""
        self.finish()
        steps: list[int] = self.steps() if self.is_main else []
        return broadcast(max(steps, default=None))

    def path(self, step: int) -> Path:
        """Where a step's state is."""
        return self.folder / f"step-{step:08d}"

    def written(self, step: int) -> Path:
        """Where a step's model or adapter is."""
        return self.path(step) / (ADAPTER if self._adapter else MODEL)

    def save(self, step: int, loop: dict[str, Any]) -> None:
        """Begin to save the state after a step; `loop` is what else a resumed run needs, as JSON can hold it."""
        self.finish()
        path = self.path(step)
        part = _part(path)
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=dist.is_initialized(), ignore_frozen_params=self._frozen
        )
        whole = get_model_state_dict(self._step.network, options=options)  # in the main process alone
        refused = None
        if self.is_main:
            try:
                part.mkdir(parents=True)
                if self._adapter:
                    self._adapter(part / ADAPTER, whole)
                else:
                    write_model(part / MODEL, whole, self._like, self._step.precision)
            except (OSError, CheckpointError) as error:
                refused = _words(error)
        if refused := broadcast(refused):
            self._failed(path, refused)
            return
        try:
            future = state_dict_saver.async_save(
                self._state(loop), checkpoint_id=part, process_group=self._group, no_dist=not dist.is_initialized()
            )
        except (OSError, CheckpointException) as error:
            self._failed(path, _words(error))
            return
        self._writing = path, cast(Future[Any], future)

    def poll(self) -> None:
        """Publish the state that is being written, if it is whole by now."""
        if self._writing and self._writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the state that is being written, publish it, and remove those that are too many."""
        if self._writing is None:
            return
        path, future = self._writing
        self._writing = None
        try:
            future.result()
        except (OSError, CheckpointException) as error:
            self._failed(path, _words(error))
            return
        refused = None
        if self.is_main:
            try:
                if not _whole(_part(path)):
                    raise FileNotFoundError(errno.ENOENT, "something removed parts of it")
                if files.exists(path):  # half a state, or one that the run rewound past
                    _remove(path)
                _part(path).rename(path)
                for old in self.steps()[: -self._keep_last]:
                    _remove(self.path(old))
            except OSError as error:
                refused = _words(error)
        self.failure = None
        if refused := broadcast(refused):
            self._failed(path, refused)

    def load(self, step: int) -> dict[str, Any]:
        """Put a step's state in place, and return `loop` as it was saved. Raises RunError when it cannot be read."""
        state = self._state({})
        try:
            state_dict_loader.load(state, checkpoint_id=self.path(step), no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:  # whatever a damaged pickle may raise
            raise RunError(
                f"{self.path(step)}: cannot be read ({_words(error)}); remove it, and the run continues from "
                "the state before it"
            ) from error
        set_state_dict(
            self._step.network,
            self._step.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=self._frozen, strict=not self._frozen),
        )
        loop: dict[str, Any] = json.loads(state["loop"])
        return loop

    def _state(self, loop: dict[str, Any]) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=self._frozen)
        model, optimizer = get_state_dict(self._step.network, self._step.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "loop": json.dumps(loop)}

    def _failed(self, path: Path, reason: str) -> None:
        self.failure = f"{path}: cannot be saved ({reason}); free some room"
        if self.is_main:
            with suppress(OSError):
                _delete(_part(path))


def write_model(folder: Path, weights: dict[str, Any], like: Checkpoint, precision: str = "bf16") -> None:
    """Write the whole model as Hugging Face has it, in the precision that its products were done in.

    Weights that a Llama does not have are extra tensors, in float32. All else is as in `like`.
    """
    known = like.config.tensor_shapes()
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    for name, weight in weights.items():
        bf16 = precision == "bf16" and name in known
        tensor = stored(name, weight.detach().to("cpu", torch.bfloat16 if bf16 else torch.float32))
        (tensors if name in known else extras)[name] = tensor
    hf_folder.write(replace(like, tensors=tensors, extras=extras), folder)


def _is_main() -> bool:
    """Whether this is the only process, or the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _part(path: Path) -> Path:
    """The name of a state that is not whole yet."""
    return path.with_name(f"{path.name}.part")


def _whole(path: Path) -> bool:
    """Whether a folder has both parts of a state: what resumes the run, and the model or the adapter."""
    found = [(path / name).is_file() for name in (f"{MODEL}/config.json", f"{ADAPTER}/adapter_config.json")]
    return (path / _PLAN).is_file() and any(found)


def _remove(path: Path) -> None:
    """Remove a state so that no half of it can be taken for whole."""
    old = _part(path.with_name(f"{path.name}.old"))
    path.rename(old)
    _delete(old)


def _delete(path: Path) -> None:
    """Remove a folder with all that is in it, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _words(error: BaseException) -> str:
    """An exception's message, or that of the innermost that DCP hides in it, on one line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())[:300]
