"""PyTorch's paths on a GPU beside transformers and vLLM: speed of decode, prefill and training, in eight minutes.

Four parts, each a process of its own, whose figures are written as soon as they are known:

- `tests`: the repository's tests marked `gpu`.
- `inference`: Llama 2 7B's shape with random weights in bfloat16. Our engine over the torch runner with its paged
  cache, compiled and not, beside transformers' `generate` on the same weights, with a static cache and without.
  Decode of 1, 8 and 32 answers and prefill, by turns, and where a decoding step's time goes.
- `training`: a step of a model with 1.1 billion parameters, compiled, beside transformers'.
- `vllm`: the same workloads in vLLM, if it is installed.

Each speed has its share of what the GPU's maker states, and of what a plain product and a plain copy reach in the same
process. Without a GPU it says what it would measure, and exits with 0. `--dry-run` takes every path on the CPU with
tiny shapes, whose figures mean nothing.

    python bench/gpu.py                          # on a machine with a GPU; writes gpu.json
    python bench/gpu.py --dry-run -o dry.json    # anywhere

Needs PyTorch and transformers. `bench/gpu_wheels.sh` gathers what else must travel to a machine without a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from torch import Tensor
from train_step import Setting, Take, ours, transformers, transformers_config

from llama2 import plan, speed
from llama2.checkpoint import Checkpoint
from llama2.config import SIZES, ModelConfig
from llama2.engine.engine import Engine
from llama2.engine.runner import BLOCK
from llama2.engine.runner_torch import LiveTorchRunner
from llama2.model.transformer import Transformer
from llama2.records import installed
from llama2.text.tokenizer import CONTROL, NORMAL, UNKNOWN, from_pieces
from llama2.train.throughput import flops_per_token, peak_flops

#: Seconds that a part may take. What is left of the whole bounds it too.
PARTS = {"tests": 75, "inference": 200, "training": 110, "vllm": 150}

#: A contender's tokens a second for a number of sequences.
Measure = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: shapes and counts."""

    device: str
    config: ModelConfig
    training: ModelConfig
    batches: tuple[int, ...] = (1, 8, 32)
    depth: int = 512  # tokens of a prompt before decode
    generate: int = 48  # tokens of an answer
    prompt: int = 2048  # tokens of a prompt of prefill
    rows: int = 8  # of the training batch
    steps: int = 5  # of a turn of training
    rounds: int = 3


WHOLE = Plan(
    "cuda",
    SIZES["7B"],
    ModelConfig(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        hidden_dim=8192,
        vocab_size=32000,
        head_dim=64,
        context_length=2048,
    ),
)
_TINY = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=96, vocab_size=320, head_dim=16, context_length=256
)
DRY = Plan("cpu", _TINY, replace(_TINY, n_kv_heads=2), (1, 2), 40, 12, 96, 2, 1, 1)


def say(**figures: Any) -> None:
    """Figures for the parent, at once: it may end this process at any time."""
    print(json.dumps(figures), flush=True)


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def limits(device: str) -> dict[str, float]:
    """What a plain product of matrices and a plain copy reach: operations and bytes (read and written) a second."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 32 if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(8):
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[2:])

    return {
        "product operations/s": 2 * size**3 / best(lambda: a @ b),
        "copy bytes/s": 2 * source.numel() / best(lambda: target.copy_(source)),
    }


# Inference


def network(what: Plan) -> Transformer:
    """A network with random weights in bfloat16, made where it runs."""
    with torch.device("meta"):
        model = Transformer(what.config)
    model = model.to(torch.bfloat16).to_empty(device=what.device).requires_grad_(False)
    model.initialise()
    return model


def in_transformers(model: Transformer) -> Any:
    """transformers' model of the same weights. All but queries' and keys' rows, whose order differs, are shared."""
    from transformers import LlamaForCausalLM

    from llama2.checkpoint.hf_folder import heads_of, tensor_names

    names, weights = tensor_names(model.config), {}
    for name, weight in model.state_dict().items():
        heads = heads_of(name, model.config)
        halves = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous() if heads else weight
        weights[names[name]] = halves
    with torch.device("meta"):
        theirs = LlamaForCausalLM(transformers_config(model.config))
    theirs.load_state_dict(weights, assign=True)
    with torch.device(model.norm.weight.device):  # the meta device left it without numbers
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.generation_config.eos_token_id = None
    theirs.requires_grad_(False)
    return theirs.train(False)


def checkpoint_of(config: ModelConfig) -> Checkpoint:
    """A checkpoint of no tensors, for what reads a configuration and a tokenizer alone."""
    pieces = ["<unk>", "<s>", "</s>", *(f"▁word{i}" for i in range(3, config.vocab_size))]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (config.vocab_size - 3)]
    tokenizer = from_pieces(pieces, [-float(i) for i in range(len(pieces))], types)
    return Checkpoint(Path("random"), "random", config, {}, {}, tokenizer_source=tokenizer)


class Clock:
    """Times of an answer's tokens: transformers calls it after each."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, list[float]()

    def __call__(self, ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Never stops an answer."""
        wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def generated(what: Plan, model: Any, batch: int, static: bool) -> float:
    """Tokens a second of transformers' `generate` in decode, from the third token on."""
    from transformers import StoppingCriteriaList

    ids = torch.randint(3, what.config.vocab_size, (batch, what.depth), device=what.device)
    clock = Clock(what.device)
    options = {"cache_implementation": "static"} if static else {}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=what.generate,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    first, *_, last = clock.times[2:]
    return batch * (what.generate - 3) / (last - first)


@torch.inference_mode()
def read_prompts(what: Plan, model: Any, batch: int) -> float:
    """Tokens a second of transformers' forward pass over prompts, whose last tokens alone have logits."""
    ids = torch.randint(3, what.config.vocab_size, (batch, what.prompt), device=what.device)
    wait(what.device)
    start = time.perf_counter()
    model(ids, logits_to_keep=1)
    wait(what.device)
    return ids.numel() / (time.perf_counter() - start)


def agreement(model: Transformer, theirs: Any) -> dict[str, float]:
    """The logits of both on a text: they have the same weights, so only bfloat16's rounding is between them."""
    ids = torch.randint(3, model.config.vocab_size, (1, 64), device=model.norm.weight.device)
    with torch.inference_mode():
        a, b = model(ids)[0], theirs(ids).logits[0].float()
    error = (a - b).abs().max() / b.abs().max()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return {"largest difference of the largest logit": error.item(), "same first token": same.item()}


def engines(what: Plan, model: Transformer) -> dict[str, Engine]:
    """Our engine over the network as it is, and compiled, each with a cache for all sequences of a workload."""
    tokenizer = checkpoint_of(what.config).tokenizer
    longest = max(max(what.batches) * (what.depth + what.generate + BLOCK), 4 * what.prompt)
    blocks = -(-longest // BLOCK) + 1
    return {
        name: Engine(LiveTorchRunner(model, blocks, compile=compile), tokenizer, max_batch_tokens=tokens)
        for name, compile, tokens in (
            ("llama2", False, 512),
            ("llama2, 2,048 tokens a step", False, 2048),
            ("llama2, compiled", True, 512),
        )
    }


def workloads(what: Plan) -> Iterator[tuple[str, int, dict[str, Measure]]]:
    """Each workload's name and sequences, and what measures its contenders."""
    model = network(what)
    theirs, ours_by_name, fake = in_transformers(model), engines(what, model), checkpoint_of(what.config)
    say(agreement=agreement(model, theirs), parameters=what.config.parameters())

    def decode(engine: Engine) -> Measure:
        return lambda n: speed.decode(
            fake, engine, speed.Workload(prompt=1, generate=what.generate, depth=what.depth, batch=n)
        )

    def prefill(engine: Engine) -> Measure:
        return lambda n: speed.prefill(fake, engine, speed.Workload(prompt=what.prompt, generate=1, batch=n))

    decoders: dict[str, Measure] = {
        "llama2": decode(ours_by_name["llama2"]),
        "transformers": lambda n: generated(what, theirs, n, static=False),
        "llama2, compiled": decode(ours_by_name["llama2, compiled"]),
        "transformers, static cache": lambda n: generated(what, theirs, n, static=True),
    }
    yield f"decode {what.batches[0]}", what.batches[0], decoders
    for name in ("llama2", "llama2, compiled"):
        for n in (what.batches[0], what.batches[-1]):
            say(profile={f"{name}, decode {n}": profile(what, ours_by_name[name], fake, n)})
    for n in what.batches[:0:-1]:
        yield f"decode {n}", n, decoders
    readers: dict[str, Measure] = {name: prefill(engine) for name, engine in ours_by_name.items()}
    readers["transformers"] = lambda n: read_prompts(what, theirs, n)
    for n in (1, 4):
        yield f"prefill {n} x {what.prompt}", n, readers


def profile(what: Plan, engine: Engine, fake: Checkpoint, batch: int) -> dict[str, Any]:
    """Where the time of decoding steps goes: the share in which the device computes, and its longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    on_gpu = what.device == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    work = speed.Workload(prompt=1, generate=4, depth=what.depth, batch=batch)
    speed.decode(fake, engine, work)
    wait(what.device)
    start = time.perf_counter()
    with recorded(activities=activities) as found:
        speed.decode(fake, engine, work)
        wait(what.device)
    wall = (time.perf_counter() - start) * 1e6
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = sorted(found.key_averages(), key=lambda row: -getattr(row, kind))
    busy = sum(getattr(row, kind) for row in table)
    longest = {row.key[:80]: round(getattr(row, kind) / busy, 4) for row in table[:8]}
    return {"busy share with the profiler": busy / wall, "kernels": sum(row.count for row in table), "longest": longest}


def inference(what: Plan, end: float) -> None:
    """Rounds of all workloads, until the time is up."""
    known = limits(what.device)
    say(limits=known, peak=peak_flops(torch.device(what.device), "bf16"))
    formats = dict.fromkeys(what.config.tensor_shapes(), "BF16")
    weights = plan.bytes_read(what.config, formats)
    flops = what.config.matrix_flops() + what.config.causal_attention_flops(what.prompt)
    for name, batch, measures in workloads(what):
        rates: dict[str, list[float]] = {contender: [] for contender in measures}
        failed: dict[str, str] = {}
        for turn in range(what.rounds + 1):  # the first compiles and warms up
            for contender, measure in measures.items():
                if contender in failed or time.time() > end:
                    continue
                try:
                    rate = measure(batch)
                except Exception as error:  # a peer's failure is a result too
                    failed[contender] = f"{type(error).__name__}: {error}"[:300]
                    continue
                rates[contender] += [rate] if turn else []
                limit = known["copy bytes/s"] if name.startswith("decode") else known["product operations/s"]
                share = rate * (weights / batch if name.startswith("decode") else flops) / limit
                say(workload=name, contender=contender, turn=turn, rate=rate, share=share)
        medians = {contender: statistics.median(some) for contender, some in rates.items() if some}
        say(workload=name, medians=medians, failed=failed)


# Training


def training(what: Plan, end: float) -> None:
    """Turns of some steps of ours and of transformers', with the share of the peak that each reaches."""
    known = limits(what.device)
    peak, config = peak_flops(torch.device(what.device), "bf16"), what.training
    length, flops = config.context_length, flops_per_token(config, config.context_length)
    say(limits=known, peak=peak, parameters=config.parameters(), rows=what.rows, length=length)
    setting, rng = Setting("bf16", config, what.device), np.random.default_rng(0)
    takes: dict[str, Take] = {"llama2": ours(setting), "transformers": transformers(setting)}
    for turn in range(what.rounds + 1):
        for name, take in takes.items():
            if time.time() > end:
                return
            losses, steps = [], what.steps if turn else 2
            wait(what.device)
            start = time.perf_counter()
            for _ in range(steps):
                ids = rng.integers(0, config.vocab_size, (what.rows, length + 1))
                losses.append(take(ids[:, :-1].copy(), ids[:, 1:].copy()))
            wait(what.device)
            rate = steps * what.rows * length / (time.perf_counter() - start)
            peaks = torch.cuda.max_memory_allocated() / 2**30 if what.device == "cuda" else None
            shares = {"of peak": rate * flops / peak, "of product": rate * flops / known["product operations/s"]}
            say(training=name, turn=turn, rate=rate, share=shares, losses=losses, process_peak_gib=peaks)


# vLLM


def vllm(what: Plan, end: float) -> None:
    """The workloads in vLLM with weights that it draws itself. Says so where it is not installed."""
    if installed("vllm") is None:
        say(vllm="not installed")
        return
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        shape = transformers_config(what.config)
        shape.architectures, shape.dtype = ["LlamaForCausalLM"], "bfloat16"
        shape.save_pretrained(folder)
        model = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max(what.depth + what.generate, what.prompt) + 1,
            enable_prefix_caching=False,
        )
    rng = np.random.default_rng(0)

    def seconds(batch: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": rng.integers(3, what.config.vocab_size, prompt).tolist()} for _ in range(batch)]
        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - start

    for turn in range(what.rounds + 1):
        for batch in what.batches:
            if time.time() > end:
                return
            more = seconds(batch, what.depth, what.generate) - seconds(batch, what.depth, 1)
            say(workload=f"decode {batch}", contender="vllm", turn=turn, rate=batch * (what.generate - 1) / more)
        for batch in (1, 4):
            rate = batch * what.prompt / seconds(batch, what.prompt, 1)
            say(workload=f"prefill {batch} x {what.prompt}", contender="vllm", turn=turn, rate=rate)


# The parent


def run_part(name: str, seconds: float, dry: bool) -> dict[str, Any]:
    """A part in a process of its own: what it said, how it ended, and its last words where it failed."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds), *(["--dry-run"] if dry else [])]
    if name == "tests":
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-n", "0", "-rs"]
        command += [str(root / "tests/unit/test_gpu.py")]
    start, status = time.monotonic(), "done"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=root)
        try:
            if process.wait(seconds):
                status = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"stopped after {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        lines, words = out.read().splitlines(), errors.read()[-2000:]
    said = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    rest = [line for line in lines if not line.startswith("{")][-40:]
    result = {"status": status, "seconds": time.monotonic() - start, "figures": said}
    return result | ({"output": rest} if name == "tests" else {}) | ({"errors": words} if status != "done" else {})


def device() -> dict[str, Any]:
    """What the figures were measured on."""
    found = {name: installed(name) for name in ("torch", "transformers", "vllm", "triton")}
    if not torch.cuda.is_available():
        return {"gpu": None, **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **found,
    }


def table(record: dict[str, Any]) -> Iterator[str]:
    """The record's medians, a line each."""
    for name, part in record["parts"].items():
        yield f"{name}: {part['status']}, {part['seconds']:.0f} s"
        yield from (f"    {line}" for line in part.get("output", [])[-3:])
        trained: dict[str, list[float]] = {}
        for figure in part["figures"]:
            for contender, rate in figure.get("medians", {}).items():
                yield f"    {figure['workload']:20} {contender:32} {rate:12.1f} tokens/s"
            yield from (f"    {contender}: {why}" for contender, why in figure.get("failed", {}).items())
            if "training" in figure and figure["turn"]:
                trained.setdefault(figure["training"], []).append(figure["rate"])
        for contender, rates in trained.items():
            yield f"    {'training':20} {contender:32} {statistics.median(rates):12.1f} tokens/s"


def main() -> None:
    """Run the parts one after the other within the time, and write the record after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"), help="the record (default gpu.json)")
    parser.add_argument("--seconds", type=float, default=480, help="of all parts together (default 480)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (default all)")
    parser.add_argument("--rows", type=int, help="rows of a training batch (default 8)")
    parser.add_argument("--dry-run", action="store_true", help="every path on the CPU, with tiny shapes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    what = DRY if options.dry_run else WHOLE
    if options.rows:
        what = replace(what, rows=options.rows)
    if options.part:
        # A measurement that began in time may end: a fifth is left for that.
        {"inference": inference, "training": training, "vllm": vllm}[options.part](
            what, time.time() + 0.8 * options.seconds
        )
        return
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "no GPU that PyTorch can use; with one this would measure, in at most eight minutes: the tests marked gpu; "
            f"decode of {', '.join(map(str, what.batches))} answers and prefill of a model of "
            f"{what.config.parameters() / 1e9:.1f} billion parameters in bfloat16 beside transformers and vLLM; a step "
            f"of training of {what.training.parameters() / 1e9:.1f} billion beside transformers. "
            "--dry-run takes the same paths here"
        )
        return
    record: dict[str, Any] = {**provenance(), **device(), "dry run": options.dry_run, "parts": {}}
    end = time.monotonic() + options.seconds
    for name in options.parts:
        left = end - time.monotonic()
        if left < 20:
            record["parts"][name] = {"status": "no time was left", "seconds": 0.0, "figures": []}
            continue
        record["parts"][name] = run_part(name, min(left, PARTS[name]), options.dry_run)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(record)))
    bad = [name for name, part in record["parts"].items() if part["status"].startswith("exit code")]
    sys.exit(f"{', '.join(bad)} failed: {options.output} has the last words" if bad else 0)


if __name__ == "__main__":
    main()
