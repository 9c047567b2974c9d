"""Saved states of a run: what resumes it (torch's distributed checkpoints), and beside that the whole model.

checkpoints/step-00001000/             appears when all in it is written, by one renaming
checkpoints/step-00001000/model/       safetensors, configuration and tokenizer, which need no torch
checkpoints/step-00001000/*.distcp     parameters, AdamW's moments, and where loader and loop stand
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from llama2.checkpoint import Checkpoint, Tensor, huggingface
from llama2.checkpoint.checkpoint import read_tokenizer
from llama2.config import ModelConfig
from llama2.errors import CheckpointError, RunError
from llama2.records import CHECKPOINTS, MODEL
from llama2.train.step import Step

_STEP = re.compile(r"step-(\d+)")

warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)  # it is one process


class Checkpoints:
    """The states in a run's folder. All processes call every method, in the same order.

    A state is written while the run goes on. What goes wrong with that is told at the next call, and costs no more
    than the state: those before it stay.
    """

    def __init__(self, run: Path, step: Step, config: ModelConfig, tokenizer: Path, *, keep: int) -> None:
        self.folder = run / CHECKPOINTS
        self._step, self._config, self._tokenizer, self._keep = step, config, tokenizer, keep
        self._writing: tuple[Path, Future[Any]] | None = None
        self.failure: str | None = None  # of the last state
        # Writing goes on beside steps, whose messages must not be taken for its own.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if _first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.part"):  # of a process that was killed
                shutil.rmtree(part)

    def steps(self) -> list[int]:
        """Of which steps there are whole states, in order."""
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir()) if self.folder.is_dir() else iter(())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where a step's state is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, loop: dict[str, Any]) -> None:
        """Begin to save the state after a step; `loop` is what else the run needs to go on, as JSON can hold it."""
        self.finish()
        path = self.path(step)
        part = path.with_name(f"{path.name}.part")
        try:
            if _first():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
            self._write_model(part / MODEL)
            future = state_dict_saver.async_save(
                self._state(loop), checkpoint_id=part, process_group=self._group, no_dist=not dist.is_initialized()
            )
        except (OSError, CheckpointError) as error:
            self._failed(part, error)
            return
        self._writing = path, cast(Future[Any], future)

    def finish(self) -> None:
        """Wait for the state that is being written, and remove those that are too many."""
        if self._writing is None:
            return
        path, future = self._writing
        self._writing = None
        part = path.with_name(f"{path.name}.part")
        try:
            future.result()
        except Exception as error:  # of any kind: DCP wraps what the file system says
            self._failed(part, error)
            return
        self.failure = None
        if _first():
            if path.exists():  # of before the run went back
                _remove(path)
            part.rename(path)
            for old in self.steps()[: -self._keep]:
                _remove(self.path(old))
        if dist.is_initialized():
            dist.barrier()

    def load(self, step: int) -> dict[str, Any]:
        """Put a step's state in place, and return `loop` as it was saved. Raises RunError when it cannot be read."""
        state = self._state({})
        try:
            state_dict_loader.load(state, checkpoint_id=self.path(step), no_dist=not dist.is_initialized())
        except Exception as error:
            raise RunError(
                f"{self.path(step)}: cannot be read ({_words(error)}); remove it, and the run continues from "
                "the state before it"
            ) from error
        set_state_dict(
            self._step.network,
            self._step.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        loop: dict[str, Any] = json.loads(state["loop"])
        return loop

    def _state(self, loop: dict[str, Any]) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._step.network, self._step.optimizer)
        return {"model": model, "optimizer": optimizer, "loop": json.dumps(loop)}

    def _write_model(self, folder: Path) -> None:
        whole = get_model_state_dict(
            self._step.network, options=StateDictOptions(full_state_dict=True, cpu_offload=dist.is_initialized())
        )
        if _first():
            write_model(folder, whole, self._config, self._tokenizer, self._step.precision)

    def _failed(self, part: Path, error: Exception) -> None:
        self.failure = f"{part.with_suffix('')}: cannot be saved ({_words(error)}); free some room"
        if _first():
            shutil.rmtree(part, ignore_errors=True)


def write_model(
    folder: Path, weights: dict[str, Any], config: ModelConfig, tokenizer: Path, precision: str = "bf16"
) -> None:
    """Write the whole model as Hugging Face has it, in the precision that its products were done in."""
    dtype, format = (torch.bfloat16, "BF16") if precision == "bf16" else (torch.float32, "F32")
    tensors = {}
    for name, weight in weights.items():
        data = weight.detach().to("cpu", dtype).contiguous()
        tensors[name] = Tensor(name, format, tuple(data.shape), data.view(torch.uint8).flatten().numpy())
    checkpoint = Checkpoint(folder, "huggingface", config, tensors, {})
    checkpoint._build_tokenizer = lambda: read_tokenizer(tokenizer, config.vocab_size)
    huggingface.write(checkpoint, folder)


def _first() -> bool:
    """Whether this process is the one that renames and removes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _remove(path: Path) -> None:
    """Remove a state so that no half of it can be taken for whole."""
    part = path.with_name(f"{path.name}.part")
    path.rename(part)
    shutil.rmtree(part)


def _words(error: BaseException) -> str:
    """What an exception says, or the innermost that DCP hides in it, on one line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())[:300]
