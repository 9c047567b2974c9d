"""Tokens a second of training, beside transformers and a loop in the manner of nanoGPT, both compiled.

The three train the same Llama (dim 512, 8 layers, 32,000 tokens, tied: 41.7 million parameters) on the same batches of
4 x 512 tokens, in bfloat16 autocast or float32, with clipping and fused AdamW. Each is a process of its own with an
empty cache of compiled code; it is started, takes its first step, and then they take turns. In each turn the rate of
PyTorch's own product of 2048 x 2048 matrices is measured too. The table goes to stderr, one JSON object with every
round to stdout. Needs PyTorch and transformers, as the tests do. Processors without instructions for bfloat16 imitate
it, so slowly that only `--precision fp32` is worth measuring there.

    python bench/train_step.py > train_step.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from provenance import provenance
from rounds import Figures, MeasurementError, Round, max_resident, real_cores
from torch import Tensor, nn

from llama2 import plan
from llama2.config import ModelConfig
from llama2.records import installed

CONFIG = ModelConfig(
    dim=512,
    n_layers=8,
    n_heads=8,
    n_kv_heads=8,
    hidden_dim=1376,
    vocab_size=32000,
    head_dim=64,
    context_length=512,
    tied_embeddings=True,
)
ROWS, LENGTH = 4, 512
RATE, CLIP, BETAS, EPS, DECAY = 3e-4, 1.0, (0.9, 0.95), 1e-5, 0.1
#: Steps of a turn, of which the median counts.
STEPS = 3

#: Takes a step with tokens and targets, and says its loss.
Take = Callable[[NDArray[np.int64], NDArray[np.int64]], float]
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contenders train, and how."""

    precision: Precision
    config: ModelConfig = CONFIG
    device: str = "cpu"


def ours(setting: Setting) -> Take:
    """llama2's own step."""
    from llama2.data.loader import TokenBatch
    from llama2.model.transformer import Transformer
    from llama2.train.processes import keep_memory
    from llama2.train.settings import OptimizerSettings
    from llama2.train.step import Step

    keep_memory()
    with torch.device(setting.device):
        network = Transformer(setting.config)
    adam = OptimizerSettings(betas=BETAS, eps=EPS, weight_decay=DECAY, clip=CLIP)
    step = Step(network, optimizer=adam, precision=setting.precision, compile=True)
    return lambda tokens, targets: step.step([TokenBatch(tokens, targets)], RATE).loss


def transformers_config(c: ModelConfig) -> Any:
    """A LlamaConfig of the same shape, for configurations without scaling of the rotary embedding, bias or window."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.hidden_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied_embeddings,
    )


def transformers(setting: Setting) -> Take:
    """LlamaForCausalLM under torch.compile."""
    from transformers import LlamaForCausalLM

    with torch.device(setting.device):
        model = LlamaForCausalLM(transformers_config(setting.config))
    model.config.use_cache = False
    compiled = torch.compile(model)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = compiled(input_ids=tokens, shift_labels=targets, labels=targets).loss
        return loss

    return loop(model, loss_of, setting)


def nanogpt(setting: Setting) -> Take:
    """A small model in one file, compiled whole, in the manner of nanoGPT."""
    model = Small(setting.config)
    return loop(model, torch.compile(model), setting)


def loop(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], setting: Setting) -> Take:
    """The usual step: autocast, backward, clip, fused AdamW that decays matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)

    def take(tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = loss_of(*(torch.from_numpy(ids).to(setting.device) for ids in (tokens, targets)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()

    return take


class SmallBlock(nn.Module):
    """Attention with one matrix for queries, keys and values, and a SwiGLU."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.n_heads
        self.norm1, self.norm2 = (nn.RMSNorm(c.dim, eps=c.norm_eps) for _ in range(2))
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.project = nn.Linear(c.dim, c.dim, bias=False)
        self.gate, self.up = (nn.Linear(c.dim, c.hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves: x (B, H, T, E), cos and sin (T, E / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Small(nn.Module):
    """Embeddings, blocks, a tied head, and the loss of all logits at once."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(SmallBlock(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        angles = torch.arange(c.context_length)[:, None] * torch.tensor(c.inverse_frequencies())
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                small = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.n_layers) if small else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embeddings.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


CONTENDERS: dict[str, Callable[[Setting], Take]] = {"llama2": ours, "transformers": transformers, "nanogpt": nanogpt}


def child(name: str, threads: int, precision: Precision) -> None:
    """Take a first step, then STEPS for each line on stdin, and each time say the median's seconds and the losses."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rng, take = np.random.default_rng(0), CONTENDERS[name](Setting(precision))
    first = True
    while first or sys.stdin.readline():
        seconds, losses = [], []
        for _ in range(1 if first else STEPS):
            ids = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1))
            start = time.perf_counter()
            losses.append(take(ids[:, :-1].copy(), ids[:, 1:].copy()))
            seconds.append(time.perf_counter() - start)
        first = False
        peak = max_resident(resource.getrusage(resource.RUSAGE_SELF))
        print(json.dumps({"seconds": statistics.median(seconds), "losses": losses, "peak MiB": peak}), flush=True)


@dataclass
class Contender:
    """A child process that waits for its turn."""

    process: subprocess.Popen[str]
    first_step: float  # seconds from the start of the process to the end of its first step
    losses: list[float]
    peak: float  # MiB

    @classmethod
    def start(cls, name: str, options: argparse.Namespace, stack: ExitStack, program: Sequence[str]) -> Contender:
        """A child of this `program` with no compiled code to find. Raises MeasurementError when it fails."""
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        command = [*program, "--child", name, "--threads", str(options.threads), "--precision", options.precision]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"},
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        contender = cls(process, 0.0, [], 0.0)
        contender._answer()
        contender.first_step = time.perf_counter() - start
        return contender

    def turn(self) -> Figures:
        """Take some steps."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        return {"train tokens/s": ROWS * LENGTH / self._answer()}

    def _answer(self) -> float:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise MeasurementError(f"{self.process.args!r} ended; see above")
        answer = json.loads(line)
        self.losses += answer["losses"]
        self.peak = answer["peak MiB"]
        return float(answer["seconds"])


def product(precision: Precision) -> Figures:
    """The rate of a product of matrices, which is the limit; a multiplication and an addition are two."""
    size, seconds = 2048, []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return {"product GFLOP/s": 2 * size**3 / statistics.median(seconds[2:]) / 1e9}


def one_round(programs: dict[str, Callable[[], Figures]], first: int, threads: int) -> Round:
    """All take a turn, beginning with number `first`, between probes of the cores.

    What other processes leave to them is not known here, because the children still live, so every round counts.
    """
    names, figures, cores = list(programs), dict[str, Figures](), [real_cores(threads)]
    for name in names[first:] + names[:first]:
        figures[name] = programs[name]()
        cores.append(real_cores(threads))
    return Round(figures, cores, [], counts=True)


def summary(rounds: list[Round], contenders: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by contender. Ratios are medians of each round's."""
    counting = [one.figures for one in rounds]
    rates = {name: [figures[name]["train tokens/s"] for figures in counting] for name in contenders}
    products = [figures["product"]["product GFLOP/s"] for figures in counting]
    flops = CONFIG.training_flops(1)
    table = {}
    for name, contender in contenders.items():
        shares = [rate * flops / 1e9 / limit for rate, limit in zip(rates[name], products, strict=True)]
        ratios = [ours / rate for ours, rate in zip(rates["llama2"], rates[name], strict=True)]
        table[name] = {
            "tokens/s": statistics.median(rates[name]),
            "llama2 ×": statistics.median(ratios),
            "share of product rate": statistics.median(shares),
            "first step s": contender.first_step,
            "peak MiB": contender.peak,
        }
    machine = plan.Machine("this", 1.0, 1.0, overhead=plan.TRAINER)
    run = plan.TrainingRun(context=LENGTH, sequences=ROWS, batch_tokens=ROWS * LENGTH, products=True)
    table["llama2"]["planned MiB"] = sum(plan.training(CONFIG, machine, run).memory.values()) / 2**20
    return table


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of all (default 2)")
    parser.add_argument("--pairs", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), help="contenders (all)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of products (default bf16)")
    parser.add_argument(
        "--before", metavar="FOLDER", help="a clone with a .venv, of an earlier version to compare with"
    )
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.threads, options.precision)
        return

    torch.set_num_threads(options.threads)
    rounds: list[Round] = []
    with ExitStack() as stack:
        here = [sys.executable, __file__]
        contenders = {name: Contender.start(name, options, stack, here) for name in options.only}
        if options.before:
            there = [f"{options.before}/.venv/bin/python", f"{options.before}/bench/train_step.py"]
            contenders["before"] = Contender.start("llama2", options, stack, there)
        programs = {name: contender.turn for name, contender in contenders.items()} | {
            "product": partial(product, options.precision)
        }
        for turn in range(options.pairs):
            rounds.append(one_round(programs, turn % len(programs), options.threads))
            print(".", end="", file=sys.stderr, flush=True)
    table = summary(rounds, contenders)
    print(file=sys.stderr)
    for name, figures in table.items():
        print(f"{name:14}", *(f"{key} {value:.4g}  " for key, value in figures.items()), file=sys.stderr)
    json.dump(
        {
            **provenance(),
            "torch": installed("torch"),
            "transformers": installed("transformers"),
            "threads": options.threads,
            "precision": options.precision,
            "table": table,
            "losses": {name: contender.losses for name, contender in contenders.items()},
            "rounds": [asdict(one) for one in rounds],
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
