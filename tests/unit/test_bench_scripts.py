"""The parts of bench/ that need no peer: rounds, summaries, verdicts, the record, the models that are written."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

import llama2
from llama2 import native
from llama2.config import ModelConfig
from models import tiny_config, write_tiny_gguf

resource = pytest.importorskip("resource", reason="bench/ measures on POSIX systems")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


@pytest.fixture
def rounds() -> ModuleType:
    return importlib.import_module("rounds")


@pytest.fixture
def table() -> ModuleType:
    return importlib.import_module("table")


@pytest.fixture
def written() -> ModuleType:
    """bench/models.py, whose name the tests' own models.py has taken."""
    spec = importlib.util.spec_from_file_location("bench_models", BENCH / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_models"] = module
    spec.loader.exec_module(module)
    return module


# Rounds


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_run_tells_output_and_memory(rounds: ModuleType) -> None:
    done = rounds.run(python("import os; print(os.environ['WHO'])"), {"WHO": "me"})
    assert done.stdout == "me\n"
    assert done.first_byte > 0
    # From a program as small as the table itself: what a process has had at most begins at that of its parent.
    size = 256 << 20
    script = f"""import sys, rounds
for n in ({size}, {3 * size}):
    print(rounds.run([sys.executable, "-c", f"x = b'1' * {{n}}; print()"]).peak)"""
    small, large = map(float, rounds.run(python(script), {"PYTHONPATH": str(BENCH)}).stdout.split())
    assert size / 2**20 < small < 1.5 * size / 2**20
    assert 3 * size / 2**20 < large < 3.5 * size / 2**20


@pytest.mark.parametrize(
    "script", ["print('much'); raise SystemExit('too bad')", "import sys; sys.stderr.write('too bad')"]
)
def test_run_tells_a_failure(script: str, rounds: ModuleType) -> None:
    with pytest.raises(rounds.MeasurementError, match="too bad"):
        rounds.run(python(script))


def test_run_leaves_nothing_behind(rounds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        return started[0]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds.subprocess, "Popen", popen)
    monkeypatch.setattr(rounds.os, "wait4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(python("import os, time; os.write(1, b'x'); os.close(1); time.sleep(60)"))
    assert started[0].returncode == -9


def test_work_of_others(rounds: ModuleType, tmp_path: Path) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice, in ticks; a guest's are in the user's already
    (tmp_path / "stat").write_text("cpu  1 20 300 99999 99999 4000 50000 600000 99999 99999\ncpu0 7 7 7\n")
    own = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    others = rounds.work_of_others(tmp_path / "stat")
    assert others == pytest.approx(654_321 / os.sysconf("SC_CLK_TCK") - own, abs=0.5)
    assert rounds.work_of_others(tmp_path / "none") == 0


@pytest.fixture
def cores(rounds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next probes find; others leave two cores, and nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(rounds, "real_cores", lambda _: found.pop(0))
    monkeypatch.setattr(rounds, "work_of_others", lambda: 0.0)
    monkeypatch.setattr(rounds, "PATIENCE", 0.0)
    monkeypatch.setattr(rounds.os, "cpu_count", lambda: 2)
    return found


def programs(*names: str) -> dict[str, Callable[[], dict[str, float]]]:
    return {name: lambda name=name: {"length s": float(len(name))} for name in names}


@pytest.mark.parametrize(
    ("probes", "ran", "counts"),
    [
        ([1.9, 1.8, 2.1, 1.8], ["bb", "ccc", "a"], True),
        ([1.9, 1.8, 2.1, 1.79], ["bb", "ccc", "a"], False),
        ([1.9, 1.7], ["bb"], False),
        ([1.7], [], False),
    ],
)
def test_a_round_ends_with_the_cores(
    probes: list[float], ran: list[str], counts: bool, rounds: ModuleType, cores: list[float]
) -> None:
    cores += probes
    one = rounds.one_round(programs("a", "bb", "ccc"), first=1, threads=2, real=0.9)
    assert (list(one.figures), one.cores, one.counts) == (ran, probes, counts)
    assert one.figures == {name: {"length s": len(name)} for name in ran}
    assert one.left == [2.0] * len(ran)


def test_a_round_beside_others_does_not_count(
    rounds: ModuleType, cores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores += [2.0] * 3
    monkeypatch.setattr(rounds.time, "monotonic", itertools.count().__next__)  # a second a look
    spent = iter([10.0, 10.1, 20.0, 20.3])  # others' work before and after each program
    monkeypatch.setattr(rounds, "work_of_others", lambda: next(spent))
    one = rounds.one_round(programs("a", "bb"), first=0, threads=2, real=0.9)
    assert (one.left, one.counts) == ([1.9, 1.7], False)


def test_rounds_go_on_until_enough_count(rounds: ModuleType, cores: list[float]) -> None:
    cores += [2, 2, 2, 2, 1, 2, 2, 2]
    some: list[Any] = []
    seen: list[int] = []
    rounds.add_rounds(some, programs("a", "bb"), wanted=2, threads=2, real=0.9, added=lambda: seen.append(len(some)))
    assert [one.counts for one in some] == [True, False, True]
    assert [list(one.figures) for one in some] == [["a", "bb"], ["bb"], ["a", "bb"]]  # each first in turn
    assert seen == [1, 2, 3]
    cores += [1.0] * 12
    with pytest.raises(rounds.MeasurementError, match="2 threads seldom had 2 real cores"):
        rounds.add_rounds(some, programs("a"), wanted=3, threads=2, real=0.9)
    assert len(some) == 3 + 4 * 3


# The table


def a_round(rounds: ModuleType, counts: bool = True, **figures: dict[str, float]) -> Any:
    names = {"ours": "llama2", "cpp": "llama.cpp", "ik": "ik_llama.cpp"}
    return rounds.Round({names[who]: values for who, values in figures.items()}, [2.0], [2.0], counts)


def test_ratios_are_medians_of_neighbours(table: ModuleType, rounds: ModuleType) -> None:
    row = table.Row("fast", "c", "decode tokens/s", {"llama.cpp": 1.8}, table.READ, 0.6)
    some = [
        a_round(rounds, ours={"decode tokens/s": 30, table.READ: 0.5}, cpp={"decode tokens/s": 10}),
        a_round(rounds, counts=False, ours={"decode tokens/s": 900, table.READ: 0.9}, cpp={"decode tokens/s": 1}),
        a_round(rounds, ours={"decode tokens/s": 40, table.READ: 0.7}, cpp={"decode tokens/s": 40}),
        a_round(rounds, ours={"decode tokens/s": 36, table.READ: 0.6}, cpp={"decode tokens/s": 20}),
    ]
    found = table.summary(row, some)
    assert found.medians == {"llama2": 36, "llama.cpp": 20}
    assert found.each == {"llama.cpp": [3, 1, 1.8]}
    assert found.ratios == {"llama.cpp": 1.8}
    assert found.met
    assert found.share == 0.6
    assert table.cells(row, found) == [
        "fast, tokens/s", "36", "20 (× 1.80)", "", "", "≥ 1.8 × llama.cpp", "yes", "60% of read bandwidth",
        "60%, reached",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "required", "met"),
    [
        ("decode tokens/s", {"llama.cpp": 2.0, "ik_llama.cpp": 0.5}, True),
        ("decode tokens/s", {"llama.cpp": 2.0, "ik_llama.cpp": 0.51}, False),
        ("first token s", {"llama.cpp": 2.0, "ik_llama.cpp": 0.5}, True),
        ("first token s", {"llama.cpp": 1.99, "ik_llama.cpp": 0.5}, False),
        ("peak memory MiB", {"llama.cpp": 1.99}, False),
        ("peak memory MiB", {}, True),
    ],
)
def test_every_requirement_must_be_met(
    figure: str, required: dict[str, float], met: bool, table: ModuleType, rounds: ModuleType
) -> None:
    row = table.Row("row", "c", figure, required)
    found = table.summary(row, [a_round(rounds, ours={figure: 10}, cpp={figure: 5}, ik={figure: 20})])
    assert found.ratios == {"llama.cpp": 2.0, "ik_llama.cpp": 0.5}
    assert found.met is met
    assert table.cells(row, found)[6] == ("yes" if met else "no")


def test_what_was_not_measured_says_so(table: ModuleType) -> None:
    row = table.Row("row", "c", "first token s", {"llama.cpp": 1.2}, goal=None)
    assert table.cells(row, None) == ["row, s", "", "", "", "", "≤ 1.2 × llama.cpp", "not measured", "", ""]


def test_tables_of_text_and_markdown(table: ModuleType) -> None:
    lines = [["", "met"], ["a row", "yes"], ["b", ""]]
    assert table.as_text(lines) == "       met\na row  yes\nb\n"
    assert table.as_markdown(lines) == "|  | met |\n| --- | --- |\n| a row | yes |\n| b |  |\n"


def test_every_row_has_its_contest(table: ModuleType) -> None:
    contests = table.contests(table.Setting(Path("peers"), Path("models"), 2))
    rows = table.rows()
    assert len({row.title for row in rows}) == len(rows)
    assert {row.contest for row in rows} == set(contests)
    for row in rows:
        assert set(row.required) <= set(contests[row.contest].programs) - {"llama2"}


def test_llama2_has_every_figure_of_the_rows(table: ModuleType, rounds: ModuleType, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(context_length=2048))
    setting = table.Setting(tmp_path, tmp_path, 1)
    bench, batch = setting.bench("tiny", 40, 4), setting.bench("tiny", 8, 4, depth=8, batch=4)
    figures = bench.read(rounds.run(bench.command))
    batched = batch.read(rounds.run(batch.command))
    assert batched.keys() == figures.keys()
    started = setting.start("tiny", "generate", "a b c").programs["llama2"]
    figures |= started.read(rounds.run(started.command))
    assert {row.figure for row in table.rows()} | {row.share for row in table.rows()} - {""} <= figures.keys()
    assert all(value > 0 for value in figures.values())


def test_peers_output_becomes_figures(table: ModuleType, rounds: ModuleType) -> None:
    tests = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 300.5}, {"n_prompt": 0, "n_gen": 128, "avg_ts": 120.25}]
    run = rounds.Run(json.dumps(tests), 1.0, 150.0)
    assert table.read_llama_bench(run) == {
        "prefill tokens/s": 300.5, "decode tokens/s": 120.25, "peak memory MiB": 150.0
    }  # fmt: skip
    line = '\n{"pp": 64, "tg": 64, "speed_pp": 228.9, "speed_tg": 120.7, "speed": 158.1}\n\n'
    assert table.read_batched_bench(rounds.Run(line, 1.0, 1.0)) == {"prefill tokens/s": 228.9, "decode tokens/s": 120.7}


def test_commands_are_shown_without_folders(table: ModuleType) -> None:
    setting = table.Setting(Path("/x/peers"), Path("/y/models"), 2)
    shown = [table.shown(program, setting) for program in table.contests(setting)["AVX2"].programs.values()]
    assert shown[0].startswith(
        f"LLAMA2_ISA=avx2 {Path(sys.executable).name} -m llama2 bench -m MODELS/default-q4_1.gguf "
    )
    assert shown[1].startswith("PEERS/llama.cpp-avx2/bin/llama-bench -m MODELS/default-q4_1.gguf -t 2 -p 512 ")
    driver = table.contests(setting)[table.Q4_1].programs["ik_llama.cpp"]
    assert table.shown(driver, setting).startswith("PEERS/ik/bin/python bench/drivers/ik.py MODELS/default-q4_1.gguf ")


ORIGIN = {"commit": "abc", "cpu": "some", "threads": 2, "real": 0.9}


def test_a_record_is_continued(
    table: ModuleType, rounds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "table.json", itertools.count(100, 7)  # seven seconds a look
    monkeypatch.setattr(table.time, "monotonic", lambda: next(clock))
    row = next(row for row in table.rows() if row.contest == "chat")
    record = table.Record(path, ORIGIN, wanted=2, resume=False)
    record.begin(row.contest, {"llama2": "this"}).append(a_round(rounds, ours={row.figure: 3}, cpp={row.figure: 2}))
    record.write()
    assert json.loads(path.read_text())["rows"] == []  # one round is not enough

    record = table.Record(path, ORIGIN, wanted=2, resume=True)
    some = record.begin(row.contest, {"llama2": "this"})
    assert some == [a_round(rounds, ours={row.figure: 3}, cpp={row.figure: 2})]
    assert record.found(row) is None
    some.append(a_round(rounds, counts=False, ours={row.figure: 9}))
    assert not record.complete(row.contest)
    some.append(a_round(rounds, ours={row.figure: 4}, cpp={row.figure: 4}))
    assert record.complete(row.contest)
    record.write()
    content = json.loads(path.read_text())
    assert [(one["title"], one["ratios"]) for one in content["rows"]] == [(row.title, {"llama.cpp": 1.25})]
    assert content["seconds"] == 7 + 7
    assert len(content["contests"][row.contest]["rounds"]) == 3
    assert os.listdir(tmp_path) == ["table.json"]


def test_a_record_is_never_mixed(table: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    record = table.Record(path, ORIGIN, wanted=1, resume=True)  # there is none to continue yet
    record.begin("c", {"llama2": "this"})
    record.write()
    with pytest.raises(SystemExit, match="is there; --resume continues it"):
        table.Record(path, ORIGIN, wanted=1, resume=False)
    for name, value in {"commit": "def", "cpu": "other", "threads": 3, "real": 0.5}.items():
        with pytest.raises(SystemExit, match=f"{name} was {ORIGIN[name]} and is {value}"):
            table.Record(path, {**ORIGIN, name: value}, wanted=1, resume=True)
    with pytest.raises(SystemExit, match="the commands of c were others"):
        table.Record(path, ORIGIN, wanted=1, resume=True).begin("c", {"llama2": "that"})


def test_limits_are_medians_of_rounds_that_count(table: ModuleType, rounds: ModuleType, tmp_path: Path) -> None:
    record = table.Record(tmp_path / "table.json", ORIGIN, wanted=1, resume=False)
    record.begin("a", {}).extend(a_round(rounds, ours={"read GB/s": value, "int8 G/s": 800}) for value in (30, 50))
    record.begin("b", {}).append(a_round(rounds, ours={"first token s": 1}))
    record.begin("c", {}).append(a_round(rounds, counts=False, ours={"read GB/s": 1, "int8 G/s": 1}))
    assert record.limits() == {"read GB/s": 40, "int8 G/s": 800}


def test_a_contest_that_fails_leaves_the_others(
    table: ModuleType,
    rounds: ModuleType,
    cores: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    write_tiny_gguf(tmp_path / "tiny.gguf", format="Q4_0")

    def contest(script: str) -> Any:
        read = table.read_start
        commands = {"llama2": python("print(1)"), "llama.cpp": python(script)}
        return table.Contest(tmp_path / "tiny.gguf", {name: table.Program(c, read) for name, c in commands.items()})

    setting = table.Setting(tmp_path, tmp_path, 2)
    record = table.Record(tmp_path / "table.json", ORIGIN, wanted=2, resume=False)
    cores += [2.0] * 6
    assert not table.measure("chat", contest("raise SystemExit('too bad')"), setting, record, 0.9)
    assert "chat: " in (told := capsys.readouterr().err)
    assert "too bad" in told
    assert table.measure("generate", contest("print(2)"), setting, record, 0.9)
    assert [one.counts for one in record.rounds["generate"]] == [True, True]
    assert cores == []
    kept = {name.partition("-")[2] for name in os.listdir(tmp_path / "home" / "packed")}
    # By the warm-up, since no llama2 runs in these contests.
    assert kept == {"vocabulary.bin", f"{native.module().isa}.bin"}
    assert capsys.readouterr().err.startswith("generate ..")
    assert table.measure("generate", contest("print(2)"), setting, record, 0.9)
    assert capsys.readouterr().err == ""  # nothing was left to do
    measured = [one["title"] for one in json.loads((tmp_path / "table.json").read_text())["rows"]]
    assert measured == ["generate, start to first token", "generate, peak memory"]


# The models


@pytest.mark.parametrize("format", [GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q6_K])
def test_random_weights_have_a_sensible_size(format: GGMLType, written: ModuleType) -> None:
    blocks = written.random_blocks(format, 4000, np.random.default_rng(0))
    weights = gguf.quants.dequantize(blocks, format)
    assert weights.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean()) < 0.0002
    assert len(np.unique(weights)) > 15


@pytest.mark.parametrize(
    ("layers", "more"),
    [(32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]), (22, [0, 1, 4, 7, 10, 13, 16, 19, 20, 21])],
)
def test_formats_are_those_of_llama_quantize(layers: int, more: list[int], written: ModuleType) -> None:
    """What llama.cpp's llama-quantize (in llama-cpp-python 0.3.36) made of random F16 models of so many layers."""

    def formats(name: str, mix: str) -> list[str]:
        return [written.format_of(name, layer, layers, mix).name for layer in range(layers)]

    mixed = ["Q6_K" if layer in more else "Q4_K" for layer in range(layers)]
    assert formats("attn_v", "Q4_K_M") == formats("ffn_down", "Q4_K_M") == mixed
    for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert formats(name, "Q4_K_M") == ["Q4_K"] * layers
        assert formats(name, "Q4_0") == ["Q4_0"] * layers
    assert [written.format_of("token_embd", None, layers, mix).name for mix in ("Q4_0", "Q4_K_M")] == ["Q4_0", "Q4_K"]
    assert {written.format_of("output", None, layers, mix).name for mix in ("Q4_0", "Q4_K_M")} == {"Q6_K"}


def test_a_random_model_runs(written: ModuleType, model_path: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        dim=256, n_layers=8, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=1000, head_dim=64, context_length=64
    )
    shape = written.Shape("tiny", config, "Q4_K_M")
    path = tmp_path / "tiny.gguf"
    written.make(path, lambda part: written.write_random(shape, gguf.GGUFReader(model_path), part))
    with llama2.load(path) as model, llama2.load(model_path) as default:
        assert replace(model.config, norm_eps=config.norm_eps) == config  # which the file has in float32
        text = " the and of in\n"
        assert model.encode(text) == default.encode(text)  # tokens that come first
        answer = model.generate("Once upon a time", max_tokens=8, temperature=1, logprobs=0, seed=1)
        assert answer.logprobs is not None
        # Nearly uniform over 1000 tokens: a random head of 256 columns spreads logits by 0.02 * sqrt(256) = 0.3.
        assert all(-12 < logprob.logprob < -3 for logprob in answer.logprobs)
        formats = {tensor.format for tensor in model.checkpoint.tensors.values()}
        assert formats == {"F32", "Q4_K", "Q6_K"}


def test_models_appear_whole_and_are_kept(written: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"

    def breaks(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written.make(path, breaks)
    assert not path.exists()
    written.make(path, lambda part: part.write_text("whole"))
    assert path.read_text() == "whole"
    written.make(path, breaks)
    assert os.listdir(tmp_path) == ["a.gguf"]


# The limits


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_bandwidth_probe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = importlib.import_module("limits")
    monkeypatch.setattr(limits, "SIZE", 256)  # an int8 product of 2048 takes half a minute on some processors
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    probe = limits.compile_probe(tmp_path)
    assert float(limits.run([str(probe), "2", "0.01"]).stdout) > 1e8  # the slowest memory reads a GB/s
    assert subprocess.run([probe, "0", "1"], capture_output=True, check=False).returncode == 2
    assert limits.int8_product() > 1e6


def test_limits_agree_within_a_round(rounds: ModuleType) -> None:
    limits = importlib.import_module("limits")

    def one(ours: float, theirs: float, counts: bool = True) -> Any:
        return rounds.Round({"llama2": {"read GB/s": ours}, "independent": {"read GB/s": theirs}}, [2.0], [2.0], counts)

    assert limits.agreement([one(30, 20), one(10, 20), one(22, 20), one(99, 1, False)]) == {"read GB/s": 1.1}
