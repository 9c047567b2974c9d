"""Pretraining on a folder of documents, and from a model that is there."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama2 import checkpoint, recipe
from llama2.convert.conversion import convert
from llama2.data.shards import Shards
from llama2.errors import DataError, RecipeError, RunError
from llama2.train.loop import StepReport
from llama2.train.pretrain import pretrain
from llama2.train.settings import PretrainRecipe

RECIPE = """
steps = 2
seed = 3
compile = false
precision = "fp32"
model = { dim = 32, n_layers = 2, n_heads = 2, hidden_dim = 32 }
data = { recipe = "data.toml", length = 16, validation = 3 }
batch = { size = 4, micro_size = 2 }
optimizer = { lr = 1e-3, warmup = 2 }
save = { every = 2, keep_last = 2 }
"""
DATA = """
output = "corpora/some"
dir = "stdlib"
[tokenizer]
vocabulary = 400
[sources.text]
files = ["json/*.py"]
[executor]
tasks = 1
workers = 1
"""
WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in ("", "n", "r", "st", "ld")]


class Recorder:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.header: list[str] = []

    def begin(self, header: Sequence[str]) -> None:
        self.header += header

    def step(self, report: StepReport) -> None:
        pass

    def note(self, note: str) -> None:
        self.header.append(note)

    def one(self, part: str) -> str:
        """The only fact with this part."""
        [fact] = [fact for fact in self.header if part in fact]
        return fact


pytestmark = pytest.mark.usefixtures("one_thread", "one_measurement", "quick_logs", "no_plots")


def texts(folder: Path, count: int, words: int = 400, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number in range(count):
        lines = [" ".join(draw.choices(WORDS, k=10)) for _ in range(words // 10)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def prepare(folder: Path) -> None:
    """Recipes, and documents in `mine`."""
    (folder / "tiny.toml").write_text(RECIPE)
    (folder / "data.toml").write_text(DATA)
    texts(folder / "mine", 3)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


def asked(*overrides: str) -> PretrainRecipe:
    return recipe.load(Path("tiny.toml"), PretrainRecipe, overrides)


def test_a_folder_becomes_a_runs_corpus(place: Path) -> None:
    reporter = Recorder()
    run = pretrain(asked("data.dir=mine"), place / "runs/a", reporter=reporter)
    assert run.metrics()[-1]["step"] == 2
    manifest = json.loads((place / "runs/a/corpus/manifest.json").read_bytes())
    assert list(manifest["sources"]) == ["documents"]
    assert manifest["tokenizer"]["vocabulary"] == 400
    assert not (place / "corpora").exists()


def test_a_recipe_without_a_folder_of_its_own_keeps_its_sources(place: Path) -> None:
    (place / "data.toml").write_text(DATA.replace('dir = "stdlib"\n', "").replace("json/*.py", "[01].txt"))
    pretrain(asked("data.dir=mine"), place / "runs/a")
    manifest = json.loads((place / "runs/a/corpus/manifest.json").read_bytes())
    assert manifest["sources"]["text"]["train"]["documents"] == 2


def test_the_runs_in_a_folder_are_none_of_its_documents(place: Path) -> None:
    texts(place / "mine/runs/old", 2, seed=1)
    pretrain(asked("data.dir=mine"), place / "mine/runs/a")
    origin = json.loads((place / "mine/runs/a/corpus/origin.json").read_bytes())
    assert list(origin["files"]["documents"]) == ["0.txt", "1.txt", "2.txt"]


def test_a_run_goes_on_with_its_corpus_whatever_became_of_the_folder(place: Path) -> None:
    pretrain(asked("data.dir=mine"), place / "runs/a")
    corpus = (place / "runs/a/corpus/manifest.json").read_bytes()
    texts(place / "mine", 5, seed=2)
    with pytest.raises(RunError, match="holds a run already"):
        pretrain(asked("data.dir=mine"), place / "runs/a")
    pretrain(asked("data.dir=mine"), place / "runs/a", resume=True)
    assert (place / "runs/a/corpus/manifest.json").read_bytes() == corpus
    (place / "runs/a/run.json").unlink()  # another run, in a folder with a corpus
    reporter = Recorder()
    pretrain(asked("data.dir=mine"), place / "runs/a", reporter=reporter)
    assert "corpus: is built again, because documents: 2 files are new (3.txt, …)" in reporter.one("built again")
    assert (place / "runs/a/corpus/manifest.json").read_bytes() != corpus


def test_a_corpus_that_others_use_is_not_replaced(place: Path) -> None:
    pretrain(asked(), place / "runs/a")
    before = (place / "corpora/some/manifest.json").read_bytes()
    pretrain(asked(), place / "runs/b")
    (place / "data.toml").write_text(DATA.replace("400", "410"))
    with pytest.raises(DataError) as caught:
        pretrain(asked(), place / "runs/c")
    assert "some: was built from something else: tokenizer.vocabulary was 400, and is 410; build it anew" in str(
        caught.value
    )
    assert (place / "corpora/some/manifest.json").read_bytes() == before


def test_too_little_to_hold_out_a_row_is_said_before_the_build(place: Path) -> None:
    (place / "few").mkdir()
    (place / "few/a.txt").write_text("A few words, no more than that. " * 4)
    with pytest.raises(RecipeError, match=r"few: 128 bytes of documents are too few to hold out a row of 16 tokens"):
        pretrain(asked("data.dir=few"), place / "runs/a")
    assert not (place / "runs/a/corpus").exists()


def test_many_repetitions_are_reported(place: Path) -> None:
    reporter = Recorder()
    pretrain(
        asked("data.dir=mine", "steps=2", "batch.size=400", "batch.micro_size=400"),
        place / "runs/a",
        reporter=reporter,
    )
    assert "times; fewer steps, or more text" in reporter.one("each text is read")


@pytest.fixture(scope="module")
def trained(quick_logs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder of its own, which no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain(asked("data.dir=mine"), folder / "runs/base")
    return folder / "runs/base"


@pytest.fixture
def base(place: Path, trained: Path) -> Path:
    """A run to continue from: a copy of its own for each test."""
    shutil.copytree(trained, place / "runs/base")
    return place / "runs/base"


@pytest.mark.parametrize("kind", ["run", "folder", "gguf"])
def test_training_goes_on_from_a_model(place: Path, base: Path, kind: str) -> None:
    model = checkpoint.open(base).path
    start = {"run": base, "folder": model, "gguf": place / "model.gguf"}[kind]
    if kind == "gguf":
        convert(model, start, "gguf", format="Q8_0")
    texts(place / "other", 4, seed=9)
    reporter = Recorder()
    settings = ("data.dir=other", f"start={start}", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    run = pretrain(asked(*settings), place / "runs/next", reporter=reporter)
    assert run.recipe["start"] == str(start)
    assert "warms up again, to 1e-30 in 2 steps" in reporter.one("continues from")
    with checkpoint.open(start) as before, checkpoint.open(run.folder) as after:
        assert replace(after.config, norm_eps=1e-5) == replace(before.config, norm_eps=1e-5)
        assert after.config.norm_eps == pytest.approx(before.config.norm_eps)
        assert after.tokenizer.encode("bast feld") == before.tokenizer.encode("bast feld")
        for name, tensor in before.tensors.items():  # so small a rate changes nothing that bfloat16 or Q8_0 shows
            np.testing.assert_allclose(after.tensors[name].dequantize(), tensor.dequantize(), atol=1e-6)
        shards = Shards.open(run.folder / "corpus", "train")
        ids = shards.read(0, int(shards.starts(1, shards.tokens)[0])).tolist()
        begin = [before.tokenizer.bos_id] * before.tokenizer.add_bos
        text = before.tokenizer.decode(ids[len(begin) : -1])
        assert ids == [*begin, *before.tokenizer.encode(text), before.tokenizer.eos_id]
        assert any(path.read_text().startswith(text) for path in (place / "other").iterdir())


def test_a_corpus_of_the_models_own_tokens(place: Path, base: Path) -> None:
    pretrain(asked(), place / "runs/other")
    settings = asked().model_dump(mode="json", exclude={"data", "start"})

    def continue_on(corpus: str) -> None:
        data = {"corpus": corpus, "length": 16, "validation": 3}
        pretrain(PretrainRecipe.model_validate({**settings, "start": str(base), "data": data}), place / "runs/next")

    with pytest.raises(DataError, match=r"corpora/some: does not have the tokens of .*; give data.dir or data.recipe"):
        continue_on("corpora/some")
    continue_on(str(base / "corpus"))


def test_rows_longer_than_the_model_reads(place: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.length=32 is more than .* reads, 16; choose shorter rows"):
        pretrain(asked("data.dir=mine", f"start={base}", "data.length=32"), place / "runs/next")


def test_a_run_that_went_on_from_a_model_is_resumed(place: Path, base: Path) -> None:
    settings = ("data.dir=mine", f"start={base}", "steps=4", "save.every=2")
    whole = pretrain(asked(*settings), place / "runs/whole")

    class Stopped(BaseException):
        pass

    class Stop(Recorder):
        def step(self, report: StepReport) -> None:
            if report.step == 3:
                raise Stopped

    with pytest.raises(Stopped):
        pretrain(asked(*settings), place / "runs/parts", reporter=Stop())
    parts = pretrain(asked(*settings), place / "runs/parts", resume=True)
    losses = [[line["loss"] for line in run.metrics()] for run in (whole, parts)]
    assert losses[0] == losses[1]
