"""Plans against the paper's tables, spec 12.1, sizes of real files, PyTorch's book-keeping, and arithmetic by hand."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama2 import checkpoint, native, plan
from llama2.cli.main import run
from llama2.config import LLAMA_1_SIZES, SIZES, ModelConfig
from llama2.engine.engine import Engine
from llama2.errors import PlanError
from models import tiny_config, write_tiny_gguf

GIB = 1 << 30
A100 = plan.GPUS["A100-80GB"]
LLAMA_3_8B = ModelConfig(4096, 32, 32, 8, 14336, 128_256, 128, 8192)

# D 8, 2 layers, 4 heads and 2 key/value heads of 4, F 16, V 50, so H E = 16 and K E = 8.
# A layer: 16 * 8 (wq) + 2 * 8 * 8 (wk, wv) + 8 * 16 (wo) + 3 * 16 * 8 (w1, w2, w3) + 2 * 8 (norms) = 784.
SMALL = ModelConfig(8, 2, 4, 2, 16, 50, 4, 64)
LAYERS, TABLE = 2 * 784, 50 * 8
N = LAYERS + 2 * TABLE + 8  # 2,376


def total(config: ModelConfig, format: str) -> int:
    return sum(plan.weight_bytes(config, plan.tensor_formats(config, format)).values())


# Weights.


@pytest.mark.parametrize(
    ("size", "bf16", "gib"),  # GiB of F32, and of all tensors in Q8_0 and in Q4_0 (spec 12.1)
    [
        ("7B", 13_476_831_232, (25.103, 6.668, 3.530)),
        ("13B", 26_031_728_640, (48.488, 12.880, 6.819)),
        ("34B", 67_487_940_608, (125.706, 33.391, 17.677)),
        ("70B", 137_953_296_384, (256.958, 68.254, 36.135)),
    ],
)
def test_weights_of_one_format(size: str, bf16: int, gib: tuple[float, ...]) -> None:
    config = SIZES[size]
    assert total(config, "BF16") == total(config, "F16") == bf16
    for format, expected in zip(("F32", "Q8_0", "Q4_0"), gib, strict=True):
        uniform = dict.fromkeys(config.tensor_shapes(), format)
        assert sum(plan.weight_bytes(config, uniform).values()) / GIB == pytest.approx(expected, abs=5e-4)


#: What `llama-quantize --help` says of Llama-3-8B in GiB, some rounded and some cut.
LLAMA_QUANTIZE = {"Q4_0": 4.34, "Q4_1": 4.78, "Q5_0": 5.21, "Q5_1": 5.65, "Q8_0": 7.96}
LLAMA_QUANTIZE |= {"Q2_K": 2.96, "Q3_K_M": 3.74, "Q4_K_M": 4.58, "Q5_K_M": 5.33, "Q6_K": 6.14}
#: Bytes of files in TheBloke/Llama-2-7B-Chat-GGUF and TheBloke/Llama-2-13B-chat-GGUF.
FILES = {("7B", "Q4_K_M"): 4_081_004_224, ("7B", "Q8_0"): 7_161_089_728, ("13B", "Q4_K_M"): 7_865_956_224}


def test_mixed_formats_have_the_sizes_of_real_files() -> None:
    for format, gib in LLAMA_QUANTIZE.items():
        # The file has a header too, nearly 8 MiB of it the vocabulary.
        assert total(LLAMA_3_8B, format) / GIB + 0.0073 == pytest.approx(gib, abs=0.01), format
    headers = {file: size - total(SIZES[file[0]], file[1]) for file, size in FILES.items()}
    assert headers["7B", "Q4_K_M"] == headers["7B", "Q8_0"]  # the same vocabulary, the same names
    assert 72 * 50 < headers["13B", "Q4_K_M"] - headers["7B", "Q8_0"] < 72 * 70  # 72 more names of tensors


@pytest.mark.parametrize(("size", "rest"), [("70B", "Q5_K"), ("llama1-65B", "Q4_K")])
def test_values_that_queries_share_get_more_bits(size: str, rest: str) -> None:
    formats = plan.tensor_formats(plan.NAMED[size], "Q4_K_M")
    # Layers 0 to 9, 70 to 79, and of the others every third: 12, 15, ..., 69.
    critical = {*range(10), *range(70, 80), *range(12, 70, 3)}
    expected = ["Q6_K" if layer in critical else rest for layer in range(80)]
    assert [formats[f"layers.{layer}.attention.wv.weight"] for layer in range(80)] == expected


def test_formats_of_the_default_model_are_its_files_own(model_path: Path) -> None:
    with checkpoint.open(model_path) as model:  # 576 wide, so its head cannot be Q6_K
        assert plan.tensor_formats(model.config, "Q4_1") == {t.name: t.format for t in model.tensors.values()}


def test_narrow_rows_have_formats_of_smaller_blocks() -> None:
    """As llama-quantize chose for SmolLM2-135M: 576 wide, its w2 has rows of 1536."""
    config = tiny_config(dim=576, n_layers=8, hidden_dim=1536)
    chosen = plan.tensor_formats(config, "Q4_K_M")
    assert chosen["layers.1.attention.wq.weight"] == "Q5_0"
    assert chosen["layers.0.attention.wv.weight"] == "Q8_0"
    assert [chosen[f"layers.{i}.feed_forward.w2.weight"] for i in range(4)] == ["Q6_K", "Q4_K", "Q4_K", "Q6_K"]
    assert chosen["output.weight"] == "Q8_0"
    assert plan.tensor_formats(config, "Q5_K_M")["layers.1.attention.wq.weight"] == "Q5_1"
    assert plan.tensor_formats(config, "Q2_K")["layers.1.attention.wq.weight"] == "Q4_0"
    assert plan.tensor_formats(tiny_config(dim=80), "Q4_0")["layers.1.attention.wq.weight"] == "F16"


def test_rows_must_be_whole_blocks() -> None:
    config = tiny_config()
    with pytest.raises(PlanError, match=r"Q4_K needs rows of a multiple of 256 weights, and .* has 64; choose another"):
        plan.weight_bytes(config, dict.fromkeys(config.tensor_shapes(), "Q4_K"))


# Generation.


@pytest.mark.parametrize("tied", [True, False])
def test_what_bench_needs(tied: bool) -> None:
    config = replace(SMALL, tied_embeddings=tied)
    matrices = LAYERS - 2 * 2 * 8
    assert plan.prefill_flops(config, 10) == 2 * (10 * matrices + TABLE)
    formats = {name: "F16" if len(shape) == 2 else "F32" for name, shape in config.tensor_shapes().items()}
    assert plan.bytes_read(config, formats) == 2 * (matrices + TABLE) + 4 * 5 * 8  # either has a head


def test_generation_by_hand() -> None:
    machine = plan.Machine("by hand", 1e12, 100e9, watts=50, overhead=7)
    config = SIZES["7B"]
    planned = plan.generation(config, plan.tensor_formats(config, "BF16"), machine, context=4096, batch=2)
    assert planned.memory == {
        "weights": 13_476_831_232,
        "key/value cache": 2 * 2 * GIB,  # 2 GiB for 4,096 tokens (spec 12.1)
        "activations": 4 * 512 * (2 * 4096 + 2 * 4096 + 2 * 4096 + 2 * 11008),
        "logits": 4 * 2 * 32000,
        "overhead": 7,
    }
    # Spec 12.1: 13,214,154,752 for the matrices, 2 * 131,072,000 of it for the head, which 4,096 tokens need once;
    # attention 1,074,003,968 on average and 2,147,483,648 at the end.
    assert planned.prefill_flops == 13_214_154_752 - 262_144_000 + 64_000 + 1_074_003_968
    assert planned.decode_flops == 13_214_154_752 + 2_147_483_648
    assert planned.prefill_seconds == pytest.approx(2 * 4096 * planned.prefill_flops / 1e12)  # 115 s; reading takes 2 s
    # A step reads 2 bytes of each weight but the embeddings', and 4 GiB of keys and values: 17.5 GB.
    step = (13_476_831_232 - 2 * 131_072_000 + 4 * GIB) / 100e9
    assert planned.step_seconds == pytest.approx(step)
    assert planned.joules == pytest.approx(50 * step / 2)


def test_a_prefill_that_waits_for_memory() -> None:
    machine = plan.Machine("fast", 1e30, 1e3)
    planned = plan.generation(SMALL, plan.tensor_formats(SMALL, "F32"), machine, context=64, batch=9)
    assert planned.prefill_seconds == pytest.approx(2 * 4 * (N - TABLE) / 1e3)  # 576 tokens are two steps of 512


def test_devices_share_weights_and_whole_heads() -> None:
    formats = plan.tensor_formats(SIZES["70B"], "F16")
    one = plan.generation(SIZES["70B"], formats, A100, context=4096, batch=1)
    for devices, heads in ((3, 3), (8, 1), (16, 1)):
        planned = plan.generation(SIZES["70B"], formats, A100, context=4096, batch=1, devices=devices)
        assert planned.memory["weights"] == -(-137_953_296_384 // devices)
        assert planned.memory["key/value cache"] == one.memory["key/value cache"] * heads // 8 == 5 * GIB // 32 * heads
        assert planned.decode_flops == one.decode_flops


def test_energy_needs_the_machines_watts() -> None:
    machine = plan.Machine("?", 1e9, 1e9)
    assert plan.generation(SMALL, plan.tensor_formats(SMALL, "F32"), machine, context=1, batch=1).joules is None
    run = plan.training(SMALL, machine, plan.TrainingRun(context=64, tokens=1000))
    assert (run.megawatt_hours, run.tonnes, run.cost) == (None, None, None)


def test_a_step_is_the_engines() -> None:
    assert inspect.signature(Engine.__init__).parameters["max_batch_tokens"].default == plan.STEP


# Training.


def test_training_memory_by_hand() -> None:
    run = plan.TrainingRun(context=4096)
    parts = plan.training(SIZES["7B"], A100, run, gpus=8).memory
    assert parts == {
        "parameters": 6_738_415_616 * 4 // 8,
        "gradients": 6_738_415_616 * 4 // 8,
        "AdamW": 6_738_415_616 * 8 // 8,
        "gathered layers": 10 * (2 * 32000 * 4096 + 4096),  # more than a layer's 202,383,360
        # A layer's token: 2 * (4 * 4096 + 2 * 4096 + 2 * 4096 + 4 * 11008) + 4 * 32 = 153,728 bytes.
        "activations": 4096 * 32 * 153_728,
        "logits": 8 * 512 * 32000,
        "overhead": GIB,
    }
    again = plan.training(SIZES["7B"], A100, replace(run, recompute=True, sequences=2), gpus=8).memory
    assert again["activations"] == 2 * 4096 * (32 * 2 * 4096 + 153_728)
    # On one device nothing is gathered. A head keeps 2 bytes for each of 4096 / 2 keys that a token reads on average.
    one = plan.training(SIZES["7B"], A100, replace(run, products=True)).memory
    assert one["gathered layers"] == 2 * 6_738_415_616 + 10 * 32000 * 4096
    assert one["activations"] == 4096 * 32 * (153_728 + 32 * 4096)
    many = plan.training(SIZES["70B"], A100, run, gpus=2048).memory
    assert many["gathered layers"] == 10 * 855_654_400
    # 2^22 tokens over 2^11 GPUs are half a sequence each; 70B: 2 * (6 * 8192 + 2 * 1024 + 4 * 28672) + 4 * 64 bytes.
    assert many["activations"] == 2048 * 80 * 332_032


def test_an_adapter_by_hand() -> None:
    """Rank 8 on wq and wv of 7B: 2 × 8 × (4096 + 4096) in each of 32 layers; a frozen matrix has no gradient."""
    trained, frozen = 4_194_304, 13_476_831_232
    run = plan.TrainingRun(context=4096, tokens=10**6, trained=trained, frozen=frozen)
    planned = plan.training(SIZES["7B"], A100, run)
    memory = {name: planned.memory[name] for name in ("parameters", "gradients", "AdamW", "gathered layers")}
    assert memory == {
        "parameters": frozen + 4 * trained,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "gathered layers": 0,
    }
    assert planned.matrix_flops == (4 * 6_738_415_616 + 6 * trained) * 10**6


@pytest.mark.parametrize(("size", "gib"), [("7B", 100.4), ("13B", 194.0), ("34B", 502.8), ("70B", 1027.8)])
def test_training_keeps_16_bytes_a_parameter(size: str, gib: float) -> None:
    parts = plan.training(SIZES[size], A100, plan.TrainingRun(context=4096)).memory
    assert sum(parts[part] for part in ("parameters", "gradients", "AdamW")) / GIB == pytest.approx(gib, abs=0.05)


def test_activations_are_what_autograd_saves() -> None:
    """A layer in bfloat16 by PyTorch's own kernels; a norm's output is kept by the products that read it."""
    config = ModelConfig(64, 1, 4, 2, 128, 10, 16, 64)
    kept: dict[int, int] = {}
    shapes = {name: shape for name, shape in config.tensor_shapes().items() if len(shape) == 2}
    weights = {n.split(".")[-2]: torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for n, s in shapes.items()}
    parameters = {weight.data_ptr() for weight in weights.values()}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters and saved.dim() > 1:
            kept[storage.data_ptr()] = saved.numel() * saved.element_size()
        alive.append(saved)
        return saved

    class Norm(torch.autograd.Function):
        """RMSNorm that keeps its input alone, as a fused one does."""

        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            return F.rms_norm(x, x.shape[-1:])

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient

    norm: Callable[[Tensor], Tensor] = Norm.apply
    alive: list[Tensor] = []
    tokens = 32
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        x = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        y = norm(x)
        q, k, v = (F.linear(y, weights[n]).view(1, tokens, -1, 16).transpose(1, 2) for n in ("wq", "wk", "wv"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = x + F.linear(mixed.transpose(1, 2).reshape(1, tokens, -1), weights["wo"])
        y = norm(h)
        out = h + F.linear(F.silu(F.linear(y, weights["w1"])) * F.linear(y, weights["w3"]), weights["w2"])
    assert out.requires_grad
    assert sum(kept.values()) == tokens * plan.saved_bytes(config)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"mfu": 1.1}, "mfu=1.1 must be at most 1"),
        ({"mfu": 0}, "mfu=0 must be a positive number"),
        ({"tokens": -1}, "tokens=-1 must be a positive number"),
        ({"price": float("nan")}, "price=nan must be a positive number"),
        ({"pue": float("inf")}, "pue=inf must be a positive number, from 1e-30 to 1e30"),
        ({"context": 10**400}, "must be a positive number, from 1e-30 to 1e30"),
    ],
)
def test_runs_out_of_range(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan.TrainingRun(**{"context": 64} | wrong)


# The paper.


def test_the_papers_table_2() -> None:
    rows = plan.reproduce()
    hours = {"7B": 184_320, "13B": 368_640, "34B": 1_038_336, "70B": 1_720_320, "total": 3_311_616}
    tonnes = {"7B": 31.22, "13B": 62.44, "34B": 153.90, "70B": 291.42, "total": 539.00}
    assert {name: row.paper_gpu_hours for name, row in rows.items()} == hours
    assert {name: row.paper_tonnes for name, row in rows.items()} == tonnes
    # The formula alone: its hours give its tonnes, to a hundredth (spec 3.4).
    for row in rows.values():
        assert row.tonnes_of_paper_hours == pytest.approx(row.paper_tonnes, abs=0.01)
    # The share of 312 TFLOP/s that its hours mean without attention (spec 3.4).
    mfu = {name: round(100 * row.paper_mfu_6n, 1) for name, row in rows.items()}
    assert mfu == {"7B": 39.1, "13B": 37.7, "34B": 34.7, "70B": 42.8, "total": 39.5}
    # FLOPs over 312e12 * 0.41 * 3600. 7B: 6 * 6,738,415,616 * 2e12 + 3 * 1,074,003,968 * 2e12 = 8.7305e22.
    ours = {"7B": 189_582, "13B": 361_031, "34B": 921_278, "70B": 1_867_356, "total": 3_339_248}
    assert {name: round(row.gpu_hours) for name, row in rows.items()} == ours
    off = {name: round(100 * (row.gpu_hours / row.paper_gpu_hours - 1), 1) for name, row in rows.items()}
    assert off == {"7B": 2.9, "13B": -2.1, "34B": -11.3, "70B": 8.5, "total": 0.8}
    assert {name: round(row.tonnes, 1) for name, row in rows.items()} == {
        "7B": 32.1,  # 189,582 h * 400 W / 1e6 * 1.1 * 0.385
        "13B": 61.2,
        "34B": 136.6,  # 350 W
        "70B": 316.3,
        "total": 546.2,
    }


def test_where_the_default_mfu_is_from() -> None:
    assert round(plan.reproduce()["total"].paper_mfu, 2) == plan.MFU
    config = LLAMA_1_SIZES["65B"]
    flops = 6 * 65_285_660_672 + 3 * 4 * 80 * 8192 * 2049 / 2
    assert config.training_flops(1) + 3 * config.causal_attention_flops(2048) == flops
    assert round(380 * flops / 312e12, 2) == 0.49


def test_energy() -> None:
    # Spec 12.7: 184,320 h * 400 W / 1e6 = 73.728 MWh; * 1.1 * 0.385 = 31.22 t.
    assert plan.energy(184_320, 400) == pytest.approx((73.728, 31.2238), abs=1e-4)


# The command.


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        run(["plan", *words])
    out, err = capsys.readouterr()
    assert not done.value.code
    assert err == ""
    return out


GIVEN = ("--memory", "16", "--tflops", "1", "--bandwidth", "100")


def test_plan_of_generation(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "7b", "--format", "bf16", "--batch", "2", *GIVEN).splitlines() == [
        "7b: 6,738,415,616 parameters in BF16, 2 sequences of 4,096 tokens on this machine "
        "(16 GB, 1 T operations/s, 100 GB/s)",
        "memory         13.48 GB  weights",
        "                4.29 GB  key/value cache",
        "               95.42 MB  activations",
        "                0.26 MB  logits",
        "               67.11 MB  overhead",
        "               17.93 GB  in all: does not fit, 1.93 GB too much",
        "FLOPs           14.03 G  for a token of prefill: 2 a weight, and attention",
        "                15.36 G  for the context's last token",
        "at best        114.90 s  prefill of 8,192 tokens, 71.3 tokens/s",
        "                 175 ms  decode of 2 tokens at the context's end, 11.4 tokens/s",
    ]
    facts = json.loads(said(capsys, "7B", "--format", "BF16", "--batch", "2", "--watts", "50", "--json", *GIVEN))
    assert facts["memory_bytes"]["key/value cache"] == 4 * GIB
    assert facts["total_memory_bytes"] == sum(facts["memory_bytes"].values())
    assert (facts["parameters"], facts["fits"], facts["machine"]["memory"]) == (6_738_415_616, False, 16e9)
    assert facts["decode_flops_per_token"] == 15_361_638_400
    assert facts["decode_joules_per_token"] == pytest.approx(50 * facts["decode_step_seconds"] / 2)


def test_plan_on_named_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "70B", "--on", "h100", "--gpus", "2", "--context", "100").splitlines()
    assert lines[0].endswith("1 sequence of 100 tokens on 2 × H100 (80 GB, 989.4 T operations/s, 3,350 GB/s)")
    assert lines[1].split(maxsplit=1) == ["memory", "68.98 GB  weights"]
    assert "on each: fits, " in "".join(lines)
    assert lines[-1].startswith("energy")


def test_plan_measures_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"int8_gemm_rate": 8e11, "fma_rate": 2e11, "read_bandwidth": 3e10}
    module = SimpleNamespace(**{name: (lambda threads, seconds, x=x: x) for name, x in rates.items()})
    monkeypatch.setattr(native, "module", lambda: module)
    for format, operations in (("Q8_0", 8e11), ("F16", 2e11)):
        machine = json.loads(said(capsys, "7B", "--format", format, "--json"))["machine"]
        assert (machine["operations"], machine["bandwidth"]) == (operations, 3e10)
        assert machine["memory"] > 1 << 28
    machine = json.loads(said(capsys, "7B", "--bandwidth", "5", "--json"))["machine"]
    assert machine["bandwidth"] == 5e9
    monkeypatch.setattr("llama2.cli.commands.plan.total_memory", lambda: None)  # a system that does not say
    assert "15.79 GB  in all; give --memory to know whether that fits\n" in said(capsys, "7B")
    assert json.loads(said(capsys, "7B", "--json"))["fits"] is None


def test_plan_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, format="Q8_0")
    data = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    facts = json.loads(said(capsys, str(path), "--json", *GIVEN))
    assert (facts["format"], facts["context"], facts["memory_bytes"]["weights"]) == ("its own formats", 256, data)
    facts = json.loads(said(capsys, str(path), "--format", "F32", "--json", *GIVEN))
    assert facts["memory_bytes"]["weights"] == 4 * facts["parameters"]


def test_plan_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "70B", "--train", "--gpus", "2048", "--price", "2").splitlines()
    assert lines[0].startswith("70B: 2e+12 tokens in 476,838 steps of 4,194,304, sequences of 4,096, on 2,048 × A100")
    assert lines[-5:] == [
        "FLOPs         8.599e+23  6 × 68,976,648,192 × 2e+12 tokens + 3 × 5,370,019,840 of attention × tokens",
        "time        1,867,356 h  of a GPU, 38.0 days, at an MFU of 41.0%",
        "cost          3,734,712  at 2 for a GPU and hour",
        "energy       746.94 MWh  of the GPUs at 400 W; × 1.1 in their data centre",
        "carbon         316.33 t  of CO₂ equivalent, at 0.385 kg a kWh",
    ]
    options = {"tokens": 1e12, "batch-tokens": 2e6, "sequences": 3, "mfu": 0.5, "pue": 1.2, "intensity": 0.1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    on = ("--on", "H100", "--watts", "600", "--context", "2048")
    facts = json.loads(said(capsys, "13B", "--train", "--recompute", *words, *on, "--json"))
    given = {name.replace("-", "_"): value for name, value in options.items()}
    assert {name: facts[name] for name in given} == given
    assert (facts["recompute"], facts["context"], facts["steps"]) == (True, 2048, 500_000)
    # 13B: 40 layers' inputs and 2 * (8 * 5120 + 4 * 13824) + 4 * 40 bytes of one, 3 sequences
    assert facts["memory_bytes"]["activations"] == 3 * 2048 * (40 * 2 * 5120 + 192_672)
    flops = 6 * 13_015_864_320 * 10**12 + 3 * 10**12 * 2 * 40 * 5120 * 2049
    assert facts["gpu_hours"] == pytest.approx(flops / (989.4e12 * 0.5) / 3600)
    assert facts["tonnes"] == pytest.approx(facts["gpu_hours"] * 600 / 1e6 * 1.2 * 0.1)


def test_plan_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in said(capsys, "--paper").splitlines()]
    assert ["7B", "184,320", "189,582", "+2.86%", "31.22", "31.22", "+0.01%", "32.12", "+2.87%"] in lines
    assert ["34B", "1,038,336", "921,278", "-11.27%", "153.90", "153.91", "+0.00%", "136.56", "-11.27%"] in lines
    assert ["total", "3,311,616", "3,339,248", "+0.83%", "539.00", "539.00", "+0.00%", "546.16", "+1.33%"] in lines
    assert ["70B", "44.5%", "42.8%"] in lines
    facts = json.loads(said(capsys, "--paper", "--mfu", "0.205", "--json"))
    assert facts["rows"]["7B"]["gpu_hours"] == pytest.approx(2 * 189_582.489, abs=1e-2)
    assert facts["rows"]["7B"]["paper_mfu_6n"] == pytest.approx(0.391, abs=5e-4)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ([], 2, "name a size or a model, or give --paper"),
        (["8B"], 1, "8B: no such model.*or a size: 7B, 13B, 34B, 70B, llama1-7B"),
        (["org/name:Q4_0"], 1, "not here; `llama2 pull org/name:Q4_0` fetches it"),
        (["7B", "--format", "Q4_9"], 2, "--format Q4_9 is not one of F32, "),
        (["7B", "--on", "abacus"], 2, "--on abacus is neither here nor one of A100-40GB, .*--memory"),
        (["7B", "--memory", "nan"], 1, "memory=nan must be a positive number"),
        (["7B", "--context", "4097", *GIVEN], 1, "context=4097 must be from 1 to 4096, the model's own"),
        (["7B", "--batch", "9" * 400, *GIVEN], 1, "batch=9+ must be a positive number"),
        (["7B", "--batch", "0"], 2, "--batch"),
        (["7B", "--mfu", "0.4", "--recompute"], 2, "--recompute, --mfu does not apply to generation; --train"),
        (["7B", "--train", "--format", "F16"], 2, "--format does not apply to --train"),
        (["7B", "--train", "--mfu", "2"], 1, "mfu=2.0 must be at most 1"),
        (["7B", "--train", "--tokens", "inf"], 2, "--tokens inf must be from 1 to 1e30"),
        (["7B", "--paper"], 2, "MODEL does not apply to --paper"),
        (["--paper", "--gpus", "2"], 2, "--gpus does not apply to --paper"),
        (["--paper", "--price", "2"], 2, "--price does not apply to --paper"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], status: int, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(["plan", *words])
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (status, "")
    assert re.fullmatch(rf"llama2: error: .*{reason}.*\n", err), err
