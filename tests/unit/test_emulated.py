"""The kernels and the model as a program without Python (native/driver.cpp), for this machine and for Arm under qemu.

The tests of test_native.py and test_runner_native.py run on it once more, and what Python cannot reach runs here alone.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray
from test_native import (  # noqa: F401  (collected here again, with the fixture `kernels` below)
    test_a_result_depends_on_its_token_and_its_row_alone,
    test_dequantize_equals_numpy_bit_for_bit,
    test_every_half,
    test_extremes_do_not_saturate,
    test_float_weights_of_any_width,
    test_groups_of_zeros_and_nearly_zeros_add_nothing,
    test_pack_fills_exactly_its_bytes,
    test_product_is_exact_where_floats_can_be,
    test_product_within_the_error_of_8_bit_activations,
    test_random_numbers_are_philox_s_at_the_ends_of_64_bits,
    test_what_is_not_a_number_is_never_hidden,
)
from test_runner_native import (  # noqa: F401  (likewise, with `start`)
    reference,
    test_a_freed_block_leaks_nothing,
    test_logits_against_numpy,
    test_long_contexts,
)

import oracle_sampling
from llama2.checkpoint import Checkpoint
from llama2.engine.request import Sampling
from llama2.engine.runner import Batch

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

TESTS = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-ffp-contract=off", "-pthread", f"-I{TESTS.parent / 'src/llama2/native'}"]
#: How the program is compiled, and what runs it.
BUILDS = {
    "plain": (["c++", "-O1"], []),
    "neon_dotprod": (
        ["aarch64-linux-gnu-g++", "-O1", "-static", "-march=armv8.2-a+dotprod", "-DLLAMA2_ISA_NEON_DOTPROD"],
        ["qemu-aarch64-static", "-cpu", "max"],
    ),
}
LANES = 4  # of both


class Driver:
    """A running driver; its methods are those of the native extension that the tests call."""

    lanes = LANES

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        self._process.communicate()

    def send(self, request: str, *arrays: NDArray[Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"".join([f"{request}\n".encode(), *(array.tobytes() for array in arrays)]))
        self._process.stdin.flush()

    def ask(self, dtype: DTypeLike, count: int, request: str, *arrays: NDArray[Any]) -> NDArray[Any]:
        """The `count` numbers that `request` is answered with."""
        self.send(request, *arrays)
        assert self._process.stdout
        answer = self._process.stdout.read(count * np.dtype(dtype).itemsize)
        return np.frombuffer(answer, dtype, count)

    def product(self, format: str, data: Bytes, rows: int, columns: int, x: Floats, y: Floats) -> None:
        y[:] = self.ask(np.float32, y.size, f"product {format} {rows} {columns} {len(x)}", data, x).reshape(y.shape)

    def dequantize(self, format: str, data: Bytes, rows: int, columns: int, out: Floats) -> None:
        out[:] = self.ask(np.float32, out.size, f"dequantize {format} {rows} {columns}", data).reshape(out.shape)

    def packed_bytes(self, format: str, rows: int, columns: int) -> int:
        return int(self.ask(np.int64, 1, f"packed_bytes {format} {rows} {columns}")[0])

    def pack(self, format: str, data: Bytes, rows: int, columns: int, out: Bytes) -> None:
        out[:] = self.ask(np.uint8, out.size, f"pack {format} {rows} {columns}", data)

    def uniform(self, seed: int, choice: int, position: int) -> float:
        return float(self.ask(np.float64, 1, f"uniform {seed} {choice} {position}")[0])


class DriverRunner:
    """NativeRunner without Python: the model of a driver."""

    arithmetic = "native, of the driver"

    def __init__(self, driver: Driver, checkpoint: Checkpoint, n_blocks: int, threads: int) -> None:
        c = self.config = checkpoint.config
        self.n_blocks, self._driver = n_blocks, driver
        sizes = (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, c.vocab_size, c.head_dim, c.context_length)
        request = ["model", *sizes, int(c.tied_embeddings), float(np.float32(c.norm_eps)), threads, n_blocks]
        request += [c.attention_factor(), *(c.dynamic_growth() or (1.0, 0)), c.sliding_window or c.context_length]
        driver.send(" ".join(map(str, request)), np.array(c.inverse_frequencies()))
        for tensor in checkpoint.tensors.values():
            shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
            tied = c.tied_embeddings and tensor.name == "tok_embeddings.weight"
            name = "output.weight" if tied else tensor.name
            driver.send(f"tensor {name} {tensor.format} {shape[0]} {shape[1]}", tensor.data)

    def forward(self, batch: Batch) -> Floats:
        arrays = (batch.tokens, batch.positions, batch.sequences, batch.blocks, batch.outputs)
        shape = (len(batch.outputs), self.config.vocab_size)
        sizes = f"{len(batch.tokens)} {batch.blocks.shape[0]} {batch.blocks.shape[1]} {shape[0]}"
        return self._driver.ask(np.float32, shape[0] * shape[1], f"step {sizes}", *arrays).reshape(shape)


@pytest.fixture(scope="module", params=BUILDS)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to start a driver, which is compiled first."""
    compiler, runner = BUILDS[request.param]
    for tool in (compiler[0], *runner[:1]):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    program = tmp_path_factory.mktemp(request.param) / "driver"
    subprocess.run([*compiler, *FLAGS, "-o", program, TESTS / "native/driver.cpp"], check=True)
    return [*runner, str(program)]


@pytest.fixture(scope="module")
def kernels(command: list[str]) -> Iterator[Driver]:
    driver = Driver(command)
    yield driver
    driver.close()


@pytest.fixture
def isa() -> str:
    """None that attends in bfloat16."""
    return ""


@pytest.fixture
def several_threads() -> tuple[int, ...]:
    """The one that a runner here has."""
    return (1,)


@pytest.fixture
def start(command: list[str]) -> Iterator[Callable[..., DriverRunner]]:
    """Starts a runner of a model in a driver of its own, on one thread: emulated ones only wait for each other."""
    drivers = []

    def make(checkpoint: Checkpoint, n_blocks: int, *, threads: int) -> DriverRunner:
        drivers.append(Driver(command))
        return DriverRunner(drivers[-1], checkpoint, n_blocks, min(threads, 1))

    yield make
    for driver in drivers:
        driver.close()


def test_floats_become_halves_as_in_numpy(kernels: Driver) -> None:
    """Every half, the points in the middle between two, and their neighbours; subnormals, overflow, and any bits."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 2**16  # where infinity stands among the halves
    middles = (halves[:-1] + halves[1:]) / 2  # ties: to even, and to infinity from 65520 on
    x = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(np.inf))])
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, -x, random, np.array([np.inf, -np.inf, np.nan, 1e-45], np.float32)])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected = x.astype(np.float16)
    found = kernels.ask(np.float16, len(x), f"halves {len(x)}", x)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(found.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(found[~numbers]).all()


def test_exp_and_silu(kernels: Driver) -> None:
    x = np.linspace(-87.3, 88.7, 40_000, dtype=np.float32)
    found = kernels.ask(np.float32, len(x), f"exp {len(x)}", x)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=2e-7)
    ends = np.array([-np.inf, -1e30, -104, -88, 0, 89, 1e30, np.inf, np.nan, -np.nan, 0, 1], np.float32)
    found = kernels.ask(np.float32, len(ends), f"exp {len(ends)}", ends)
    expected = [0, 0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan, np.nan, 1, np.e]
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    found = kernels.ask(np.float32, len(x), f"silu {len(x)}", x)
    np.testing.assert_allclose(found, x / (1 + np.exp(-x.astype(np.float64))), rtol=1e-6, atol=1e-36)
    ends = np.array([-3e38, -1e30, -200, -89, 0, 89, 3e38, np.inf, np.nan, -np.nan, -0.0, 1], np.float32)
    found = kernels.ask(np.float32, len(ends), f"silu {len(ends)}", ends)
    expected = [0, 0, 0, 0, 0, 89, 3e38, np.inf, np.nan, np.nan, 0, 1 / (1 + np.exp(-1))]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-35)


def test_draws_equal_those_of_the_oracle(kernels: Driver) -> None:
    rng = np.random.default_rng(1)
    for position in range(100):
        logits = rng.normal(0, rng.choice([0.1, 2, 8]), int(rng.choice([2, 33, 5000]))).astype(np.float32)
        logits[rng.integers(0, len(logits), 2)] = logits[0]
        s = Sampling(
            temperature=float(rng.choice([0, 0.25, 1, 2.5])),
            top_p=float(rng.choice([1, 0.9, 0.5])),
            top_k=int(rng.choice([0, 40])),
            min_p=float(rng.choice([0, 0.0625])),
            seed=int(rng.integers(0, 1 << 63)),
        )
        settings = f"{s.temperature} {s.top_k} {s.top_p} {s.min_p} {s.seed} {3} {position}"
        [token] = kernels.ask(np.int64, 1, f"draw {len(logits)} {settings}", logits)
        assert token == oracle_sampling.draw(logits, s, np.zeros(position, np.int32), position, choice=3), s
