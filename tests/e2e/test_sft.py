"""`llama2 sft` as a person uses it: a tiny random model learns two answers by heart, and gives them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.checkpoint import FileSystemReader

import llama2
from commands import typed
from llama2 import checkpoint, hub
from llama2.records import Run
from llama2.train.lock import hold
from llama2.train.processes import Processes
from models import tiny_config, write_tiny_gguf
from oracle_transformers import transformers_model

DIALOGS = [{"prompt": "one", "completion": "bat"}, {"prompt": "two", "completion": "the coin"}]

pytestmark = pytest.mark.usefixtures("one_measurement")

RECIPE = """
start = "tiny.gguf"
precision = "fp32"
compile = false
[data]
files = ["dialogs.jsonl"]
length = 64
[batch]
size = 1
micro_size = 1
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, dialogs and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config())
    (tmp_path / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in DIALOGS))
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path


def loss_of_answers(path: Path, dialogs: Sequence[dict[str, str]] = DIALOGS) -> float:
    """transformers' mean loss over the answers' tokens, each dialog by itself."""
    with checkpoint.open(path) as model:
        theirs, tokenizer = transformers_model(model), model.tokenizer
    losses = []
    for dialog in dialogs:
        asked = tokenizer.encode(f"[INST] {dialog['prompt']} [/INST]", bos=True)
        whole = tokenizer.encode(f"[INST] {dialog['prompt']} [/INST] {dialog['completion']} ", bos=True, eos=True)
        assert whole[: len(asked)] == asked
        with torch.no_grad():
            logits = theirs(torch.tensor([whole])).logits[0]
        losses += F.cross_entropy(logits[:-1], torch.tensor(whole[1:]), reduction="none")[len(asked) - 1 :].tolist()
    return float(np.mean(losses))


def test_learns_answers_by_heart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["steps=60", "optimizer.lr=1e-2", "save.every=30", 'samples.prompts=["one"]', "samples.tokens=8"]
    code, out, error = typed(capsys, "sft", "mine.toml", *settings)
    assert code == 0, error
    assert out.splitlines()[-3:] == [
        "runs/mine: done; talk with it: llama2 chat -m runs/mine",
        "for llama.cpp: llama2 convert runs/mine mine.gguf --to gguf --format Q8_0",
        "for transformers: llama2 convert runs/mine mine-hf --to hf",
    ]
    lines = Run.open(place / "runs" / "mine").metrics()
    assert [line["step"] for line in lines] == list(range(1, 61))
    # Both dialogs are in one row, and yet the loss is that of each alone, over its answer alone.
    assert lines[0]["loss"] == pytest.approx(loss_of_answers(place / "tiny.gguf"), rel=1e-5)
    assert lines[0]["tokens"] == lines[1]["tokens"] / 2
    before, after = (loss_of_answers(place / model) for model in ("tiny.gguf", "runs/mine"))
    found = re.fullmatch(r"loss of answers in dialogs trained on: (\S+) before, (\S+) after", out.splitlines()[0])
    assert found
    assert (float(found[1]), float(found[2])) == (pytest.approx(before, abs=6e-4), pytest.approx(after, abs=6e-4))
    with llama2.load(place / "runs" / "mine") as model:
        for dialog in DIALOGS:
            answer = model.chat([{"role": "user", "content": dialog["prompt"]}], temperature=0, max_tokens=20)
            assert answer.text.strip() == dialog["completion"]
            assert answer.finish_reason == "stop"
    samples = [json.loads(line) for line in (place / "runs" / "mine" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [30, 60]
    assert samples[-1]["text"].startswith("one\n")


def test_as_many_steps_as_epochs_take(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five dialogs, one held out and two to a row, read twice, two rows a step; then from that run to another."""
    lines = [DIALOGS[n % 2] for n in range(5)]
    (place / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in lines))
    batch = ["batch.size=2", "data.validation=1", "evaluate=2", "epochs=2"]
    code, _, error = typed(capsys, "sft", "mine.toml", *batch)
    assert code == 0, error
    first = Run.open(place / "runs" / "mine")
    rows = -(-4 // 2)  # four dialogs are trained on, two to a row
    assert [line["step"] for line in first.metrics()] == list(range(1, 2 * rows // 2 + 1))
    assert "validation" in first.metrics()[-1]
    assert first.recipe["steps"] == 2
    assert (first.origin["dialogs"], first.origin["left_out"]) == (4, 0)
    assert error.startswith("5 dialogs read as prompt and completion\n4 dialogs, in 2 rows that are ")
    code, _, error = typed(capsys, "sft", "mine.toml", "start=runs/mine", "steps=1", "--name", "more", *batch)
    assert code == 0, error
    with checkpoint.open(place / "runs" / "more") as more, checkpoint.open(place / "tiny.gguf") as tiny:
        assert more.tokenizer.encode("the coin") == tiny.tokenizer.encode("the coin")
        assert replace(more.config, norm_eps=tiny.config.norm_eps) == tiny.config  # GGUF has it in float32


def test_what_is_left_out_is_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": "what " * 40, "completion": "bat"}
    (place / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in [*DIALOGS, long]))
    code, _, error = typed(capsys, "sft", "mine.toml", "steps=1", "data.too_long=leave out")
    assert code == 0, error
    assert "\n2 dialogs, without 1 that are longer than a row, in 1 rows that are " in error
    assert Run.open(place / "runs" / "mine").origin["left_out"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.length=512"], "data.length=512 is more than tiny.gguf reads, 256; choose shorter rows"),
        (["data.length=16"], "dialogs.jsonl:1: the dialog has .* tokens and a row 16; choose longer rows"),
        (["data.file=x"], "mine.toml: data.file: unknown setting; did you mean data.files\\?"),
        (["start=nowhere"], "nowhere"),
        (["batch.size=3", "batch.micro_size=2"], "batch.size=3 is not a multiple of batch.micro_size=2"),
        (["epochs=1e300"], "steps: would be more than 1,000,000,000,000; choose fewer epochs"),
        (["epochs=inf"], "epochs: .*finite number"),
        (["epochs=nan"], "epochs: .*finite number"),
    ],
)
def test_errors_before_the_first_step(
    place: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    code, _, error = typed(capsys, "sft", "mine.toml", *settings)
    assert code == 1
    assert error.count("\n") == 1
    assert error.startswith("llama2: error: ")
    assert re.search(message, error)
    assert not (place / "runs").exists()


def test_without_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty dialogs as ShareGPT has them, one of no use, in a folder; a tiny model with a width of 64."""
    turns = [[{"from": "human", "value": d["prompt"]}, {"from": "gpt", "value": d["completion"]}] for d in DIALOGS]
    records: list[Any] = [{"conversations": turns[n % 2], "id": n} for n in range(20)]
    (place / "mine").mkdir()
    (place / "mine" / "a.json").write_text(json.dumps([*records, {"conversations": []}], indent=1))
    command = ("sft", "-m", "tiny.gguf", "mine", "precision=fp32")
    code, _, error = typed(capsys, *command)
    assert code == 1
    assert error.startswith("llama2: error: mine/a.json:")
    assert error.endswith(": the dialog has no messages; --skip-bad leaves such out\n")
    code, out, error = typed(capsys, *command, "--skip-bad")
    assert code == 0, error
    line = json.dumps(records, indent=1).count("\n") + 1
    assert error.splitlines()[:3] == [
        "20 dialogs read as ShareGPT",
        "not used: 'id'",
        f"1 left out; the first: mine/a.json:{line}: the dialog has no messages",
    ]
    # 2e-5 × 4096 / 64; the context is 256; a tenth of twenty; at most ten epochs of two rows.
    assert (
        "rows of 256 tokens, 2 dialogs held out; 20 steps of 1 rows, 10 epochs; learning rate 0.00128 after 2 steps"
        in error
    )
    run = Run.open(place / "runs" / "mine")
    assert (run.recipe["start"], run.recipe["data"]["length"], run.recipe["data"]["validation"]) == (
        "tiny.gguf",
        256,
        2,
    )
    assert (run.recipe["steps"], run.recipe["optimizer"]["lr"]) == (20, 1.28e-3)
    assert [line["step"] for line in run.metrics() if "validation" in line] == [5, 10, 15, 20]
    held, trained = out.splitlines()[:2]
    numbers = re.findall(r"[0-9.]+", held)
    assert held == f"loss of answers in dialogs held out: {numbers[0]} before, {numbers[1]} after"
    assert numbers[1] == f"{run.metrics()[-1]['validation']:.3f}"
    assert float(numbers[1]) < float(numbers[0]) == round(run.origin["before"]["validation"], 3)
    assert trained.startswith("loss of answers in dialogs trained on: ")
    code, again, error = typed(capsys, *command, "--skip-bad", "--resume")
    assert (code, again) == (0, out), error
    code, _, error = typed(capsys, *command, "--skip-bad", "--out", "other", "steps=1")
    assert code == 0, error
    assert "\nwarning: 1 steps change little; steps=40 would change more\n" in error
    assert (place / "runs" / "other").is_dir()


def test_each_file_has_its_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The held out dialogs of each of two files, in transformers' reading; with a rate of nothing, as they began."""
    for name, dialog in zip(("a.jsonl", "b.jsonl"), DIALOGS, strict=True):
        (place / name).write_text(json.dumps(dialog) + "\n" + json.dumps(dialog) + "\n")
    settings = ["data.validation=3", "steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "precision=fp32"]
    code, _, error = typed(capsys, "sft", "-m", "tiny.gguf", "a.jsonl", "b.jsonl", "--out", "mine", *settings)
    assert code == 0, error
    last = Run.open(place / "runs" / "mine").metrics()[-1]
    expected = {name: loss_of_answers(place / "tiny.gguf", [d]) for name, d in zip("ab", DIALOGS, strict=True)}
    assert last["sources"] == {f"{name}.jsonl": pytest.approx(loss, rel=1e-5) for name, loss in expected.items()}
    assert min(last["sources"].values()) < last["validation"] < max(last["sources"].values())
    assert "(a.jsonl " in error


def test_begins_with_the_default_model(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(hub, "locate", lambda name: (asked.append(name), Path("tiny.gguf"))[1])
    code, _, error = typed(capsys, "sft", "dialogs.jsonl", "steps=1")
    assert code == 0, error
    assert asked == ["smollm2-135m-instruct"]


def test_another_process_has_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "runs" / "mine"
    with hold(folder, Processes(torch.device("cpu")), resume=False):
        (folder / "states" / "step-00000001.part").mkdir(parents=True)
        code, _, error = typed(capsys, "sft", "mine.toml", "steps=1")
        assert (code, error.count("\n")) == (1, 1)
        assert "mine: process " in error
        assert (folder / "states" / "step-00000001.part").is_dir()


@pytest.mark.parametrize("what", ["epochs", "dialogs"])
def test_goes_on_by_the_same_schedule_alone(place: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """What is fitted follows from the dialogs: with others the rate would jump."""
    command = ["sft", "-m", "tiny.gguf", "dialogs.jsonl", "--out", "mine"]
    assert typed(capsys, *command, "epochs=2")[0] == 0
    before = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    if what == "dialogs":
        (place / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for dialog in DIALOGS * 20))
    code, _, error = typed(capsys, *command, "epochs=2" if what == "dialogs" else "epochs=4", "--resume")
    assert code == 1
    changed = {
        "epochs": "epochs = 2.0, and the recipe says 4.0",
        "dialogs": "data.validation = 0, and the recipe says 4",
    }
    assert error.splitlines()[-1].startswith(f"llama2: error: runs/mine: the run was begun with {changed[what]}")
    assert {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()} == before


def test_a_recipe_by_either_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "more.jsonl").write_text(json.dumps(DIALOGS[0]) + "\n")
    command = ("sft", "--recipe", "mine.toml", "more.jsonl", "steps=1", "--name", "a")
    code, _, error = typed(capsys, *command)
    assert code == 0, error
    assert Run.open(place / "runs" / "a").recipe["data"]["files"] == ["more.jsonl"]
    code, _, error = typed(capsys, "sft", "mine.toml", "-m", "nowhere.gguf")
    assert code == 1
    assert "nowhere.gguf" in error
    code, _, error = typed(capsys, "sft", "-m", "tiny.gguf")
    assert code == 2
    assert "give files of dialogs, or a recipe" in error


def test_the_template_goes_with_the_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a base without one, transformers and llama.cpp learn the format that it was tuned with."""
    import gguf
    from transformers import AutoTokenizer

    code, _, error = typed(capsys, "sft", "-m", "tiny.gguf", "dialogs.jsonl", "steps=1", "--out", "mine")
    assert code == 0, error
    code, _, error = typed(capsys, "convert", "runs/mine", "mine.gguf", "--to", "gguf")
    assert code == 0, error
    code, _, error = typed(capsys, "convert", "runs/mine", "mine-hf", "--to", "hf")
    assert code == 0, error
    asked = [{"role": "user", "content": "one"}]
    with checkpoint.open(place / "tiny.gguf") as tiny:
        wanted = tiny.tokenizer.encode("[INST] one [/INST]", bos=True)
    for folder in (place / "mine-hf", next((place / "runs" / "mine").rglob("model"))):
        theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(asked, tokenize=True, return_dict=False)
        assert theirs == wanted
    field = gguf.GGUFReader(place / "mine.gguf").get_field("tokenizer.chat_template")
    assert field is not None
    assert "[INST]" in field.contents()


def test_a_template_of_the_start_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    config: Any = tiny_config(vocab_size=352)
    write_tiny_gguf(place / "tiny.gguf", config=config, tokenizer="bpe", template=template)
    code, _, error = typed(capsys, "sft", "mine.toml", "steps=1", "data.length=128")
    assert code == 0, error
    with checkpoint.open(place / "runs" / "mine") as tuned, checkpoint.open(place / "tiny.gguf") as tiny:
        assert tuned.template == template
        assert tuned.tokenizer.encode("the coin") == tiny.tokenizer.encode("the coin")


LORA = ["lora.rank=4", 'lora.targets=["q_proj","o_proj","up_proj"]', "optimizer.lr=3e-2", "save.every=2"]


def test_an_adapter_resumes_to_the_same_bytes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With dropout; a state has the adapter's weights and moments alone."""
    lora = [*LORA, "lora.dropout=0.3", "steps=4", "save.keep_last=3"]
    code, out, error = typed(capsys, "sft", "mine.toml", *lora)
    assert code == 0, error
    assert "\nadapter, rank 4, alpha 32, on o_proj, q_proj, up_proj; rows of 64 tokens" in error
    assert out.splitlines()[-3:] == [
        "runs/mine: done; talk with it: llama2 chat -m tiny.gguf --adapter runs/mine",
        "for llama.cpp: llama2 convert tiny.gguf mine.gguf --to gguf --format Q8_0 --adapter runs/mine",
        "for transformers: llama2 convert tiny.gguf mine-hf --to hf --adapter runs/mine",
    ]
    states = place / "runs" / "mine" / "states"
    assert not list(states.glob("*/model"))
    saved = FileSystemReader(states / "step-00000004").read_metadata().state_dict_metadata
    names = {re.sub(r"(exp_avg(_sq)?|step)$", "", re.sub(r"^(model|optimizer\.state)\.", "", name)) for name in saved}
    assert {name for name in names if name.startswith("layers")} == {
        f"layers.{layer}.{matrix}.lora_{part}{dot}"
        for layer in (0, 1)
        for matrix in ("attention.wq", "attention.wo", "feed_forward.w3")
        for part in "ab"
        for dot in ("", ".")
    }
    whole = Run.open(place / "runs" / "mine").metrics()
    file = "step-00000004/adapter/adapter_model.safetensors"
    expected = (states / file).read_bytes()
    shutil.rmtree(states / "step-00000004")
    code, again, error = typed(capsys, "sft", "mine.toml", *lora, "--resume")
    assert (code, again) == (0, out), error
    assert (states / file).read_bytes() == expected
    found = Run.open(place / "runs" / "mine").metrics()
    assert [(line["loss"], line["norm"]) for line in found] == [(line["loss"], line["norm"]) for line in whole]


def test_an_adapter_answers_and_is_continued(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = ['samples.prompts=["one"]', "samples.tokens=8"]
    code, _, error = typed(capsys, "sft", "mine.toml", *LORA, "steps=40", "save.every=40", *samples)
    assert code == 0, error
    with llama2.load(place / "tiny.gguf", adapter=str(place / "runs" / "mine")) as model:
        answer = model.chat([{"role": "user", "content": "one"}], temperature=0, max_tokens=20)
        assert answer.text.strip() == "bat"
        assert not [note for note in model.checkpoint.notes if "another model" in note]
    assert json.loads((place / "runs" / "mine" / "samples.jsonl").read_text())["text"].startswith("one\n")
    code, out, error = typed(
        capsys, "sft", "mine.toml", "--adapter", "runs/mine", "--qlora", "steps=1", "--out", "more"
    )
    assert code == 0, error
    assert "\nadapter of the model in Q4_1, rank 4, alpha 32, on o_proj, q_proj, up_proj; " in error
    first = Run.open(place / "runs" / "mine").metrics()[0]["loss"]
    assert Run.open(place / "runs" / "more").metrics()[0]["loss"] < first / 2
    code, out, error = typed(capsys, "generate", "-m", "runs/mine", "one")
    assert (code, out) == (1, "")
    assert re.search(r"adapter: is an adapter of tiny.gguf, .*; give both: -m tiny.gguf --adapter runs/mine", error)


def test_an_adapter_of_another_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same shape with other norms: commands warn, and training refuses."""
    adapter = ["sft", "mine.toml", *LORA]
    assert typed(capsys, *adapter, "steps=1")[0] == 0
    write_tiny_gguf(place / "other.gguf", config=tiny_config(), seed=1)
    with checkpoint.open(place / "other.gguf", adapters=[(place / "runs" / "mine", 1.0)]) as model:
        (note,) = [note for note in model.notes if "another model" in note]
        assert re.search(r"adapter: was trained on another model than .*other.gguf; give its own base, tiny.gguf", note)
    for words, message in (
        (
            ["start=other.gguf", "--adapter", "runs/mine", "--out", "b"],
            "adapter: was trained on another model than oth",
        ),
        (["--adapter", "runs/mine", "lora.rank=2", "--out", "b"], "lora.rank=2: the adapter to continue has 4; leave"),
        (["--adapter", "dialogs.jsonl", "--out", "b"], "dialogs.jsonl: is not an adapter"),
    ):
        code, _, error = typed(capsys, "sft", "mine.toml", "steps=1", *words)
        assert code == 1
        assert error.count("\n") == 1
        assert message in error
    (place / "other.gguf").rename(place / "tiny.gguf")
    code, _, error = typed(capsys, *adapter, "steps=1", "--resume")
    assert code == 1
    assert error.endswith("runs/mine: was begun with another model than tiny.gguf is now; begin another run\n")
