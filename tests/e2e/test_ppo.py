"""`llama2 ppo` as a person uses it: tiny models, the whole run, kills, and what is refused before a step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import llama2
from commands import typed
from llama2 import checkpoint
from llama2.align.experience import Experience
from llama2.align.scorers import EngineScorer
from llama2.align.surrogate import RolloutBatch
from llama2.records import Run
from models import tiny_config, write_tiny_gguf
from reward_models import write_reward_model

WORDS = ("bat", "coin", "water", "boat", "rice", "tea", "sand", "oar")

RECIPE = """
start = "tiny.gguf"
precision = "fp32"
iterations = 4
rollouts = 16
max_tokens = 24
beta = 0.02
[prompts]
files = ["prompts.jsonl"]
held_out = 8
measured = 4
[rewards]
helpful = "helpful"
safety = "safety"
watched = "watched"
[batch]
size = 8
[optimizer]
lr = 1e-3
[save]
every = 1
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "tiny.gguf", config=tiny_config())
    write_tiny_gguf(folder / "bpe.gguf", config=tiny_config(), tokenizer="bpe")
    for seed, name in enumerate(("helpful", "safety", "watched")):
        write_reward_model(folder / "tiny.gguf", folder / name, seed)
    write_reward_model(folder / "bpe.gguf", folder / "foreign", 4)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A working folder with models, prompts and a recipe."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    rows = [{"prompt": f"{WORDS[i % 8]} {WORDS[i // 8]}", "safety": i % 3 == 0} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ppo.toml").write_text(RECIPE)
    return tmp_path


def weights(run: Path) -> bytes:
    """The last state's model."""
    (last,) = sorted((run / "states").glob("step-*"))[-1:]
    return (last / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("weights", ()),
        ("adapters", ("lora.rank=4", 'lora.targets=["q_proj", "down_proj"]')),
        ("adapters on 4 bits", ("lora.rank=4", "lora.quantize=Q4_1", "rewards.cut=score")),
    ],
)
def test_a_run_from_end_to_end(
    kind: str, words: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = typed(capsys, "ppo", "ppo.toml", "--name", "v", *words)
    assert code == 0, error
    assert out == "runs/v: done; talk with it: llama2 chat -m runs/v\n"
    lines = error.splitlines()
    estimate = next(n for n, line in enumerate(lines) if line.startswith("estimate: 64 answers in 4 iterations"))
    assert estimate < next(n for n, line in enumerate(lines) if line.startswith("step 1/8"))
    assert ("without its end is worth what reward models say" in error) == (kind == "adapters on 4 bits")
    metrics = Run.open(place / "runs/v").metrics()
    assert [line["step"] for line in metrics] == [*range(1, 9)]
    first, last = metrics[0]["measured"], metrics[-2]["measured"]
    assert first["ratio_away"] <= 1e-6
    assert abs(first["kl"]) <= 1e-6
    assert abs(last["kl"]) > 1e-4  # a mean over draws, which may be below 0
    assert {"reward", "helpful", "safety", "watched", "unsafe", "entropy", "tokens", "cut", "distinct"} <= {*first}
    assert all(line["measured"]["engine_gap"] < 0.05 for line in metrics[::2])
    assert {"held_out_reward", "held_out_watched", "held_out_tokens"} <= {*metrics[-1]["measured"]}
    with checkpoint.open(place / "runs/v") as model, checkpoint.open(place / "tiny.gguf") as start:
        assert not model.extras  # the value network is no part of the policy
        assert model.config.tensor_shapes() == start.config.tensor_shapes()
        changed = [
            n for n in start.tensors if not np.array_equal(model.tensors[n].dequantize(), start.tensors[n].dequantize())
        ]
    quantized = {"weights": 21, "adapters": 4, "adapters on 4 bits": 14}  # of 21 tensors: all, 2 × 2, 2 × 7 matrices
    assert len(changed) == quantized[kind]
    with llama2.load("runs/v") as model:
        assert model.chat("bat coin", max_tokens=8).token_ids


def test_a_run_that_is_stopped_ends_with_the_same_weights(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an iteration, whose answers are in no state; bench/align_kills.py kills at every place."""
    words = ["ppo", "ppo.toml", "lora.rank=4"]
    assert typed(capsys, *words, "--name", "whole")[0] == 0
    real, calls = Experience.next, []

    def stopped(self: Experience) -> RolloutBatch:
        calls.append(self.iteration)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Experience, "next", stopped)
    assert typed(capsys, *words, "--name", "again")[0] == 130
    assert calls == [0, 1, 1, 2]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    code, _, error = typed(capsys, *words, "--name", "again", "--resume")
    assert code == 0, error
    whole, again = (Run.open(place / "runs" / name).metrics() for name in ("whole", "again"))
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    assert weights(place / "runs/again") == weights(place / "runs/whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewards.helpful=foreign"], "value=foreign: has another vocabulary than tiny.gguf"),
        (["rewards.safety=foreign"], "rewards.safety=foreign: has another vocabulary"),
        (["rewards.safety=tiny.gguf"], "tiny.gguf: is not a reward model"),
        (["value=tiny.gguf"], "tiny.gguf: is not a reward model"),
        (["rewards.threshold=1.5"], "rewards.threshold: Input should be less than or equal to 1"),
        (["prompts.held_out=40"], "prompts.jsonl: no prompts are there to use"),
        (["max_tokens=250", "prompts.skip_bad=true"], "prompts.jsonl: no prompts are left; the first left out: p"),
        (["max_tokens=250"], "tokens, and an answer leaves room for 6; prompts.skip_bad=true leaves such out"),
        (["rollouts=20"], "rollouts=20 is not a multiple of batch.size=8"),
        (["temperature=0.7"], "temperature: unknown setting"),
        (["top_p=0.9"], "top_p: unknown setting"),
        (["lora.dropout=0.1"], "lora.dropout: the policy that learns would not be the one that drew; set it to 0"),
        (["steps=9"], "steps: follows from iterations, rollouts and batch.size"),
        (["patience=1", "prompts.measured=0"], "patience: needs prompts.measured"),
        (["prompts.measured=9"], "prompts.measured: is more than prompts.held_out"),
        (["mesh.tensor=2"], "mesh.tensor: PPO does not train by tensor parallelism"),
        (["rewards.helpful=", "rewards.safety="], "rewards: needs rewards.helpful, rewards.safety, or both"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = typed(capsys, "ppo", "ppo.toml", *words)
    assert (code, out) == (1, "")
    said = [line for line in error.splitlines() if line.startswith("llama2: error:")]
    assert len(said) == len(error.splitlines()) == 1
    assert message in said[0]
    assert not (place / "runs/ppo/run.json").exists()


def test_a_resumed_run_is_the_one_that_was_begun(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "ppo", "ppo.toml", "iterations=1")[0] == 0
    for words, message in (
        (["beta=0.5"], "the run was begun with beta = 0.02, and the recipe says 0.5"),
        (["rewards.cut_reward=0.5"], "rewards.cut_reward = 0.05, and the recipe says 0.5"),
        (["seed=3"], "seed = 0, and the recipe says 3"),
    ):
        code, _, error = typed(capsys, "ppo", "ppo.toml", "iterations=1", *words, "--resume")
        assert code == 1
        assert message in error.splitlines()[-1]
    rows = (place / "prompts.jsonl").read_text().splitlines()
    (place / "prompts.jsonl").write_text("\n".join([*rows[:-1], json.dumps({"prompt": "another"})]) + "\n")
    code, _, error = typed(capsys, "ppo", "ppo.toml", "iterations=1", "--resume")
    assert code == 1
    assert "prompts.jsonl: is not the data that runs/ppo was begun with" in error.splitlines()[-1]
    (place / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (place / "helpful").unlink()
    (place / "helpful").symlink_to(place / "watched")
    code, _, error = typed(capsys, "ppo", "ppo.toml", "iterations=1", "--resume")
    assert code == 1
    assert "runs/ppo: was begun with another value; begin another run" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["collapse.distinct=1.0", "prompts.count=1"], "of its answers are different"),
        (["collapse.kl=1e-6"], "its KL from the start is"),
        (["collapse.cut=0.01"], "of its answers have no end token"),
        (["collapse.entropy=0.99", "optimizer.lr=0.03"], "its entropy fell from"),
    ],
)
def test_a_policy_that_collapses_ends_the_run(
    words: list[str], reason: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "prompts.count=1" in words:
        words = [*words, "optimizer.lr=0.05", "max_tokens=1"]
    code, _, error = typed(capsys, "ppo", "ppo.toml", *words, "iterations=12")
    assert code == 1
    last = error.splitlines()[-1]
    assert "runs/ppo: iteration" in last
    assert "the policy has collapsed: " in last
    assert reason in last
    assert sorted((place / "runs/ppo/states").glob("step-*"))  # of before


def test_a_run_ends_where_the_held_out_reward_does_not_rise(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of almost nothing, the policy and its reward stay: two measurements, then the end."""
    words = ["ppo", "ppo.toml", "optimizer.lr=1e-30", "patience=2", "evaluate=2", "iterations=9"]
    code, _, error = typed(capsys, *words)
    assert code == 0, error
    assert "ends here: no better one in 2 measurements" in error
    assert [line["step"] for line in Run.open(place / "runs/ppo").metrics()] == [1, 2, 3, 4]
    assert weights(place / "runs/ppo")
    code, _, error = typed(capsys, *words, "--resume")
    assert code == 0, error
    assert len(Run.open(place / "runs/ppo").metrics()) == 4


def test_a_reward_is_read_at_the_last_end_token_and_does_not_depend_on_what_is_beside_it(place: Path) -> None:
    """A dialog has an end token after each answer. Another last answer is another reward, bit for bit the same in any
    company, be that longer or shorter.
    """
    first = [
        {"role": "user", "content": "bat"},
        {"role": "assistant", "content": "tea"},
        {"role": "user", "content": "oar"},
    ]
    dialogs = [[*first, {"role": "assistant", "content": text}] for text in ("rice", "sand and rice", "r")]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with llama2.load("helpful") as model:
        scorer = EngineScorer(model)
        together = list(scorer([*dialogs, short, short * 9]))
        assert len({*together[:3]}) == 3
        assert [scorer([dialog])[0] for dialog in dialogs] == together[:3]
        assert list(scorer([short * 9, *dialogs[::-1]]))[1:] == together[2::-1]
        assert scorer([first[:2]])[0] not in together
