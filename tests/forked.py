"""Several processes as torchrun starts them, but forked from one that has imported PyTorch and not used it yet.

python forked.py PROCESSES 'JSON list of commands of llama2, each a list of words'
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable

from torch.multiprocessing import start_processes


def start(processes: int, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in each process, and wait for the end of all. Raises what ended one of them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    start_processes(_join, (processes, port, function, arguments), processes, start_method="fork")


def _join(rank: int, processes: int, port: int, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}
    function(*arguments)


if __name__ == "__main__":
    import llama2.train.pretrain  # noqa: F401  (before the fork)
    from llama2.cli.main import run

    for words in json.loads(sys.argv[2]):
        start(int(sys.argv[1]), run, words)
