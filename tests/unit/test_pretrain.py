"""The loop of training: what it leaves behind, how it continues after an end, and what it does when things go wrong."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch._inductor.config as inductor

import corpora
from llama2 import checkpoint, recipe
from llama2.config import SIZES
from llama2.engine.runner import Batch as EngineBatch
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import DataError, Llama2Error, RecipeError, RunError
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.train import states
from llama2.train.callbacks import is_spike
from llama2.train.loop import StepReport
from llama2.train.pretrain import pretrain
from llama2.train.processes import Processes
from llama2.train.schedule import learning_rate
from llama2.train.settings import PretrainRecipe, SpikeSettings
from llama2.train.throughput import flops_per_token

TEXT = "the cat sat on the mat and the dog sat on the log. " * 3
RECIPE = """
steps = 8
seed = 3
compile = false
precision = "fp32"
evaluate = 4
model = { dim = 16, n_layers = 2, n_heads = 2, hidden_dim = 32 }
data = { corpus = "CORPUS", length = 16, validation = 3 }
batch = { size = 4, micro_size = 2 }
optimizer = { lr = 1e-2, warmup = 2 }
save = { every = 3, keep_last = 2 }
"""


pytestmark = pytest.mark.usefixtures("one_thread", "one_measurement")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "some.model").write_bytes(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def documents(count: int) -> list[list[list[int]]]:
        return [[[1, *tokenizer.encode(TEXT[i % 20 :]), 2] for i in range(count)]]

    corpora.write(folder, folder / "some.model", 290, {"train": documents(30), "validation": documents(4)})
    return folder


@pytest.fixture(scope="module")
def asked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PretrainRecipe]:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE.replace("CORPUS", str(corpus)))
    return lambda *overrides: recipe.load(path, PretrainRecipe, overrides)


class Stopped(BaseException):
    """As a process is that somebody ends."""


class Stop:
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.last = step
        self.header: list[str] = []
        self.notes: list[str] = []

    def note(self, note: str) -> None:
        self.notes.append(note)

    def begin(self, header: Sequence[str]) -> None:
        self.header += header

    def step(self, report: StepReport) -> None:
        if report.step == self.last:
            raise Stopped


@pytest.fixture(scope="module")
def whole_in(asked: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """`whole_in(precision)` is a run of the recipe in one go, which others are compared with."""
    return cache(lambda precision: pretrain(asked(f"precision={precision}"), tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def whole(whole_in: Callable[[str], Run]) -> Run:
    return whole_in("fp32")


@pytest.fixture(scope="module")
def stopped(asked: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Path], None]:
    """`stopped(step, folder)` leaves in a new folder what a run of the recipe left that ended after a step."""

    @cache
    def run(step: int) -> Path:
        folder = tmp_path_factory.mktemp("stopped") / "run"
        with pytest.raises(Stopped):
            pretrain(asked(), folder, reporter=Stop(step))
        return folder

    return lambda step, folder: shutil.copytree(run(step), folder)


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.metrics()}


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1000, 1.5e-4),
        (2000, 3e-4),
        (126_500, 2.6045942e-4),
        (251_000, 1.65e-4),
        (375_500, 6.9540585e-5),
        (500_000, 3e-5),
    ],
)
def test_the_learning_rate_of_the_paper(step: int, rate: float) -> None:
    """Spec 12.4."""
    assert learning_rate(step, peak=3e-4, warmup=2000, steps=500_000) == pytest.approx(rate, rel=1e-7)
    assert learning_rate(step, peak=1.5e-4, warmup=2000, steps=500_000) == pytest.approx(rate / 2, rel=1e-7)


def test_operations_of_a_token() -> None:
    """Spec 12.1: three times the forward pass's products and causal attention."""
    assert flops_per_token(SIZES["7B"], 4096) == 3 * (13_214_154_752 + 1_074_003_968)
    assert flops_per_token(SIZES["7B"], 4096, trained=10) == 2 * 13_214_154_752 + 3 * 1_074_003_968 + 60


def test_what_a_spike_is() -> None:
    before = [3.0, 5.0, 3.0, 5.0]  # mean 4, deviation 1
    rule = SpikeSettings(window=4, deviations=2, min_increase=0.5)
    assert not is_spike(6.0, before, rule)
    assert is_spike(6.01, before, rule)
    assert not is_spike(99.0, before[1:], rule)
    rule = SpikeSettings(window=4, deviations=2, min_increase=3)
    assert not is_spike(7.0, before, rule)
    assert is_spike(7.01, before, rule)


def test_a_run_leaves_all_that_there_is_to_know(asked: Any, tmp_path: Path) -> None:
    reporter = Stop(-1)
    samples: list[tuple[Path, list[str], int]] = []

    def sample(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
        samples.append((model, list(prompts), tokens))
        return [f"{prompt} sat" for prompt in prompts]

    overrides = ("samples.prompts=['the cat']", "samples.tokens=5", "watts=100")
    run = pretrain(asked(*overrides), tmp_path / "run", sample=sample, reporter=reporter)
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["tokens"] == line["step"] * 4 * 16 for line in lines)
    assert lines[0]["loss"] == pytest.approx(np.log(290), rel=0.02)  # as of a uniform guess
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert [line["step"] for line in lines if "validation" in line] == [4, 8]
    assert lines[-1]["lr"] == pytest.approx(1e-3)
    assert lines[-1]["tCO2eq"] == pytest.approx(lines[-1]["MWh"] * 1.1 * 0.385)
    about = run.origin
    assert about["seed"] == 3
    assert about["devices"] == 1
    assert {"command", "commit", "versions", "hardware", "date"} <= about.keys()
    assert run.recipe["optimizer"]["clip"] == 1.0  # what was not said, too
    assert sorted(path.name for path in (run.folder / "states").iterdir()) == ["step-00000006", "step-00000008"]
    assert [step["step"] for step in map(json.loads, (run.folder / "samples.jsonl").open())] == [3, 6, 8]
    assert samples[-1] == (run.folder / "states/step-00000008/model", ["the cat"], 5)
    assert list((run.folder / "tensorboard").glob("events*"))
    assert "MFU = " in reporter.header[1]
    assert re.fullmatch(
        r"estimate: [\d,]+ tokens in 8 steps take about 1 min, if 41% of the peak is reached, and 0.5 GB of memory",
        reporter.header[2],
    )


def test_the_model_opens_without_torch(asked: Any, tmp_path: Path) -> None:
    run = pretrain(asked(), tmp_path / "run")
    opened = checkpoint.open(run.folder)
    assert opened.tokenizer.decode(opened.tokenizer.encode("the dog")) == "the dog"
    ids = np.array([1, *opened.tokenizer.encode("the cat sat on")], np.int32)
    count = len(ids)
    everything = EngineBatch(
        ids,
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.int32),
        np.array([[0]], np.int32),
        np.arange(count, dtype=np.int32),
    )
    ours = NumpyRunner(opened, 1).forward(everything)
    with torch.no_grad():
        theirs = Transformer.load(opened)(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert losses(run)[8] < 5.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("end", [1, 4, 7])
def test_a_run_that_ended_continues_as_if_it_had_not(
    asked: Any, whole_in: Callable[[str], Run], tmp_path: Path, end: int, precision: str
) -> None:
    recipe, whole = asked(f"precision={precision}"), whole_in(precision)
    with pytest.raises(Stopped):
        pretrain(recipe, tmp_path / "parts", reporter=Stop(end))
    parts = pretrain(recipe, tmp_path / "parts", resume=True)
    assert losses(parts) == losses(whole)
    assert [line.get("validation") for line in parts.metrics()] == [line.get("validation") for line in whole.metrics()]
    same = [(run.folder / "states/step-00000008/model/model.safetensors").read_bytes() for run in (parts, whole)]
    assert same[0] == same[1]


def test_a_state_that_was_cut_off_is_never_taken(asked: Any, whole: Run, stopped: Any, tmp_path: Path) -> None:
    stopped(7, tmp_path / "parts")
    part = tmp_path / "parts/states/step-00000009.part"
    part.mkdir()
    (part / ".metadata").write_bytes(b"half")
    assert checkpoint.open(tmp_path / "parts").path.parent.name == "step-00000006"
    assert losses(pretrain(asked(), tmp_path / "parts", resume=True)) == losses(whole)
    assert not part.exists()


def test_a_damaged_state_is_named(asked: Any, stopped: Any, tmp_path: Path) -> None:
    stopped(7, tmp_path / "run")
    [data] = (tmp_path / "run/states/step-00000006").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"step-00000006: cannot be read \(.*\); remove it, and the run continues"):
        pretrain(asked(), tmp_path / "run", resume=True)


def test_a_second_command_changes_nothing_of_a_run_that_continues(asked: Any, whole: Run, tmp_path: Path) -> None:
    """Also while a state is half written, which a second process once removed."""

    class Second(Stop):
        def step(self, report: StepReport) -> None:
            if report.step in (3, 6):
                for resume in (True, False):
                    with pytest.raises(RunError, match=r"has this run since|holds a run already"):
                        pretrain(asked(), tmp_path / "run", resume=resume)

    run = pretrain(asked(), tmp_path / "run", reporter=Second(-1))
    assert losses(run) == losses(whole)
    for step in (6, 8):
        assert checkpoint.open(run.folder / f"states/step-{step:08d}/model").config.dim == 16
    assert not (run.folder / "lock").exists()


def test_a_state_without_its_model_is_not_published(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, *rest: Any) -> None:
        if folder.parent.name != "step-00000006.part":
            write_model(folder, *rest)

    write_model = states.write_model
    monkeypatch.setattr(states, "write_model", write)
    run = pretrain(asked("save.every=2"), tmp_path / "run")
    [note] = {line["note"] for line in run.metrics() if "note" in line}
    assert "step-00000006: cannot be saved (something removed parts of it)" in note
    assert sorted(path.name for path in (run.folder / "states").iterdir()) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("part", ["model", ".metadata"])
def test_half_a_state_is_passed_over(asked: Any, whole: Run, stopped: Any, tmp_path: Path, part: str) -> None:
    stopped(7, tmp_path / "run")
    half = tmp_path / "run/states/step-00000006"
    if part == "model":
        shutil.rmtree(half / part)
    else:
        (half / part).unlink()
    run = pretrain(asked(), tmp_path / "run", resume=True)
    assert losses(run) == losses(whole)
    assert (half / part).exists()


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class Full(Stop):
    """The disk is full from a step to another."""

    def __init__(self, run: Path, first: int, last: int) -> None:
        super().__init__(-1)
        self.run = run
        self.first, self.last_full = first, last
        self.full = small_files(30_000)
        self.notes: list[str] = []

    def step(self, report: StepReport) -> None:
        self.notes += [report.note] if report.note else []
        if report.step == self.first:
            while not list(self.run.glob("states/step-00000003*/.metadata")):
                time.sleep(0.01)
            self.full.__enter__()
        if report.step == self.last_full:
            self.full.__exit__(None, None, None)


def test_a_full_disk_costs_a_state_and_no_more(asked: Any, whole: Run, tmp_path: Path) -> None:
    reporter = Full(tmp_path / "run", 5, 7)
    run = pretrain(asked(), tmp_path / "run", reporter=reporter)
    assert losses(run) == losses(whole)
    assert [note for note in reporter.notes if "step-00000006: cannot be saved (" in note]
    names = sorted(path.name for path in (run.folder / "states").iterdir())
    assert names == ["step-00000003", "step-00000008"]


def test_a_disk_that_is_full_at_the_end_is_an_error(asked: Any, tmp_path: Path) -> None:
    reporter = Full(tmp_path / "run", 7, -1)
    try:
        with pytest.raises(RunError, match=r"step-00000008: cannot be saved \(.*and continue with --resume"):
            pretrain(asked(), tmp_path / "run", reporter=reporter)
    finally:
        reporter.full.__exit__(None, None, None)
    assert pretrain(asked(), tmp_path / "run", resume=True).metrics()[-1]["step"] == 8


def test_a_spike_is_rewound_and_its_rows_left_out(asked: Any, tmp_path: Path) -> None:
    rule = ("spikes.window=2", "spikes.deviations=1e-9", "spikes.min_increase=1e-9", "spikes.rewinds=5", "steps=60")
    with pytest.raises(RunError, match="after 5 rewinds to the last state"):
        pretrain(asked(*rule), tmp_path / "run")
    lines = Run(tmp_path / "run").metrics()
    back = [i for i, line in enumerate(lines) if "back to step" in line.get("note", "")]
    assert len(back) == 5
    for i in back:
        to = int(lines[i]["note"].split("back to step ")[1].split(",")[0])
        assert lines[i]["step"] == to
        assert to % 3 == 0
    gone_on = [(lines[i], lines[i + 1]) for i in back if i + 1 < len(lines) and i + 1 not in back]
    assert gone_on
    for rewound, after in gone_on:
        saved = next(line for line in lines if line["step"] == rewound["step"] and "note" not in line)
        assert after["step"] == saved["step"] + 1
        assert after["epoch"] - saved["epoch"] > 1.5 * lines[0]["epoch"]  # at least a step's rows were left out


def test_losses_that_are_no_numbers_change_nothing_and_end_the_run(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="3 steps in a row had no finite loss or gradient"):
        pretrain(asked("optimizer.lr=1e30", "optimizer.warmup=0"), tmp_path / "run")
    assert [line["note"] for line in Run(tmp_path / "run").metrics() if "note" in line]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["optimizer.learning_rate=1"], RecipeError, "optimizer.learning_rate: unknown setting; "),
        (["optimizer.rate=1"], RecipeError, "optimizer.rate: unknown setting; did you mean optimizer.lr?"),
        (["batch.rows=1"], RecipeError, "batch.rows: unknown setting; did you mean batch.size?"),
        (["checkpointing=true"], RecipeError, "checkpointing: unknown setting; did you mean recompute?"),
        (["optimizer.betas=[0.9,1.5]"], RecipeError, "optimizer.betas.1: Input should be less than 1"),
        (["optimizer.betas=[-0.1,0.9]"], RecipeError, "optimizer.betas.0: Input should be greater than or equal to 0"),
        (["optimizer.lr=inf"], RecipeError, "optimizer.lr: Input should be a finite number"),
        (["optimizer.eps=nan"], RecipeError, "optimizer.eps: Input should be"),
        (["optimizer.weight_decay=inf"], RecipeError, "optimizer.weight_decay: Input should be a finite number"),
        (["watts=inf"], RecipeError, "watts: Input should be a finite number"),
        (["steps=true"], RecipeError, "steps: is a number, and neither true nor false"),
        (["steps=1" + "0" * 400], RecipeError, "steps: is a number of more than 18 digits"),
        (["steps=1000000000001"], RecipeError, "steps: Input should be less than or equal to 1000000000000"),
        (["optimizer.rewarm=2"], RecipeError, "optimizer.rewarm: is for a run that is resumed; give --resume"),
        (["optimizer.warmup=9"], RecipeError, "optimizer.warmup=9 is longer than the run, steps=8"),
        (["samples.prompts=['the cat']", "samples.tokens=16"], RecipeError, "and the model reads 16; shorten either"),
        (["model.n_layers=1000000"], RecipeError, "model.n_layers: Input should be less than or equal to 1000"),
        (["batch.size=1000000000000"], RecipeError, "batch.size: Input should be less than or equal to 1048576"),
        (["steps=0"], RecipeError, "steps: Input should be greater than or equal to 1"),
        (
            ["batch.size=5"],
            RecipeError,
            "batch.size=5 is not a multiple of batch.micro_size=2 rows on each of 1 processes",
        ),
        (["model.dim=15"], Llama2Error, "head_dim=7 must be even"),
        (["model.size=7B"], RecipeError, "has size and also dim"),
        (["data.corpus=nowhere"], DataError, "nowhere: is not a corpus"),
        (["data.length=100000"], DataError, "too few for a row of 100000"),
        (["data.recipe=some.toml"], RecipeError, "needs a corpus, or what to build one from (recipe, dir)"),
        (["mesh.tensor=2"], RunError, "mesh.tensor=2 does not divide 1 processes"),
    ],
)
def test_what_is_wrong_is_said_before_any_step(
    asked: Any, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        pretrain(asked(*overrides), tmp_path / "run", sample=lambda *_: [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_continued_as_another(asked: Any, stopped: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a run"):
        pretrain(asked(), tmp_path / "run", resume=True)
    stopped(4, tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        pretrain(asked(), tmp_path / "run")
    with pytest.raises(RunError, match=r"was begun with seed = 3, and the recipe says 4"):
        pretrain(asked("seed=4", "optimizer.rewarm=1", "steps=9"), tmp_path / "run", resume=True)
    other = ("optimizer.betas=[0.9, 0.9]", r"was begun with optimizer.betas = \[0.9, 0.95\], and the recipe says")
    with pytest.raises(RunError, match=other[1]):
        pretrain(asked(other[0]), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change", ["steps=16", "optimizer.lr=2e-2", "optimizer.warmup=3", "optimizer.min_lr_ratio=0.2"]
)
def test_another_schedule_needs_a_warm_up_of_its_own(asked: Any, stopped: Any, tmp_path: Path, change: str) -> None:
    stopped(4, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.glob("run/*.json*")}
    name, _, value = change.partition("=")
    with pytest.raises(RunError, match=rf"was begun with {name} = .*, and the recipe says .*, so the learning rate"):
        pretrain(asked(change), tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("run/*.json*")} == before
    steps = 16 if name == "steps" else 8
    run = pretrain(asked(change, "optimizer.rewarm=1"), tmp_path / "run", resume=True)
    assert run.metrics()[-1]["step"] == steps
    table: Any = run.recipe
    for part in name.split("."):
        table = table[part]
    assert table == float(value)


def test_a_run_that_ended_continues_after_a_new_warm_up(asked: Any, tmp_path: Path) -> None:
    """It ends at a tenth of 1e-2, rises to 2e-2 in two steps, and falls to a tenth of that at step 16."""
    pretrain(asked(), tmp_path / "run")
    more = asked("steps=16", "optimizer.lr=2e-2", "optimizer.rewarm=2")
    shutil.copytree(tmp_path / "run", tmp_path / "parts")
    run = pretrain(more, tmp_path / "run", resume=True)
    rates = {line["step"]: line["lr"] for line in run.metrics()}
    assert list(rates) == list(range(1, 17))
    half = 2e-2 * (0.1 + 0.9 / 2)  # three of the six steps after the warm-up
    assert [rates[step] for step in (2, 8, 9, 10, 13, 16)] == pytest.approx([1e-2, 1e-3, 10.5e-3, 2e-2, half, 2e-3])
    with pytest.raises(Stopped):  # before it has a state of its own
        pretrain(more, tmp_path / "parts", resume=True, reporter=Stop(8 + 1))
    with pytest.raises(Stopped):
        pretrain(more, tmp_path / "parts", resume=True, reporter=Stop(13))
    parts = pretrain(more, tmp_path / "parts", resume=True)
    assert losses(parts) == losses(run)
    assert {line["step"]: line["lr"] for line in parts.metrics()} == rates
    shutil.rmtree(tmp_path / "parts/states/step-00000016")
    shutil.rmtree(tmp_path / "parts/states/step-00000015")
    with pytest.raises(RunError, match=r"begun with optimizer.lr = 0.02"):
        pretrain(asked("steps=4"), tmp_path / "parts", resume=True)
    parts = pretrain(asked("steps=4", "optimizer.rewarm=2"), tmp_path / "parts", resume=True)  # all states are gone
    assert [line["lr"] for line in parts.metrics()][:2] == pytest.approx([5e-3, 1e-2])
    with pytest.raises(RunError, match="16 steps are done, and steps=17 leaves no room for a warm-up of 2; choose ste"):
        pretrain(asked("steps=17", "optimizer.lr=2e-2", "optimizer.rewarm=2"), tmp_path / "run", resume=True)


def test_what_may_differ_freely(asked: Any, whole: Run, stopped: Any, corpus: Path, tmp_path: Path) -> None:
    stopped(7, tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "moved")
    other = (f"data.corpus={tmp_path / 'moved'}", "batch.micro_size=4", "save.every=5", "evaluate=1", "watts=5")
    run = pretrain(asked(*other), tmp_path / "run", resume=True)
    assert list(losses(run).values()) == pytest.approx(list(losses(whole).values()), rel=1e-5)


@pytest.mark.parametrize("step", [1, 4])
def test_other_data_are_refused(asked: Any, stopped: Any, corpus: Path, tmp_path: Path, step: int) -> None:
    """Also where there is no state yet that states what they were."""
    stopped(step, tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "other")
    manifest = tmp_path / "other/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(RunError, match=r"other: is not the data that .*run was begun with; give the same data"):
        pretrain(asked(f"data.corpus={tmp_path / 'other'}"), tmp_path / "run", resume=True)


def test_a_run_with_old_names_is_resumed(asked: Any, whole: Run, stopped: Any, tmp_path: Path) -> None:
    """As a run was written before its settings, its metrics and its folder of states had their names of today."""
    old = {"optimizer": {"lr": "rate", "min_lr_ratio": "final"}, "batch": {"size": "rows", "micro_size": "micro"}}
    old |= {"spikes": {"min_increase": "least"}, "save": {"keep_last": "keep"}}
    stopped(7, tmp_path / "run")
    run = tmp_path / "run"
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["checkpointing"] = recipe.pop("recompute")
    for table, names in old.items():
        recipe[table] = {names.get(name, name): value for name, value in recipe[table].items()}
    (run / "recipe.json").write_text(json.dumps(recipe))
    for name, new, before in (("run.json", '"min_lr_ratio"', '"final"'), ("metrics.jsonl", '"lr"', '"rate"')):
        assert new in (run / name).read_text()
        (run / name).write_text((run / name).read_text().replace(new, before))
    (run / "states").rename(run / "checkpoints")
    assert checkpoint.open(run).path.parent.name == "step-00000006"
    resumed = pretrain(asked(), run, resume=True)
    assert losses(resumed) == losses(whole)
    assert [line["lr"] for line in resumed.metrics()] == [line["lr"] for line in whole.metrics()]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert not (run / "states").exists()


def test_warnings_are_as_before_a_run(asked: Any, tmp_path: Path) -> None:
    """DCP warns that a process saves alone, in a thread of its own: this shows nowhere, and other warnings do."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = [*warnings.filters]
        pretrain(asked("steps=3"), tmp_path / "run")
        assert [*warnings.filters] == before
        assert not [each for each in caught if "torch.distributed is disabled" in str(each.message)]


def test_a_record_of_another_version(asked: Any, tmp_path: Path) -> None:
    pretrain(asked(), tmp_path / "run")
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe | {"gone": 1}))
    with pytest.raises(RunError, match="its recipe is damaged, or of another version; begin another run"):
        pretrain(asked(), tmp_path / "run", resume=True)


def test_validation_that_is_no_number(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.train.step.Step.evaluate", lambda *_: float("nan"))
    run = pretrain(asked(), tmp_path / "run")

    def refuse(word: str) -> None:
        raise AssertionError(word)  # which JSON does not know

    lines = [json.loads(line, parse_constant=refuse) for line in (run.folder / "metrics.jsonl").open()]
    assert {line["step"]: line["validation"] for line in lines if "validation" in line} == {4: None, 8: None}
    assert [line.get("note") for line in lines if line["step"] in (3, 4)] == [
        None,
        "the validation loss is not finite",
    ]
    assert "| validation | not finite | not finite |" in (run.folder / "card.md").read_text()


def test_each_source_is_validated(asked: Any, corpus: Path, tmp_path: Path) -> None:
    """Three sources of 12, 6 and 2 documents of three rows each, and ten rows: 6, 3 and 1 of them by their shares."""
    tokenizer = corpus / "tokenizer.model"
    documents = [[1] + [3 + source] * 46 + [2] for source, count in enumerate((12, 6, 2)) for _ in range(count)]
    (tmp_path / "three").mkdir()
    corpora.write(tmp_path / "three", tokenizer, 290, {"train": [documents], "validation": [documents]})
    manifest = json.loads((tmp_path / "three/manifest.json").read_text())
    manifest["splits"]["validation"][0]["sources"] = {"books": 12, "web": 6, "code": 2}
    (tmp_path / "three/manifest.json").write_text(json.dumps(manifest))
    reporter = Stop(-1)
    run = pretrain(
        asked(f"data.corpus={tmp_path / 'three'}", "data.validation=10"), tmp_path / "run", reporter=reporter
    )
    last = run.metrics()[-1]
    assert list(last["sources"]) == ["books", "web", "code"]
    opened = checkpoint.open(run.folder)
    network, rows = Transformer.load(opened), np.concatenate(documents)
    found = {}
    for source, count, first, end in (("books", 6, 0, 35), ("web", 3, 36, 53), ("code", 1, 54, 58)):
        # Of rows within a document all are alike but for where BOS and EOS stand: their losses are near each other.
        losses_ = []
        for row in range(first, end):
            ids = torch.from_numpy(rows[row * 16 : row * 16 + 17])
            logits = network(ids[None, :-1])[0]
            losses_.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
        assert min(losses_) <= last["sources"][source] <= max(losses_)
        found[source] = count
    mean = sum(last["sources"][source] * count for source, count in found.items()) / 10
    assert last["validation"] == pytest.approx(mean, rel=1e-6)
    card = (run.folder / "card.md").read_text()
    assert f"| validation: web | {last['sources']['web']:.4g} |" in card


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_the_processors(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(Processes, "bf16", bf16)
    settings = asked("steps=1", "optimizer.warmup=1").model_dump(mode="json", exclude={"precision"}, exclude_unset=True)
    run = pretrain(PretrainRecipe.model_validate(settings), tmp_path / "run")
    assert run.recipe["precision"] == precision


def test_samples_follow_no_link_and_end_no_run(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").symlink_to(tmp_path / "private")
    reporter = Stop(-1)
    settings = ("samples.prompts=['a']", "samples.tokens=1", "save.every=8")
    pretrain(asked(*settings), tmp_path / "run", sample=lambda *_: ["ab"], reporter=reporter)
    assert (tmp_path / "private").read_text() == "mine"
    assert len(reporter.notes) == 1
    assert "samples.jsonl: cannot be written" in reporter.notes[0]


def test_samples_that_fail_end_no_run(asked: Any, tmp_path: Path) -> None:
    def sample(*_: Any) -> list[str]:
        raise ValueError("no\nroom")

    reporter = Stop(-1)
    run = pretrain(
        asked("samples.prompts=['a']", "samples.tokens=1"), tmp_path / "run", sample=sample, reporter=reporter
    )
    assert run.metrics()[-1]["step"] == 8
    assert reporter.notes == [f"step {step}: no samples (no room); the run continues" for step in (3, 6, 8)]
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").open()]
    assert lines[0] == {"step": 3, "note": "no room"}


def test_without_a_compiler_it_continues(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pretrain(asked("steps=2"), tmp_path / "plain")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": ("no-compiler",)}):  # monkeypatch would leave no setting
        run = pretrain(asked("steps=2", "compile=true"), tmp_path / "run")
    assert losses(run) == losses(plain)
    notes = [line["note"] for line in run.metrics() if "note" in line]
    assert len(notes) == 1
    assert notes[0].startswith("continues without compile, which failed (")


def test_a_corpus_that_was_changed_is_refused(asked: Any, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tokens = copy / "train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(DataError, match="has another SHA-256 than the manifest says"):
        pretrain(asked(f"data.corpus={copy}"), tmp_path / "run")
    tokens.write_bytes((corpus / tokens.name).read_bytes())
    (copy / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match=r"tokenizer.model: has another SHA-256"):
        pretrain(asked(f"data.corpus={copy}"), tmp_path / "run")
