"""Who runs the pipeline: this machine, Slurm or Ray, by datatrove's executors."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from llama2.data.settings import Executor
from llama2.errors import DataError
from llama2.machine import processors


class _Quiet(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """Prints nothing by itself: what goes wrong is an exception, and figures are read from the logs' folder."""

    announce: Callable[[str], None] | None = None

    def run(self) -> Any:
        logger.disable("datatrove")
        if self.depends and not self.depends._launched:
            self.depends.run()
        if self.announce:
            self.announce(Path(self.logging_dir.path).name)
            self.announce = None  # workers, which get a copy of this, do not need it
        if self.workers > 1:  # the server that workers are forked from imports once what each of them needs
            multiprocess.set_forkserver_preload(["llama2.data.build"])
        return super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")  # here too, since it may run in another process
        with redirect_stderr(io.StringIO()):  # progress bars
            return super()._run_for_rank(rank, local_rank, node_rank)


def executor(
    settings: Executor,
    name: str,
    steps: Sequence[PipelineStep],
    tasks: int,
    logs: Path,
    after: Any,
    announce: Callable[[str], None] | None,
) -> Any:
    """An executor for one stage of a build, that first runs the stage `after`, where there is one.

    On this machine `announce` is called with each stage's name when it begins. Finished tasks are known by files in
    `logs`, and are not done again.
    """
    common = {"pipeline": list(steps), "tasks": tasks, "logging_dir": str(logs), "depends": after}
    workers = min(tasks, settings.workers or (processors() if settings.kind == "local" else tasks))
    if settings.kind == "local":
        local = _Quiet(**common, workers=workers)
        local.announce = announce
        return local
    if settings.kind == "ray":
        if not find_spec("ray"):
            raise DataError("executor.kind: Ray is not installed; pip install 'datatrove[ray]', or use local")
        return RayPipelineExecutor(**common, workers=workers, mem_per_cpu_gb=settings.memory)
    return SlurmPipelineExecutor(
        **common,
        workers=workers,
        mem_per_cpu_gb=settings.memory,
        time=settings.time,
        partition=settings.partition,
        job_name=f"llama2-data-{name}",
    )
