"""The processes of a run: one alone, or as many as torchrun started."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama2 import native
from llama2.errors import RunError


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all: `dp_rank` of `dp_size` that read different rows. `mesh` is None for one alone."""

    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def bf16(self) -> bool:
        """Whether there are instructions for bfloat16; a CPU without them imitates it, a hundred times as slowly."""
        return self.device.type != "cpu" or "avx512_bf16" in native.supported()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def processes(tensor: int) -> Iterator[Processes]:
    """Join torchrun's processes, if it started this one; `tensor` of them share each matrix.

    Raises RunError when they cannot be divided so.
    """
    keep_memory()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else _CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count % tensor:
        raise RunError(f"mesh.tensor={tensor} does not divide {count} processes; start a multiple of it by torchrun")
    if "RANK" not in os.environ:
        yield Processes(device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device.type, (count // tensor, tensor), mesh_dim_names=("dp", "tp"))
        yield Processes(device, mesh.get_local_rank("dp"), count // tensor, mesh)
    finally:
        dist.destroy_process_group()


_CPU = torch.device("cpu")
Value = TypeVar("Value")


def broadcast(value: Value) -> Value:
    """The main process's value, for all."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def keep_memory() -> None:
    """Let this process keep what it frees, in huge pages: a step on a CPU is a quarter faster. Before the first tensor.

    Else Linux takes back every large tensor, and clears its pages one by one when the next step allocates them again.
    The settings are those of glibc and of torch's allocator; with other ones, nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
