"""The processes of a run: one alone, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama2.errors import RunError


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all: `rank` of `world` that read different rows, on `device`; `mesh` is None for one alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that tells and writes."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return 1 if self.mesh is None else self.mesh.size()


@contextmanager
def processes(tensor: int) -> Iterator[Processes]:
    """Join torchrun's processes, if it started this one; `tensor` of them share each matrix.

    Raises RunError when they cannot be divided so.
    """
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
