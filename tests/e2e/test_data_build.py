"""`llama2 data build` and `llama2 tokenizer train` as a person uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from commands import typed
from llama2.data.shards import Shards

RECIPE = """
output = "corpus"
dir = "texts"
validation = 0.3
[tokenizer]
vocabulary = 300
[sources.notes]
files = ["**/*.txt"]
[sources.pages]
files = ["*.jsonl"]
[dedup]
near = false
[executor]
tasks = 2
workers = 1
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and ten texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "texts" / "deep" / f"{i}.txt").write_text(f"Note {i}: the quick brown fox jumps over the dog.\n")
    lines = [json.dumps({"text": f"Page {i} says that all is well, and then again: well.", "id": i}) for i in range(4)]
    (tmp_path / "texts" / "pages.jsonl").write_text("\n".join(lines))
    return tmp_path


def texts(split: str, corpus: str = "corpus") -> list[str]:
    """What the tokens of a split say, in sentencepiece's own reading."""
    opened = Shards.open(Path(corpus), split)  # type: ignore[arg-type]
    library = SentencePieceProcessor(model_file=str(opened.tokenizer))
    ids = opened.read(0, opened.tokens).tolist()
    bounds = [*opened.starts(0, opened.tokens).tolist(), opened.tokens]
    documents = [ids[start:stop] for start, stop in pairwise(bounds)]
    assert all(document[0] == 1 and document[-1] == 2 for document in documents)
    return [library.decode(document) for document in documents]


def test_every_document_is_in_one_split(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = typed(capsys, "data", "build", "recipe.toml", "--json")
    assert (code, err) == (0, "")
    expected = [path.read_text() for path in sorted(place.glob("texts/deep/*.txt"))]
    expected += [json.loads(line)["text"] for line in (place / "texts/pages.jsonl").read_text().split("\n")]
    train, validation = texts("train"), texts("validation")
    assert sorted(train + validation) == sorted(expected)
    assert len(validation) in range(1, 6)
    manifest = json.loads(out)
    assert manifest == json.loads((place / "corpus/manifest.json").read_bytes())
    assert sum(manifest["sources"]["pages"][split]["documents"] for split in ("train", "validation")) == 4
    assert not (place / "corpus/work").exists()
    assert Shards.open(place / "corpus", "train").load_tokenizer().encode("the") == SentencePieceProcessor(
        model_file="corpus/tokenizer.model"
    ).encode("the")


def test_the_same_recipe_gives_the_same_bytes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "data", "build", "recipe.toml")
    assert typed(capsys, "data", "build", "recipe.toml", "output=again", "executor.workers=2")[0] == 0
    assert (place / "corpus/manifest.json").read_bytes() == (place / "again/manifest.json").read_bytes()


def test_a_corpus_is_replaced_only_when_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "data", "build", "recipe.toml")
    before = (place / "corpus/manifest.json").read_bytes()
    code, _, err = typed(capsys, "data", "build", "recipe.toml", "validation=0.9")
    assert code == 1
    assert "corpus: holds a corpus already" in err
    assert (place / "corpus/manifest.json").read_bytes() == before
    assert typed(capsys, "data", "build", "recipe.toml", "validation=0.9", "--force")[0] == 0
    assert (place / "corpus/manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["sources.notes.fiels=[]"],
            "recipe.toml: sources.notes.fiels: unknown setting; did you mean sources.notes.files?",
        ),
        (["sources.pages.files=['*.json']"], "sources.pages: no file in texts matches *.json"),
        (["dir=none"], "sources.notes: no file in none matches **/*.txt"),
        (["tokenizer.file=a"], "tokenizer: Value error, needs either file or vocabulary"),
        (["tokenizer={file='none.model'}"], "none.model: No such file"),
        (["tokenizer.vocabulary=30000"], "no vocabulary of 30000 tokens can be learnt from 8 lines"),
        (["executor.kind='slurm'"], "executor: Value error, Slurm needs a partition"),
        (["executor.kind='ray'"], "executor.kind: Ray is not installed"),
        (["sources.notes.languages=['de']"], "sources.notes: none of its documents was kept (6 read, "),
        (
            ["decontamination.benchmarks.b={files=['none']}"],
            "decontamination.benchmarks.b: no file matches none; mend files",
        ),
        (["sources.notes.weight=1"], "sources.pages.weight: is missing; give every source a weight, or none"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    code, out, err = typed(capsys, "data", "build", "recipe.toml", *settings)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "corpus/manifest.json").exists()


def test_building_needs_no_torch(place: Path) -> None:
    program = """
import sys
from llama2.cli.main import run
try:
    run(["data", "build", "recipe.toml"])
finally:
    print("torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_a_library_that_is_not_installed(place: Path) -> None:
    program = """
import sys
from llama2.cli.main import run
sys.modules["datatrove"] = None
run(["data", "build", "recipe.toml"])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        "llama2: error: this command needs datatrove, which is not installed; "
        "`pip install 'whole-llama[train]'` brings it\n"
    )


def test_train_a_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(place.glob("texts/deep/*.txt"))]
    code, out, err = typed(capsys, "tokenizer", "train", *files, "--vocabulary", "300", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"path": "tokenizer.model", "vocabulary": 300, "lines": 6, "lines_too_long": 0}
    assert SentencePieceProcessor(model_file="tokenizer.model").get_piece_size() == 300
    code, _, err = typed(capsys, "tokenizer", "train", *files)
    assert code == 1
    assert "tokenizer.model: is there already" in err
    code, _, err = typed(capsys, "data", "build", "recipe.toml", "tokenizer={file='tokenizer.model'}")
    assert (code, err) == (0, "")
    assert Path("corpus/tokenizer.model").read_bytes() == Path("tokenizer.model").read_bytes()


def test_slurm_is_given_each_stage_after_the_one_before(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_ = place / "bin"
    bin_.mkdir()
    program = bin_ / "sbatch"
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"jobs = pathlib.Path({str(place / 'jobs')!r})\n"
        "script = [pathlib.Path(word).read_text() for word in sys.argv[1:] if not word.startswith('--')][0]\n"
        "name = [line for line in script.split('\\n') if '--job-name=' in line][0].partition('=')[2]\n"
        "after = [word for word in sys.argv if word.startswith('--dependency=')]\n"
        "number = jobs.read_text().count('\\n') + 1 if jobs.exists() else 1\n"
        "if 'merge_stats' not in script.split('set -xe')[1]:\n"
        "    with jobs.open('a') as file: print(name, *after, file=file)\n"
        "    print('Submitted batch job', number)\n"
        "else: print('Submitted batch job', 99)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_), prepend=":")
    code, out, _ = typed(capsys, "data", "build", "recipe.toml", "executor={kind='slurm', partition='cpu', tasks=3}")
    assert code == 0
    assert "is being built by slurm" in out
    assert (place / "jobs").read_text().splitlines() == [
        "llama2-data-clean",
        "llama2-data-pair --dependency=afterok:1",
        "llama2-data-cluster --dependency=afterok:2",
        "llama2-data-learn --dependency=afterok:3",
        "llama2-data-tokenise --dependency=afterok:4",
        "llama2-data-mix --dependency=afterok:5",
        "llama2-data-finish --dependency=afterok:6",
    ]
