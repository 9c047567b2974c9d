"""`llama2 rounds` on tiny models: every stage, the lineage, stops in each of them, and what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import llama2
from commands import typed
from llama2.align import distillation, gatt, ppo, rejection, rounds
from llama2.align.lineage import Lineage
from llama2.cli.main import run
from llama2.errors import RunError
from llama2.train import sft
from models import tiny_config, write_tiny_gguf
from reward_models import write_reward_model

FILES = {
    "rounds.toml": """
start = "tiny.gguf"
sft = "sft.toml"
reject = "reject.toml"
gatt = "gatt.toml"
distil = "distil.toml"
ppo = "ppo.toml"
[rounds.v1]
[rounds.v2]
gatt = true
distil = true
ppo = true
""",
    "sft.toml": 'start = "other"\nprecision = "fp32"\ncompile = false\nsteps = 3\n[data]\nfiles = ["dialogs.jsonl"]\n'
    "length = 256\nvalidation = 0\n[batch]\nsize = 2\nmicro_size = 2\n[optimizer]\nlr = 1e-3\n[save]\nevery = 2\n",
    "reject.toml": 'samples = 2\ntemperature = 1.0\nmax_tokens = 6\n'
    'cut = "keep"\nplots = false\n[models]\nx = "other"\n'
    '[prompts]\nfiles = ["prompts.jsonl"]\nheld_out = 3\n[rewards]\nhelpful = "helpful"\nsafety = "safety"\n',
    "gatt.toml": 'model = "other"\ndialogs = 3\nmax_turns = 2\nsamples = 2\nmax_tokens = 6\ncut = "keep"\n[prompts]\n'
    'files = ["prompts.jsonl"]\n[instructions]\nverifiable = ["no comma"]\nterse = 0.0\n',
    "distil.toml": 'model = "other"\nsamples = 1\nmax_tokens = 6\ncut = "keep"\ngate = false\n'
    'generic = ["Be {adjective}."]\nplace = "user"\n'
    '[prompts]\nsafety_files = ["risky.jsonl"]\n[rewards]\nsafety = "safety"\n',
    "ppo.toml": 'start = "other"\nprecision = "fp32"\niterations = 2\nrollouts = 4\nmax_tokens = 6\n[prompts]\n'
    'files = ["prompts.jsonl"]\n[rewards]\nhelpful = "helpful"\n'
    '[batch]\nsize = 2\n[optimizer]\nlr = 1e-3\n[save]\nevery = 2\n',
}  # fmt: skip

STAGES = [
    "sft",
    "v1/reject",
    "v1/tune",
    "v1/measure",
    "v2/reject",
    "v2/gatt",
    "v2/distil",
    "v2/tune",
    "v2/ppo",
    "v2/measure",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "tiny.gguf", config=tiny_config())
    for seed, name in enumerate(("helpful", "safety")):
        write_reward_model(folder / "tiny.gguf", folder / name, seed)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A working folder. Answers that were cut may be chosen, since a tiny model does not end its own."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(7)))
    (tmp_path / "risky.jsonl").write_text("".join(json.dumps({"prompt": f"risk {i}"}) + "\n" for i in range(2)))
    dialogs = [{"prompt": f"say {word}", "completion": word} for word in ("bat", "tea", "oar")]
    (tmp_path / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
    return tmp_path


def lineage(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "lineage.json").read_text())["stages"]
    return found


def test_data_that_no_stage_left_so_are_refused(tmp_path: Path) -> None:
    """Also where every hash was computed again."""
    best = tmp_path / "v1/best.jsonl"
    best.parent.mkdir()
    best.write_text("{}\n")
    for read in (sha256(b"{}\n").hexdigest(), sha256(b"other\n").hexdigest()):
        lineage = Lineage(tmp_path)
        lineage.add("v1/reject", {}, {}, [best], {})
        lineage.add("v1/tune", {"data v1/best.jsonl": read}, {}, [], {})
        if read == lineage.stages[0]["outputs"]["v1/best.jsonl"]:
            assert rounds.verify(tmp_path) == ["v1/reject: 0 inputs, 1 outputs", "v1/tune: 1 inputs, 0 outputs"]
    with pytest.raises(RunError, match=r"stage v1/tune read v1/best\.jsonl, which no stage left so"):
        rounds.verify(tmp_path)


def test_rounds_from_the_base_with_a_lineage(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = typed(capsys, "rounds", "rounds.toml", "--out", "r")
    assert code == 0, error
    assert "estimate: 10 stages, of which 0 are done" in error
    stages = lineage(place / "r")
    assert [stage["name"] for stage in stages] == STAGES
    by_name = {stage["name"]: stage for stage in stages}
    # Each round's tuning begins with the base; its policy is the model of the round before.
    assert (
        by_name["v1/tune"]["inputs"]["base"] == by_name["v2/tune"]["inputs"]["base"] == by_name["sft"]["inputs"]["base"]
    )
    assert by_name["v1/reject"]["inputs"]["policy"] != by_name["v2/reject"]["inputs"]["policy"]
    assert by_name["v2/reject"]["inputs"]["policy"] == by_name["v1/measure"]["inputs"]["model"]
    assert by_name["v2/ppo"]["inputs"]["start"] != by_name["v2/measure"]["inputs"]["model"]
    data = {name for name in by_name["v2/tune"]["inputs"] if name.startswith("data ")}
    assert data == {"data v2/best/best.jsonl", "data v2/gatt/gatt.jsonl", "data v2/distilled/distilled.jsonl"}
    samples = [json.loads(line) for line in (place / "r/samples/samples.jsonl").read_text().splitlines()]
    assert [s["round"] for s in samples] == ["v1"] * 8 + ["v2"] * 8
    scores = json.loads((place / "r/v2/scores.json").read_text())
    assert {"helpful", "safety", "combined", "tokens", "cut", "unsafe"} == {*scores}
    assert scores["helpful"]["low"] <= scores["helpful"]["mean"] <= scores["helpful"]["high"]
    assert out.splitlines()[0].startswith("v1: helpful ")
    with llama2.load("r/v2/model") as model:
        assert model.chat("say tea", max_tokens=2).token_ids
    code, out, error = typed(capsys, "rounds", "--verify", "--out", "r")
    assert code == 0, error
    assert out.splitlines()[-1] == "r: the chain holds"
    assert len(out.splitlines()) == 11

    # Nothing is done twice.
    before = (place / "r/lineage.json").read_bytes()
    code, out, error = typed(capsys, "rounds", "rounds.toml", "--out", "r")
    assert code == 0
    assert "stage sft" not in error
    assert (place / "r/lineage.json").read_bytes() == before
    _refuses_what_was_changed(place, capsys)


def _refuses_what_was_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte of any output, of the data, or of the chain; a setting; a model: one line, before any step."""

    def refused(path: str, change: Callable[[str], str], message: str, *words: str) -> None:
        before = (place / path).read_text()
        (place / path).write_text(change(before))
        code, out, error = typed(capsys, "rounds", *(words or ("rounds.toml",)), "--out", "r")
        assert (code, out, len(error.splitlines())) == (1, "", 1 if message.startswith("r/") or words else 2)
        assert message in error.splitlines()[-1]
        (place / path).write_text(before)

    refused(
        "r/v1/best/best.jsonl", lambda t: t.replace("question", "Question"), "r/v1/best/best.jsonl: was changed after"
    )
    refused("r/v2/gatt/gatt.jsonl", lambda t: t + " ", "r/v2/gatt/gatt.jsonl: was changed", "--verify")
    refused("r/lineage.json", lambda t: t.replace('"train": ', '"train": 1', 1), "does not follow", "--verify")
    refused("dialogs.jsonl", lambda t: t.replace("tea", "sea"), "stage sft is done, and its input file dialogs.jsonl")
    refused(
        "prompts.jsonl", lambda t: t.replace("question 1", "q"), "stage v1/reject is done, and its input file prompts"
    )
    refused(
        "sft.toml", lambda t: t.replace("steps = 3", "steps = 4"), "stage sft is done, and its setting steps is another"
    )
    moved = place / "r/v2/model/model.safetensors"
    moved.rename(place / "away")
    code, _, error = typed(capsys, "rounds", "--verify", "--out", "r")
    assert code == 1
    assert "r/v2/model/model.safetensors: stage v2/tune left it, and it is missing" in error
    (place / "away").rename(moved)


def test_rounds_that_are_stopped_in_every_stage_leave_the_same_files(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(capsys, "rounds", "rounds.toml", "--out", "whole")[0] == 0
    whole = lineage(place / "whole")

    class StoppedError(BaseException):
        """As a kill, nothing catches it."""

    works = (
        (sft, "sft"),
        (rejection, "reject"),
        (gatt, "gatt"),
        (distillation, "distil"),
        (ppo, "ppo"),
        (rounds, "measured"),
    )
    for module, name in works:
        real = getattr(module, name)

        def stopped(*given: Any, real: Any = real, **options: Any) -> Any:
            real(*given, **options)  # all is done, but it is not recorded
            raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopped)
            patch.chdir(place)
            with pytest.raises(StoppedError):
                run(["rounds", "rounds.toml", "--out", "again"])
        capsys.readouterr()
    code, _, error = typed(capsys, "rounds", "rounds.toml", "--out", "again")
    assert code == 0, error
    assert lineage(place / "again") == whole  # files, scores and chain
