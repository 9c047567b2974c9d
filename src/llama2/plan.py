"""What a model needs of a machine, before anything runs: memory, FLOPs, time, cost, energy, carbon. Pure arithmetic.

D width  H query heads  K key/value heads  E head size  F hidden width  V vocabulary  L layers  N parameters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod

from llama2.config import LLAMA_1_SIZES, SIZES, ModelConfig
from llama2.errors import PlanError
from llama2.formats import FLOATS, nbytes
from llama2.formats import FORMATS as NUMBER_FORMATS

#: Every size that has a name.
NAMED: dict[str, ModelConfig] = SIZES | {f"llama1-{name}": config for name, config in LLAMA_1_SIZES.items()}

#: What replaces a format of 256 weights a block where rows are not multiples of that.
_SMALLER_BLOCKS = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}

#: Formats of files, and the number format that most of a file's matrices have.
FORMATS = {name: name for name in NUMBER_FORMATS if name not in ("IQ4_NL", "Q5_K", "Q4_K", "Q3_K")} | {
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q3_K_M": "Q3_K",
}


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 1e-30 <= value <= 1e30:
            raise PlanError(f"{name}={value} must be a positive number, from 1e-30 to 1e30")


@dataclass(frozen=True, slots=True)
class Machine:
    """A device; None is not known, and neither is what follows from it. Raises PlanError for a value out of range."""

    name: str
    operations: float  # multiplications and additions a second in products of matrices, without sparsity
    bandwidth: float  # bytes a second from its memory
    memory: float | None = None  # bytes
    watts: float | None = None  # at full power
    overhead: int = 1 << 30  # bytes of the program itself; on a GPU an allowance for context, kernels and allocator

    def __post_init__(self) -> None:
        _positive(operations=self.operations, bandwidth=self.bandwidth, memory=self.memory, watts=self.watts)


#: A process of ours on the CPU: Python, NumPy, the vocabulary. It is what docs/results/2026-11-24-two-cores.md saw
#: (167 MiB at the peak of SmolLM2-135M) beyond weights, cache and activations, rounded up.
PROCESS = 64 << 20

#: The same of a process that trains: PyTorch and its compiler besides. Measured by bench/train_step.py.
TRAINER = 500 << 20

#: GPUs by name: dense BF16 operations, memory bandwidth, memory and design power, as their makers state them.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Machine("A100-40GB", 312e12, 1555e9, 40e9, 400),  # NVIDIA A100 data sheet, SXM
        Machine("A100-80GB", 312e12, 2039e9, 80e9, 400),  # the same; the paper's
        Machine("H100", 989.4e12, 3350e9, 80e9, 700),  # NVIDIA H100 data sheet, SXM; Hopper white paper
        Machine("H200", 989.4e12, 4800e9, 141e9, 700),  # NVIDIA H200 data sheet, SXM
        Machine("B200", 2250e12, 8000e9, 180e9, 1000),  # NVIDIA DGX B200 data sheet, one of eight
        Machine("L40S", 362e12, 864e9, 48e9, 350),  # NVIDIA L40S data sheet
        Machine("RTX-4090", 165.2e12, 1008e9, 24e9, 450),  # NVIDIA Ada GPU architecture white paper
        Machine("MI300X", 1307.4e12, 5300e9, 192e9, 750),  # AMD Instinct MI300X data sheet
    )
}

#: Share of a GPU's operations that training puts to use, attention counted. Llama 2's four sizes took 1.54e24 FLOPs in
#: 3,311,616 hours of 312 TFLOP/s, 41 % (paper table 2): all reported hours, whatever happened in them.
#: While it ran, Llama 1's 65B reached 49 % (380 tokens a second and GPU, Touvron et al. 2023a, 2.4).
MFU = 0.41

#: Energy of a data centre over energy of its GPUs, and kg of CO₂ equivalent a kWh: Llama 1's method (Touvron et al.
#: 2023a, 6), which gives every row of the paper's table 2 too.
PUE = 1.1
INTENSITY = 0.385

#: Tokens of the paper's pretraining, and of its batch "4M": 1,024 sequences (paper 2.2; spec 3.2).
TOKENS = 2 * 10**12
BATCH_TOKENS = 1 << 22

#: Tokens whose logits training holds at once.
CHUNK = 512

#: Tokens of all sequences that one step of the engine runs at most (engine/scheduler.py).
STEP = 512


def tensor_formats(config: ModelConfig, format: str) -> dict[str, str]:
    """The number format of each tensor, by name, in a file of `format`, one of FORMATS.

    F32, F16 and BF16 are all tensors'. Otherwise norms are F32, and matrices as llama.cpp's llama-quantize chooses. The
    output head is Q6_K or Q8_0; Q2_K and the `_M` formats spend more bits where they matter most. A matrix whose
    rows are not whole blocks of its format has a format of more bits that fits.
    """
    base = FORMATS[format]
    shapes = config.tensor_shapes()
    if base in FLOATS:
        return dict.fromkeys(shapes, base)
    chosen = {name: "F32" if len(shape) == 1 else base for name, shape in shapes.items()}
    for layer in range(config.n_layers):
        for matrix in ("attention.wv", "attention.wo", "feed_forward.w2"):
            chosen[f"layers.{layer}.{matrix}.weight"] = _mixed(config, format, matrix, layer)
    chosen[_head(config)] = "Q8_0" if base == "Q8_0" else "Q6_K"
    return {name: _fitting(chosen[name], shape[-1]) for name, shape in shapes.items()}


def _fitting(format: str, columns: int) -> str:
    """`format`, or what llama-quantize takes instead where rows of `columns` weights are not whole blocks of it."""
    for choice in (format, _SMALLER_BLOCKS.get(format, format)):
        if columns % NUMBER_FORMATS[choice].block == 0:
            return choice
    return "F16"


def _mixed(config: ModelConfig, format: str, matrix: str, layer: int) -> str:
    layers, shared = config.n_layers, config.n_heads // config.n_kv_heads
    critical = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    chosen = FORMATS[format]
    if format in ("Q4_K_M", "Q5_K_M") and matrix != "attention.wo" and critical:
        chosen = "Q6_K"
    elif format == "Q3_K_M":
        early = {"attention.wv": 2, "attention.wo": 0, "feed_forward.w2": layers // 16}
        chosen = "Q5_K" if layer < early[matrix] else "Q4_K"
    elif format == "Q2_K":
        chosen = "Q4_K" if matrix == "attention.wv" and shared >= 4 else "Q3_K"
    small = matrix == "attention.wv" and layers == 80 and shared > 1  # 70B's values are an eighth of its queries
    return "Q5_K" if small and chosen in ("Q3_K", "Q4_K") else chosen


def weight_bytes(config: ModelConfig, formats: Mapping[str, str]) -> dict[str, int]:
    """Bytes of each tensor. Raises PlanError when its rows are not whole blocks of its format."""
    shapes = config.tensor_shapes()
    return {name: nbytes(formats[name], shape, name, error=PlanError) for name, shape in shapes.items()}


def _head(config: ModelConfig) -> str:
    return "tok_embeddings.weight" if config.tied_embeddings else "output.weight"


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What writing `batch` answers at once takes, all of them at the end of their context."""

    memory: dict[str, int]  # bytes on each device, by part
    prefill_flops: int  # for a token, on average over a prompt that fills the context
    decode_flops: int  # for a token, the last of the context
    prefill_seconds: float  # for all prompts, at the machine's limits
    step_seconds: float  # for a token of each answer, at the machine's limits
    joules: float | None  # for a token of one answer, at full power


def generation(
    config: ModelConfig, formats: Mapping[str, str], machine: Machine, *, context: int, batch: int, devices: int = 1
) -> GenerationPlan:
    """Plan the engine's work with weights in `formats`; several devices share every matrix (tensor parallel).

    memory: weights in their formats; keys and values in 16 bits; activations of a step's tokens and the logits in
    float32. Activations are the residual, its norm, queries, keys, values, attention's output, both halves of the
    feed-forward.
    FLOPs: 2 a weight, 4 L H E for each key that a token attends to. A prompt needs the output head once.
    seconds: the longer of FLOPs / operations and bytes / bandwidth. Nothing else is taken to need time, nor do devices
    send each other anything. A step reads the weights but the embeddings, and in decoding all keys and values.
    Raises PlanError for a value out of range.
    """
    _positive(batch=batch, devices=devices)
    if not 1 <= context <= config.context_length:
        raise PlanError(f"context={context} must be from 1 to {config.context_length}, the model's own")
    weights = weight_bytes(config, formats)
    held, read = -(-sum(weights.values()) // devices), -(-bytes_read(config, formats) // devices)
    heads = -(-config.n_kv_heads // devices)  # of keys and values on a device, each whole
    cache = config.cache_bytes(context * batch) // config.n_kv_heads * heads
    memory = {
        "weights": held,
        "key/value cache": cache,
        "activations": 4 * min(batch * context, STEP) * _live(config),
        "logits": 4 * batch * config.vocab_size,
        "overhead": machine.overhead,
    }
    prefill = prefill_flops(config, context) + context * config.causal_attention_flops(context)
    decode = config.matrix_flops() + config.attention_flops(context)
    prefill_seconds = _seconds(machine, batch * prefill / devices, -(-batch * context // STEP) * read)
    step_seconds = _seconds(machine, batch * decode / devices, read + cache)
    joules = None if machine.watts is None else machine.watts * devices * step_seconds / batch
    return GenerationPlan(
        memory=memory,
        prefill_flops=prefill // context,
        decode_flops=decode,
        prefill_seconds=prefill_seconds,
        step_seconds=step_seconds,
        joules=joules,
    )


def prefill_flops(config: ModelConfig, prompt: int) -> int:
    """FLOPs of the matrices in a prefill of `prompt` tokens, of which the last alone needs the output head."""
    head = 2 * config.vocab_size * config.dim
    return prompt * (config.matrix_flops() - head) + head


def bytes_read(config: ModelConfig, formats: Mapping[str, str]) -> int:
    """Bytes of weights that a step of decoding needs: all but the embeddings, of which it needs a row or a few."""
    weights = weight_bytes(config, formats)
    return sum(weights.values()) - (0 if config.tied_embeddings else weights["tok_embeddings.weight"])


def _live(config: ModelConfig) -> int:
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return 2 * config.dim + 2 * heads + 2 * kv + 2 * config.hidden_dim


def _seconds(machine: Machine, flops: float, nbytes: float) -> float:
    return max(flops / machine.operations, nbytes / machine.bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A training run but for its model and machine. Raises PlanError for a value out of range."""

    context: int  # tokens of a sequence
    tokens: int = TOKENS
    batch_tokens: int = BATCH_TOKENS  # of a step on all GPUs
    sequences: int = 1  # at once on a GPU, which takes only its share of the batch if that is less
    recompute: bool = False  # keep the layers' inputs alone, and compute the rest again (activation checkpointing)
    products: bool = False  # attention keeps its weights, as it does in steps that are compiled for a CPU
    trained: int | None = None  # parameters beside a frozen network, which has no gradients; None: all
    frozen: int = 0  # bytes of that network's weights
    mfu: float = MFU
    price: float | None = None  # of a GPU for an hour
    pue: float = PUE
    intensity: float = INTENSITY  # kg of CO₂ equivalent a kWh

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.type != "bool"}
        _positive(**given | {"frozen": self.frozen or None})
        if self.mfu > 1:
            raise PlanError(f"mfu={self.mfu} must be at most 1, all that a GPU can do")


@dataclass(frozen=True, slots=True)
class Training:
    """What a training run takes."""

    memory: dict[str, int]  # bytes on each GPU, by part
    steps: int
    matrix_flops: int  # of the whole run
    attention_flops: int
    gpu_hours: float
    days: float
    megawatt_hours: float | None  # of the GPUs at full power
    tonnes: float | None  # of CO₂ equivalent
    cost: float | None


def training(config: ModelConfig, gpu: Machine, run: TrainingRun, *, gpus: int = 1) -> Training:
    """Plan AdamW in mixed precision, with all that lasts sharded over `gpus` (FSDP2).

    memory: 16 bytes a parameter over all GPUs, for float32 parameters, gradients, AdamW's mean and variance.
    Gathered are the bfloat16 parameters of the layer at work and of the next, and a layer's gradients in bfloat16 and
    float32. One device has instead a bfloat16 copy of all parameters, and the head's gradient in both beside the
    embeddings'. Activations are `saved_bytes`. Logits of CHUNK tokens and their gradients are in float32.
    FLOPs: 6 N a token, and 3 times the causal attention of a forward pass. A frozen network is taken to be whole on
    each GPU, and has 4 N. hours = FLOPs / (operations * MFU).
    Raises PlanError when `gpus` is out of range.
    """
    _positive(gpus=gpus)
    matrix = config.training_flops(run.tokens)
    if run.trained is not None:
        matrix = matrix * 2 // 3 + 6 * run.trained * run.tokens
    attention = 3 * run.tokens * config.causal_attention_flops(run.context)
    hours = (matrix + attention) / (gpu.operations * run.mfu) / 3600
    spent, emitted = (None, None) if gpu.watts is None else energy(hours, gpu.watts, run.pue, run.intensity)
    return Training(
        memory=_training_memory(config, gpu, run, gpus),
        steps=-(-run.tokens // run.batch_tokens),
        matrix_flops=matrix,
        attention_flops=attention,
        gpu_hours=hours,
        days=hours / gpus / 24,
        megawatt_hours=spent,
        tonnes=emitted,
        cost=None if run.price is None else hours * run.price,
    )


def _training_memory(config: ModelConfig, gpu: Machine, run: TrainingRun, gpus: int) -> dict[str, int]:
    tokens = min(run.sequences * run.context, -(-run.batch_tokens // gpus))
    share = -(-(config.parameters() if run.trained is None else run.trained) // gpus)
    ends = config.parameters() - config.n_layers * _layer(config)  # embeddings, last norm, head: gathered together
    head = config.vocab_size * config.dim
    gathered = 10 * max(_layer(config), ends) if gpus > 1 else 2 * config.parameters() + 10 * head
    if run.trained is not None:
        gathered = 0  # what is frozen is held as products read it
    layer = saved_bytes(config) + (config.n_heads * run.context if run.products else 0)  # half of T weights of 2 bytes
    layers = config.n_layers * 2 * config.dim + layer if run.recompute else config.n_layers * layer
    return {
        "parameters": 4 * share + run.frozen,
        "gradients": 4 * share,
        "AdamW": 8 * share,
        "gathered layers": gathered,
        "activations": tokens * layers,
        "logits": 8 * min(tokens, CHUNK) * config.vocab_size,
        "overhead": gpu.overhead,
    }


def _layer(config: ModelConfig) -> int:
    return sum(prod(shape) for name, shape in config.tensor_shapes().items() if name.startswith("layers.0."))


def saved_bytes(config: ModelConfig) -> int:
    """Bytes that a layer keeps for each token until its backward pass, in bfloat16 with fused norms and attention.

    Both norms' inputs and outputs are 4 D, queries and attention's output 2 H E, keys and values 2 K E. Gate, its SiLU,
    up, and their product are 4 F. Each head has a float32 logarithm of a sum.
    """
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return 2 * (4 * config.dim + 2 * heads + 2 * kv + 4 * config.hidden_dim) + 4 * config.n_heads


def energy(gpu_hours: float, watts: float, pue: float = PUE, intensity: float = INTENSITY) -> tuple[float, float]:
    """MWh of the GPUs at full power, and tonnes of CO₂ equivalent of them and their data centre (paper 2.2.1)."""
    megawatt_hours = gpu_hours * watts / 1e6
    return megawatt_hours, megawatt_hours * pue * intensity


#: The paper's table 2: GPU-hours on A100-80GB, watts of a GPU (one of its two clusters is capped at 350), tonnes of CO₂
#: equivalent.
TABLE_2 = {
    "7B": (184_320, 400, 31.22),
    "13B": (368_640, 400, 62.44),
    "34B": (1_038_336, 350, 153.90),
    "70B": (1_720_320, 400, 291.42),
}
#: Its last row as printed; the tonnes above it add up to 538.98.
TABLE_2_TOTAL = (3_311_616, 539.00)


@dataclass(frozen=True, slots=True)
class Reproduced:
    """A row of the paper's table 2, and ours."""

    paper_gpu_hours: int
    gpu_hours: float  # from FLOPs, the GPU's operations and one MFU for all sizes
    paper_tonnes: float
    tonnes_of_paper_hours: float  # our formula, the paper's hours
    tonnes: float  # our formula, our hours
    paper_mfu: float  # what the paper's hours mean
    paper_mfu_6n: float  # the same without attention


def reproduce(mfu: float = MFU) -> dict[str, Reproduced]:
    """The paper's table 2 and ours, by size, and "total". Raises PlanError when `mfu` is out of range."""
    runs = {
        name: training(SIZES[name], GPUS["A100-80GB"], TrainingRun(context=SIZES[name].context_length, mfu=mfu))
        for name in TABLE_2
    }
    rows = {}
    for name, (hours, watts, tonnes) in TABLE_2.items():
        emitted = [energy(h, watts)[1] for h in (hours, runs[name].gpu_hours)]
        rows[name] = _reproduced(mfu, [runs[name]], hours, tonnes, *emitted)
    emitted = [sum(getattr(row, kind) for row in rows.values()) for kind in ("tonnes_of_paper_hours", "tonnes")]
    return rows | {"total": _reproduced(mfu, list(runs.values()), *TABLE_2_TOTAL, *emitted)}


def _reproduced(
    mfu: float, runs: list[Training], hours: int, tonnes: float, tonnes_of_hours: float, ours: float
) -> Reproduced:
    gpu_hours = sum(run.gpu_hours for run in runs)
    matrices, attention = (sum(getattr(run, kind) for run in runs) for kind in ("matrix_flops", "attention_flops"))
    used = mfu * gpu_hours / hours
    return Reproduced(
        paper_gpu_hours=hours,
        gpu_hours=gpu_hours,
        paper_tonnes=tonnes,
        tonnes_of_paper_hours=tonnes_of_hours,
        tonnes=ours,
        paper_mfu=used,
        paper_mfu_6n=used * matrices / (matrices + attention),
    )
