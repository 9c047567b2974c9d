"""Reward models against transformers' LlamaForSequenceClassification, the engine, and two processes against one."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import forked
from llama2 import api, checkpoint
from llama2.align import reward
from llama2.align.ranking import pair_scores, ranking
from llama2.checkpoint import Checkpoint
from llama2.data.pairs import Pairs, TokenizedPair
from llama2.errors import CheckpointError, ContextError, DialogError
from llama2.model.heads import RewardTransformer
from llama2.train.settings import OptimizerSettings
from llama2.train.states import write_model
from llama2.train.step import Step
from models import tiny_config, write_tiny_gguf
from steps import seeded, whole

pytestmark = pytest.mark.usefixtures("one_thread")

DIALOGS = [
    [{"role": "user", "content": "the bat"}, {"role": "assistant", "content": answer}]
    for answer in ("on the coin", "is it", "the water on the boat " * 3)
]
DIALOGS.append([*DIALOGS[0], {"role": "user", "content": "and"}, {"role": "assistant", "content": "it is"}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on disk, whose weights are large enough for scores to differ."""
    place = tmp_path_factory.mktemp("reward")
    write_tiny_gguf(place / "tiny.gguf")
    with checkpoint.open(place / "tiny.gguf") as start:
        network = RewardTransformer.load(start)
        like = Checkpoint(place, "huggingface", network.config, {}, {}, tokenizer_source=start.tokenizer)
        write_model(place / "hf", network.state_dict(), like, "fp32")
    return place / "hf"


def test_the_engine_scores_as_transformers_and_torch(folder: Path) -> None:
    """Their class reads the last token of a row; the loss is that of the formula on their scores."""
    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with api.load(folder) as model:
        found = reward.score(model, DIALOGS)
        alone = np.concatenate([reward.score(model, [dialog]) for dialog in reversed(DIALOGS)])[::-1]
        tokens = list(reward.tokens_of(model.checkpoint, DIALOGS))
        network = RewardTransformer.load(model.checkpoint)
    with torch.no_grad():
        expected = [theirs(torch.from_numpy(row[None].astype(np.int64))).logits.item() for row in tokens]
    assert np.ptp(expected) > 0.05
    assert tokens[3][-1] == 2  # the last EOS, and not the first
    assert (tokens[3] == 2).sum() == 2
    assert found == pytest.approx(expected, abs=2e-3)  # the engine caches keys and values in 16 bits
    assert np.array_equal(found, alone)
    pairs = [TokenizedPair(tokens[0], tokens[1], 1 / 3, (1, 0)), TokenizedPair(tokens[2], tokens[3], 0, (1, 1))]
    step = Step(network, ranking, precision="fp32")
    batch = Pairs("p", pairs).batch([0, 1])
    with torch.no_grad():
        assert pair_scores(step.running, batch).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    scores = np.array(expected).reshape(2, 2)
    losses = np.log1p(np.exp(-(scores[:, 0] - scores[:, 1] - np.array([1 / 3, 0]))))
    assert step.evaluate([batch]) == pytest.approx(losses.mean(), abs=1e-5)


def test_a_sigmoid_and_what_cannot_be_scored(folder: Path) -> None:
    with api.load(folder) as model:
        scores = reward.score(model, DIALOGS[:2])
        assert reward.score(model, DIALOGS[:2], sigmoid=True) == pytest.approx(1 / (1 + np.exp(-scores)))
        with pytest.raises(DialogError, match="dialog 1: the dialog ends without an answer"):
            reward.score(model, [DIALOGS[0], DIALOGS[0][:1]])
        long = [DIALOGS[0][0], {"role": "assistant", "content": "q" * 300}]
        with pytest.raises(ContextError, match=r"dialog 0 has 3.. tokens, and the context is 256"):
            reward.score(model, [long])
    with api.load(folder.parent / "tiny.gguf") as model, pytest.raises(CheckpointError, match="not a reward model"):
        reward.score(model, DIALOGS)


def train(processes: int) -> dict[str, Any]:
    """Ten steps of two micro-batches, and what comes of them."""
    mesh = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("dp", "tp")) if processes > 1 else None
    rank = 0 if mesh is None else mesh.get_local_rank("dp")
    network = RewardTransformer(tiny_config())
    network.initialise(seeded())
    rng = np.random.default_rng(0)
    pairs = [
        TokenizedPair(*(rng.integers(3, 320, n).astype(np.int32) for n in rng.integers(2, 40, 2)), i / 3, (1, i % 2))
        for i in range(8)
    ]
    source = Pairs("p", pairs)
    step = Step(
        network,
        partial(ranking, safety_weight=0.5),
        optimizer=OptimizerSettings(clip=0.5),
        precision="fp32",
        mesh=mesh,
    )
    done = []
    for _ in range(10):
        batches = [source.batch([*range(4)][rank::processes]), source.batch([*range(4, 8)][rank::processes])]
        done.append(step.step(batches, 1e-3))
    return {"losses": [each.loss for each in done], "norms": [each.norm for each in done], "weights": whole(network)}


def write(path: Path) -> None:
    dist.init_process_group("gloo")
    result = train(2)
    if dist.get_rank() == 0:
        torch.save(result, path)
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, __file__, tmp_path / "two.pt"], check=True, timeout=120)
    found, expected = torch.load(tmp_path / "two.pt"), train(1)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


if __name__ == "__main__":
    forked.start(2, write, Path(sys.argv[1]))
