"""The loop of training: what it leaves behind, how it goes on after an end, and what it does when things go wrong."""

from __future__ import annotations

import io
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

import corpora
from llama2 import checkpoint, recipe
from llama2.config import SIZES
from llama2.engine.runner import Batch as EngineBatch
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import DataError, Llama2Error, RecipeError, RunError
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.train.loop import Line, flops_per_token, is_spike
from llama2.train.pretrain import pretrain
from llama2.train.schedule import learning_rate
from llama2.train.settings import PretrainRecipe, Spikes

TEXT = "the cat sat on the mat and the dog sat on the log. " * 3
RECIPE = """
steps = 8
seed = 3
compile = false
precision = "fp32"
evaluate = 4
model = { dim = 16, n_layers = 2, n_heads = 2, hidden_dim = 32 }
data = { corpus = "CORPUS", length = 16, validation = 3 }
batch = { rows = 4, micro = 2 }
optimizer = { rate = 1e-2, warmup = 2 }
save = { every = 3, keep = 2 }
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a network gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def asked(corpus: Path, tmp_path: Path) -> Callable[..., PretrainRecipe]:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace("CORPUS", str(corpus)))
    return lambda *overrides: recipe.load(path, PretrainRecipe, overrides)


class Stopped(BaseException):
    """As a process is that somebody ends."""


class Stop:
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.facts: list[str] = []

    def begin(self, facts: Sequence[str]) -> None:
        self.facts += facts

    def line(self, line: Line) -> None:
        if line.step == self.step:
            raise Stopped


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


def test_what_a_spike_is() -> None:
    before = [3.0, 5.0, 3.0, 5.0]  # mean 4, deviation 1
    rule = Spikes(window=4, deviations=2, least=0.5)
    assert not is_spike(6.0, before, rule)
    assert is_spike(6.01, before, rule)
    assert not is_spike(99.0, before[1:], rule)
    rule = Spikes(window=4, deviations=2, least=3)
    assert not is_spike(7.0, before, rule)
    assert is_spike(7.01, before, rule)


def test_a_run_leaves_all_that_there_is_to_know(asked: Any, tmp_path: Path) -> None:
    watch = Stop(-1)
    samples: list[tuple[Path, list[str], int]] = []

    def sample(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
        samples.append((model, list(prompts), tokens))
        return [f"{prompt} sat" for prompt in prompts]

    overrides = ("samples.prompts=['the cat']", "samples.tokens=5", "watts=100")
    run = pretrain(asked(*overrides), tmp_path / "run", sample=sample, watch=watch)
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["tokens"] == line["step"] * 4 * 16 for line in lines)
    assert lines[0]["loss"] == pytest.approx(np.log(290), rel=0.02)  # as of a uniform guess
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert [line["step"] for line in lines if "validation" in line] == [4, 8]
    assert lines[-1]["rate"] == pytest.approx(1e-3)
    assert lines[-1]["tCO2eq"] == pytest.approx(lines[-1]["MWh"] * 1.1 * 0.385)
    about = run.origin
    assert about["seed"] == 3
    assert about["devices"] == 1
    assert {"command", "commit", "versions", "hardware", "date"} <= about.keys()
    assert run.recipe["optimizer"]["clip"] == 1.0  # what was not said, too
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert [step["step"] for step in map(json.loads, (run.folder / "samples.jsonl").open())] == [3, 6, 8]
    assert samples[-1] == (run.folder / "checkpoints/step-00000008/model", ["the cat"], 5)
    assert list((run.folder / "tensorboard").glob("events*"))
    assert "MFU = " in watch.facts[1]


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
def test_a_run_that_ended_goes_on_as_if_it_had_not(asked: Any, tmp_path: Path, end: int, precision: str) -> None:
    recipe = asked(f"precision={precision}")
    whole = pretrain(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(recipe, tmp_path / "parts", watch=Stop(end))
    parts = pretrain(recipe, tmp_path / "parts", resume=True)
    assert losses(parts) == losses(whole)
    assert [line.get("validation") for line in parts.metrics()] == [line.get("validation") for line in whole.metrics()]
    same = [(run.folder / "checkpoints/step-00000008/model/model.safetensors").read_bytes() for run in (parts, whole)]
    assert same[0] == same[1]


def test_a_state_that_was_cut_off_is_never_taken(asked: Any, tmp_path: Path) -> None:
    whole = pretrain(asked(), tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(asked(), tmp_path / "parts", watch=Stop(7))
    part = tmp_path / "parts/checkpoints/step-00000009.part"
    part.mkdir()
    (part / ".metadata").write_bytes(b"half")
    assert checkpoint.open(tmp_path / "parts").path.parent.name == "step-00000006"
    assert losses(pretrain(asked(), tmp_path / "parts", resume=True)) == losses(whole)
    assert not part.exists()


def test_a_damaged_state_is_named(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain(asked(), tmp_path / "run", watch=Stop(7))
    [data] = (tmp_path / "run/checkpoints/step-00000006").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"step-00000006: cannot be read \(.*\); remove it, and the run continues"):
        pretrain(asked(), tmp_path / "run", resume=True)


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
        self.first, self.last = first, last
        self.full = small_files(30_000)
        self.notes: list[str] = []

    def line(self, line: Line) -> None:
        self.notes += [line.note] if line.note else []
        if line.step == self.first:
            while not list(self.run.glob("checkpoints/step-00000003*/.metadata")):
                time.sleep(0.01)
            self.full.__enter__()
        if line.step == self.last:
            self.full.__exit__(None, None, None)


def test_a_full_disk_costs_a_state_and_no_more(asked: Any, tmp_path: Path) -> None:
    whole = pretrain(asked(), tmp_path / "whole")
    watch = Full(tmp_path / "run", 5, 7)
    run = pretrain(asked(), tmp_path / "run", watch=watch)
    assert losses(run) == losses(whole)
    assert [note for note in watch.notes if "step-00000006: cannot be saved (" in note]
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000008"]


def test_a_disk_that_is_full_at_the_end_is_an_error(asked: Any, tmp_path: Path) -> None:
    watch = Full(tmp_path / "run", 7, -1)
    try:
        with pytest.raises(RunError, match=r"step-00000008: cannot be saved \(.*and continue with --resume"):
            pretrain(asked(), tmp_path / "run", watch=watch)
    finally:
        watch.full.__exit__(None, None, None)
    assert pretrain(asked(), tmp_path / "run", resume=True).metrics()[-1]["step"] == 8


def test_a_spike_is_rewound_and_its_rows_left_out(asked: Any, tmp_path: Path) -> None:
    rule = ("spikes.window=2", "spikes.deviations=1e-9", "spikes.least=1e-9", "spikes.rewinds=5", "steps=60")
    with pytest.raises(RunError, match="after 5 times that the run went back and on"):
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
        pretrain(asked("optimizer.rate=1e30", "optimizer.warmup=0"), tmp_path / "run")
    assert [line["note"] for line in Run(tmp_path / "run").metrics() if "note" in line]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["optimizer.learning_rate=1"], RecipeError, "optimizer.learning_rate: unknown setting; "),
        (["steps=0"], RecipeError, "steps: Input should be greater than or equal to 1"),
        (["batch.rows=5"], RecipeError, "batch.rows=5 is no multiple of batch.micro=2 rows on each of 1 processes"),
        (["model.dim=15"], Llama2Error, "head_dim=7 must be even"),
        (["model.size=7B"], RecipeError, "has size and also dim"),
        (["data.corpus=nowhere"], DataError, "nowhere: is no corpus"),
        (["data.length=100000"], DataError, "too few for a row of 100000"),
        (["data.recipe=some.toml"], RecipeError, "needs a corpus, or a recipe to build one by, and not both"),
        (["mesh.tensor=2"], RunError, "mesh.tensor=2 does not divide 1 processes"),
    ],
)
def test_what_is_wrong_is_said_before_any_step(
    asked: Any, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as told:
        pretrain(asked(*overrides), tmp_path / "run")
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_is_neither_overwritten_nor_continued_as_another(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        pretrain(asked(), tmp_path / "run", resume=True)
    with pytest.raises(Stopped):
        pretrain(asked(), tmp_path / "run", watch=Stop(4))
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        pretrain(asked(), tmp_path / "run")
    with pytest.raises(RunError, match=r"was begun with seed = 3, and the recipe says 4"):
        pretrain(asked("seed=4"), tmp_path / "run", resume=True)


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
