"""Tokens a second of fine-tuning beside TRL's, and memory and loss of QLoRA beside LoRA.

    python bench/align_speed.py beside MODEL-HF > beside.json
    python bench/align_speed.py qlora -m smollm2-135m-instruct DIALOGS > qlora.json

`beside` needs TRL, in the environment that bench/trl_parity.py describes. It trains all weights, then an adapter, of a
folder such as `llama2 convert smollm2-135m-instruct MODEL-HF --to hf` writes. In each step both sides take the same
packed rows, one right after the other, and the ratio is taken within the step. Ours is compiled, as in every run of a
million tokens. TRL's has the defaults of its SFTConfig. Neither has gradient checkpointing.

`qlora` runs `llama2 sft` twice on the same dialogs, with --lora and with --qlora: the largest resident set of each
process, and the mean loss of the last tenth of its steps. The tables go to stderr, one JSON object to stdout. Exit code
1 says that a goal was missed: 1.2 times TRL's speed, 1.5 GB, 2 % of LoRA's loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from provenance import provenance
from rounds import max_resident

from llama2 import checkpoint, native
from llama2.model.transformer import Transformer
from llama2.records import Run, installed
from llama2.train import adapters
from llama2.train.processes import keep_memory
from llama2.train.settings import LoraSettings, OptimizerSettings
from llama2.train.step import Step

SPEED, RESIDENT, LOSS = 1.2, 1.5, 0.02
WARMUP = 2  # steps that do not count: they compile, and fill caches


def beside(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Tokens a second of both sides, of all weights and of an adapter."""
    import trl_parity

    keep_memory()
    bf16 = "avx512_bf16" in native.supported()
    precision: Literal["bf16", "fp32"] = "bf16" if bf16 else "fp32"
    found, good = {}, True
    for name, lora in (("sft", False), ("LoRA", True)):
        with tempfile.TemporaryDirectory() as folder, checkpoint.open(options.model) as base:
            data = trl_parity.dialogs(
                (options.steps + WARMUP) * options.rows * 3, base.config.vocab_size, options.length // 2
            )
            theirs = trl_parity.trainer(
                *(options.model, Path(folder), data, options.steps + WARMUP),
                rows=options.rows,
                length=options.length,
                packing=True,
                lora=lora,
                bf16=bf16,
            )
            network = Transformer.load(base)
            if lora:
                settings = LoraSettings(dropout=0)
                network = adapters.build(base, settings, precision=precision, seed=0, device=torch.device("cpu"))
            step = Step(network, optimizer=OptimizerSettings(), precision=precision, compile=not options.eager)
            times = _times(theirs, trl_parity.batches(theirs, options.steps + WARMUP), step)
        tokens = options.rows * options.length
        ratio = statistics.median(b / a for a, b in times[WARMUP:])
        ours, other = (tokens / statistics.median(side) for side in zip(*times[WARMUP:], strict=True))
        good &= ratio >= SPEED
        print(f"{name:5} {ours:8,.0f} tokens/s, TRL {other:8,.0f}; ratio {ratio:.2f}", file=sys.stderr)
        found[name] = {"seconds": times, "tokens_of_a_step": tokens, "ratio": ratio}
    return found | {"precision": precision, "compiled": not options.eager}, good


def _times(theirs: Any, rows: Any, step: Step) -> list[tuple[float, float]]:
    """Seconds of each step, ours and theirs, taken by turns."""
    from transformers import TrainerCallback

    times: list[list[float]] = []

    class Between(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun = time.perf_counter()
            step.step([next(rows)], 1e-5, len(times) + 1)
            times.append([time.perf_counter() - begun])
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1].append(time.perf_counter() - self.begun)

    theirs.add_callback(Between())
    theirs.train()
    return [(ours, other) for ours, other in times]


def qlora(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Memory and loss of both kinds of adapter."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("lora", "qlora"):
            words = ["sft", *options.words, "-m", options.model, f"--{kind}", "--runs", folder, "--out", kind]
            command = [sys.executable, "-m", "llama2", *words, f"steps={options.steps}", *options.set]
            with subprocess.Popen(command, stdout=sys.stderr) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)}: ended with exit code {process.returncode}")
            losses = [line["loss"] for line in Run.open(Path(folder, kind)).metrics()]
            last = float(np.mean(losses[-max(1, len(losses) // 10) :]))
            found[kind] = {"resident_gb": max_resident(usage) * 2**20 / 1e9, "last_loss": last, "losses": losses}
            print(f"{kind:5} {found[kind]['resident_gb']:.2f} GB resident, loss {last:.4f}", file=sys.stderr)
    apart = abs(found["qlora"]["last_loss"] / found["lora"]["last_loss"] - 1)
    print(f"losses differ by {apart:.2%}", file=sys.stderr)
    return found | {"apart": apart}, found["qlora"]["resident_gb"] <= RESIDENT and apart <= LOSS


def main() -> int:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("beside", help="tokens a second beside TRL's")
    speed.add_argument("model", type=Path, help="a folder as transformers reads it")
    speed.add_argument("--steps", type=int, default=10, help="steps that count, of each kind")
    speed.add_argument("--rows", type=int, default=2, help="rows of a step")
    speed.add_argument("--length", type=int, default=512, help="tokens of a row")
    speed.add_argument("--eager", action="store_true", help="do not compile ours")
    speed.set_defaults(measure=beside)
    memory = commands.add_parser("qlora", help="memory and loss of QLoRA beside LoRA")
    memory.add_argument("words", nargs="+", metavar="DIALOGS", help="files of dialogs, as for `llama2 sft`")
    memory.add_argument("-m", "--model", default="smollm2-135m-instruct", help="the model to begin with")
    memory.add_argument("--steps", type=int, default=200, help="steps of each run")
    memory.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both runs")
    memory.set_defaults(measure=qlora)
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # where transformers prints, too
        found, good = options.measure(options)
    versions = {name: installed(name) for name in ("trl", "transformers", "peft", "torch")}
    print(json.dumps(provenance() | {"versions": versions, "met": good, "measured": found}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
