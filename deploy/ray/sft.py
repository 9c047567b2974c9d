"""Fine-tuning on a Ray cluster: torchrun on each of some machines, which Ray chooses.

    ray job submit -- python deploy/ray/sft.py --nodes 2 --gpus 8 -- recipes/7b-sft.toml dialogs.jsonl --name mine

What follows `--` is `llama2 sft`'s. Paths must be on a file system that all machines see. A run that lost a machine
goes on when it is submitted again with --resume.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path


def address() -> tuple[str, int]:
    """This machine's address, and a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        return socket.gethostbyname(socket.gethostname()), free.getsockname()[1]


def command(rank: int, nodes: int, gpus: int, head: tuple[str, int], words: list[str]) -> list[str]:
    """torchrun's command line on machine `rank`."""
    programs = Path(sys.executable).parent
    return [
        *(str(programs / "torchrun"), "--nnodes", str(nodes), "--node-rank", str(rank)),
        *("--nproc-per-node", str(gpus), "--master-addr", head[0], "--master-port", str(head[1])),
        *(str(programs / "llama2"), "sft", *words),
    ]


def train(rank: int, nodes: int, gpus: int, head: tuple[str, int], words: list[str]) -> None:
    """What a machine does. Raises CalledProcessError, which ends the job, when its processes fail."""
    subprocess.run(command(rank, nodes, gpus, head, words), check=True)


def main() -> None:
    """Reserve whole machines, and train on them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus", type=int, required=True, help="processes on each, one a GPU; 0 computes on one CPU")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- ...", help="the words of llama2 sft")
    options = parser.parse_args()
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Placed

    ray.init()
    share = {"CPU": 1, **({"GPU": options.gpus} if options.gpus else {})}
    group = placement_group([share] * options.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def place(rank: int) -> dict[str, object]:
        strategy = Placed(placement_group=group, placement_group_bundle_index=rank)
        return {"num_cpus": 1, "num_gpus": options.gpus, "max_retries": 0, "scheduling_strategy": strategy}

    head = ray.get(ray.remote(address).options(**place(0)).remote())
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    remote = ray.remote(train)
    ray.get(
        [
            remote.options(**place(rank)).remote(rank, options.nodes, max(1, options.gpus), head, words)
            for rank in range(options.nodes)
        ]
    )


if __name__ == "__main__":
    main()
