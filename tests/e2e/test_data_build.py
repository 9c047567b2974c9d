"""`llama2 data build` and `llama2 tokenizer train` as a person uses them."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentencepiece import SentencePieceProcessor

from commands import typed
from llama2.data.shards import Shards
from texts import train_sentencepiece

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

pytestmark = pytest.mark.usefixtures("quick_logs")


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


@pytest.mark.usefixtures("no_plots")
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


@pytest.mark.usefixtures("no_plots")
def test_a_corpus_is_replaced_only_when_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "data", "build", "recipe.toml")
    before = (place / "corpus/manifest.json").read_bytes()
    code, out, err = typed(capsys, "data", "build", "recipe.toml")
    assert (code, err) == (0, "llama2: corpus: is there already, and nothing that it was built from has changed\n")
    assert "corpus: train: " in out
    code, _, err = typed(capsys, "data", "build", "recipe.toml", "validation=0.9")
    assert code == 1
    assert "corpus: holds a corpus already, of something else: validation was 0.3, and is 0.9; replace it" in err
    assert (place / "corpus/manifest.json").read_bytes() == before
    assert typed(capsys, "data", "build", "recipe.toml", "validation=0.9", "--force")[0] == 0
    assert (place / "corpus/manifest.json").read_bytes() != before


@pytest.mark.usefixtures("no_plots")
def test_a_corpus_knows_what_it_was_built_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "data", "build", "recipe.toml")
    before = (place / "corpus/manifest.json").read_bytes()

    def differs(*settings: str) -> str:
        code, _, err = typed(capsys, "data", "build", "recipe.toml", *settings)
        assert code == 1
        assert (place / "corpus/manifest.json").read_bytes() == before
        return err.partition("of something else: ")[2].partition("; replace it")[0]

    assert differs("tokenizer.vocabulary=310") == "tokenizer.vocabulary was 300, and is 310"
    assert differs("sources.notes.quality=true") == "sources.notes.quality was false, and is true"
    (place / "texts/deep/new.txt").write_text("A note that came later.")
    assert differs() == "notes: 1 file is new (deep/new.txt)"
    (place / "texts/deep/0.txt").unlink()
    (place / "texts/deep/1.txt").unlink()
    (place / "texts/pages.jsonl").write_text('{"text": "Another page."}')
    wanted = "notes: 1 file is new (deep/new.txt); notes: 2 files are gone (deep/0.txt, …)"
    assert differs() == f"{wanted}; pages: 1 file is changed (pages.jsonl)"
    (place / "corpus/origin.json").unlink()
    assert differs() == "it does not say what it was built from"
    assert typed(capsys, "data", "build", "recipe.toml", "--force")[0] == 0
    assert typed(capsys, "data", "build", "recipe.toml", "executor.workers=2")[0] == 0


@pytest.mark.usefixtures("no_plots")
def test_a_tokenizer_is_known_by_its_bytes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vocabulary in (400, 410):
        (place / f"{vocabulary}.model").write_bytes(train_sentencepiece(vocabulary, ()))
    (place / "mine.model").write_bytes((place / "400.model").read_bytes())
    given = ("data", "build", "recipe.toml", "tokenizer={file='mine.model'}")
    assert typed(capsys, *given)[0] == 0
    assert typed(capsys, "data", "build", "recipe.toml", "tokenizer={file='400.model'}")[0] == 0
    (place / "mine.model").write_bytes((place / "410.model").read_bytes())
    code, _, err = typed(capsys, *given)
    assert code == 1
    assert "of something else: the tokenizer is another one; replace it" in err


@pytest.mark.usefixtures("no_plots")
def test_a_source_without_files_is_left_out_with_a_note(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = typed(capsys, "data", "build", "recipe.toml", "sources.pages.files=['*.x', '*.y']", "--json")
    assert code == 0
    assert err == "llama2: sources.pages: no file in texts matches *.x, *.y, so it is left out\n"
    assert list(json.loads(out)["sources"]) == ["notes"]


@pytest.mark.usefixtures("no_plots")
def test_any_folder_of_documents(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "mine"
    (folder / "sub/.git").mkdir(parents=True)
    (folder / "a.md").write_text("# One\n\nThe first of these documents is Markdown.\n")
    (folder / "sub/b.html").write_text("<p>The second of these documents is a page.</p>")
    (folder / "sub/c.py").write_text("print('The third of these documents is code.')\n")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"content": "The fourth of these is a line."}'))
    (folder / "e.txt").write_bytes("Der fünfte von diesen Texten wurde früher anders geschrieben.".encode("latin-1"))
    pq.write_table(pa.table({"text": ["The sixth of these is in a table."]}), folder / "f.parquet")
    (folder / "g.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "h.txt").write_bytes("Седьмой".encode("koi8-r"))
    (folder / "sub/.git/config").write_text("nothing of yours")
    code, _, err = typed(capsys, "data", "build", "mine", "dedup.near=false", "validation=0")
    assert code == 0, err
    found = texts("train", "corpora/mine")
    assert len(found) == 6
    for word in ("first", "second", "third", "fourth", "fünfte", "sixth"):
        assert sum(word in text for text in found) == 1
    assert "llama2: sources.documents: 1 converted from windows-1252\n" in err
    assert "sources.documents: left out: 1 no text, 1 not UTF-8; first " in err
    assert " tokens, not 4,096: so little text has no more" in err
    page = (place / "corpora/mine/card/README.md").read_text()
    assert "| documents | g.png | no text |" in page
    assert "| documents | h.txt | not UTF-8: save it as UTF-8 |" in page
    code, _, err = typed(capsys, "data", "build", "mine", "dedup.near=false", "validation=0", "output=mine/corpus")
    assert code == 0
    code, _, err = typed(capsys, "data", "build", "mine", "dedup.near=false", "validation=0", "output=mine/corpus")
    assert "nothing that it was built from has changed" in err  # what it wrote is none of its documents


def test_a_folder_without_documents_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    code, _, err = typed(capsys, "data", "build", "empty")
    assert code == 1
    assert err.startswith("llama2: error: empty: no file in it matches **/*; ")
    (place / "empty/a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    code, _, err = typed(capsys, "data", "build", "empty")
    assert code == 1
    assert "sources.documents: none of its documents was kept (1 no text); fix it, or leave it out" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_plots")
def test_three_books_hold_out_the_end_of_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "books"
    folder.mkdir()
    draw = random.Random(1)
    for number in range(3):
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 8))) for _ in range(40_000)]
        lines = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    assert typed(capsys, "data", "build", "books", "tokenizer.vocabulary=400")[0] == 0
    train, [held] = texts("train", "corpora/books"), texts("validation", "corpora/books")
    assert len(train) == 3
    books = sorted(path.read_text() for path in folder.iterdir())
    assert sorted([*train, held]) != books
    cut = next(text for text in train if f"{text}{held}" in books)
    assert sorted([*(text for text in train if text != cut), cut + held]) == books
    assert (1 << 14) <= len(held) < (1 << 14) + 100  # bytes, up to where the line begins
    assert cut.endswith("\n")


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "train-00000.tokens", "card", "manifest.json.part", "work/0/clean"]
)
def test_no_link_in_the_folder_is_followed(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    victim = place / "victim"
    victim.mkdir() if name == "card" else victim.write_text("precious")
    (place / "corpus" / name).parent.mkdir(parents=True)
    (place / "corpus" / name).symlink_to(victim)
    code, _, err = typed(capsys, "data", "build", "recipe.toml")
    assert code == 1
    assert f"{name}: is not part of a corpus; choose another output folder" in err
    (place / "corpus" / name).unlink()
    (place / "corpus/notes.txt").write_text("mine")
    assert "notes.txt: is not part of a corpus" in typed(capsys, "data", "build", "recipe.toml")[2]
    assert not list(victim.iterdir()) if name == "card" else victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["sources.notes.fiels=[]"],
            "recipe.toml: sources.notes.fiels: unknown setting; did you mean sources.notes.files?",
        ),
        (["sources={a={files=['*.tex', '*.bib']}}"], "texts: no file in it matches *.tex, *.bib; fix the sources'"),
        (["sources.pages={files=['*.x'], weight=1}", "sources.notes.weight=1"], "sources.pages: no file in texts"),
        (["dir=none"], "none: no such folder; give the folder of the documents as dir="),
        (["tokenizer.file=a"], "tokenizer: needs either file or vocabulary"),
        (["tokenizer={file='none.model'}"], "none.model: no such file"),
        (["executor.kind='slurm'"], "executor: Slurm needs a partition"),
        (["executor.kind='ray'"], "executor.kind: Ray is not installed"),
        (["sources.notes.languages=['de']"], "sources.notes: none of its documents was kept (6 read, "),
        (
            ["decontamination.benchmarks.b={files=['none']}"],
            "decontamination.benchmarks.b: no file matches none; fix files",
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
    assert "tokenizer.model: already exists" in err
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
        "llama2-data-hold --dependency=afterok:3",
        "llama2-data-train-tokenizer --dependency=afterok:4",
        "llama2-data-tokenize --dependency=afterok:5",
        "llama2-data-mix --dependency=afterok:6",
        "llama2-data-finish --dependency=afterok:7",
    ]
