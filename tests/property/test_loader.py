"""The loader deals every window once an epoch, whoever shares the work and however often it is interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpora
from llama2.data.loader import IGNORED, Loader, TokenBatch, Windows, shares, shuffled
from llama2.data.shards import Shards
from llama2.errors import DataError

DOCUMENTS = [7, 3, 40, 1, 12, 25, 2, 30, 11]  # tokens of each
LENGTH = 8
STREAM = np.arange(sum(DOCUMENTS)) + 100  # a token is its place


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return built(tmp_path_factory.mktemp("corpus"))


def built(folder: Path, name: bytes = b"a") -> Shards:
    ends = np.cumsum(DOCUMENTS)
    documents = [STREAM[end - size : end] for end, size in zip(ends, DOCUMENTS, strict=True)]
    tokenizer = folder / "some.model"
    tokenizer.write_bytes(name)
    corpora.write(folder, tokenizer, 300, {"train": [documents[:4], documents[4:]]})
    return Shards.open(folder, "train")


def rows(batches: list[TokenBatch]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.tokens]


@pytest.mark.parametrize("key", [0, 1, 1 << 40])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_an_order_has_everything_once(count: int, key: int) -> None:
    order = [shuffled(place, count, key=key) for place in range(count)]
    assert sorted(order) == list(range(count))
    if count == 1000:
        assert order != list(range(count))
        assert order != [shuffled(place, count, key=key + 1) for place in range(count)]
        # Neighbours are as far apart as in a random order, of which the mean is a third of all.
        assert 300 < np.abs(np.diff(order)).mean() < 370


def test_every_window_once_an_epoch_and_targets_one_further(corpus: Shards) -> None:
    windows = Windows(corpus, length=LENGTH)
    loader = Loader(windows, rows=1, seed=3)
    assert len(windows) == (131 - 1) // LENGTH == 16
    epochs = [[loader.next() for _ in range(16)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(rows(epoch)) == [STREAM[i * LENGTH : (i + 1) * LENGTH].tolist() for i in range(16)]
        for batch in epoch:
            assert batch.targets.tolist() == (batch.tokens + 1).tolist()
            assert batch.documents is None
    assert rows(epochs[0]) != rows(epochs[1])
    assert loader.epoch == 2


@settings(max_examples=60, deadline=None)
@given(
    worlds=st.lists(st.sampled_from([(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)]), min_size=1, max_size=6),
    seed=st.integers(0, 1 << 40),
)
def test_continues_with_the_next_row_at_any_world_size(
    corpus: Shards, worlds: list[tuple[int, int]], seed: int
) -> None:
    alone = Loader(Windows(corpus, length=LENGTH), rows=1, seed=seed)
    state = alone.state()
    for world, each in worlds:
        windows = Windows(corpus, length=LENGTH)
        loaders = [Loader(windows, rows=each, seed=seed, dp_rank=rank, dp_size=world) for rank in range(world)]
        for loader in loaders:
            loader.restore(state)
        for _ in range(2):
            shared = rows([loader.next() for loader in loaders])
            assert shared == rows([alone.next() for _ in range(world * each)])
        state = loaders[0].state()
        assert all(loader.state() == state for loader in loaders)


def test_boundaries_are_the_documents(corpus: Shards) -> None:
    loader = Loader(Windows(corpus, length=LENGTH, boundaries=True), rows=16, seed=0)
    [batch] = loader.first(16)
    assert batch.documents is not None
    ends = np.cumsum(DOCUMENTS)
    document = np.searchsorted(ends, np.arange(len(STREAM)), side="right")  # of every token
    assert batch.tokens.flatten().tolist() == STREAM[:128].tolist()
    for i, (row, targets) in enumerate(zip(batch.documents, batch.targets, strict=True)):
        places = np.arange(i * LENGTH, (i + 1) * LENGTH)
        assert (np.diff(row) == np.diff(document[places])).all()
        last = document[places] != document[places + 1]
        assert (targets == np.where(last, IGNORED, STREAM[places + 1])).all()


def test_first_is_in_order_and_no_longer_than_there_is(corpus: Shards) -> None:
    loader = Loader(Windows(corpus, length=LENGTH), rows=3, seed=0)
    assert [len(batch.tokens) for batch in loader.first(7)] == [3, 3, 1]
    assert rows(loader.first(99)) == [STREAM[i * LENGTH : (i + 1) * LENGTH].tolist() for i in range(16)]
    assert loader.state()["rows"] == 0


def test_skips_rows_of_all(corpus: Shards) -> None:
    one, other = (Loader(Windows(corpus, length=LENGTH), rows=2, seed=5) for _ in range(2))
    one.skip(4)
    skipped = [other.next() for _ in range(2)]
    assert rows([one.next()]) == rows([other.next()])
    assert len(skipped) == 2


@pytest.fixture(params=["corpus", "seed", "length"])
def changed(request: pytest.FixtureRequest, corpus: Shards, tmp_path: Path) -> tuple[str, Loader]:
    shards = built(tmp_path, b"b") if request.param == "corpus" else corpus
    windows = Windows(shards, length=9 if request.param == "length" else LENGTH)
    return request.param, Loader(windows, rows=1, seed=9 if request.param == "seed" else 1)


def test_another_corpus_seed_or_length_is_refused(corpus: Shards, changed: tuple[str, Loader]) -> None:
    name, loader = changed
    with pytest.raises(DataError, match=f"the run was begun with {name} .*; begin another run"):
        loader.restore(Loader(Windows(corpus, length=LENGTH), rows=1, seed=1).state())


def test_too_few_tokens(corpus: Shards) -> None:
    with pytest.raises(DataError, match="train has 131 tokens, too few for a row of 131"):
        Windows(corpus, length=131)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), count=st.integers(0, 60))
def test_shares(sizes: list[int], count: int) -> None:
    dealt = shares(sizes, count)
    assert sum(dealt) == min(count, sum(sizes))
    assert all(0 <= have <= size for have, size in zip(dealt, sizes, strict=True))
    if count >= len(sizes):
        assert min(dealt) >= 1
    for have, size in zip(dealt, sizes, strict=True):  # its share, or the one that it has at least
        assert have <= max(1, -(-size * count // sum(sizes)))


def test_shares_by_hand() -> None:
    assert shares([36, 18, 5], 10) == [6, 3, 1]
    assert shares([100, 1, 1], 4) == [2, 1, 1]
    assert shares([1, 9, 5], 2) == [0, 1, 1]
    assert shares([3, 3, 3], 64) == [3, 3, 3]


def test_rows_to_evaluate_on_are_of_all_sources(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 tokens: the middle of the third, 20, is all that b has; that of the eighth is a's again."""
    monkeypatch.setattr(Shards, "sources", [(0, "a"), (19, "b"), (21, "c"), (60, "a")])
    windows = Windows(corpus, length=LENGTH)
    numbers = {"a": [0, 1, *range(7, 16)], "b": [2], "c": [3, 4, 5, 6]}
    found = windows.spread(99, 3)
    assert [(each.source, len(each.tokens)) for each in found] == [("a", 3)] * 3 + [
        ("a", 2),
        ("b", 1),
        ("c", 3),
        ("c", 1),
    ]
    for source, wanted in numbers.items():
        assert rows([each for each in found if each.source == source]) == [
            STREAM[number * LENGTH : (number + 1) * LENGTH].tolist() for number in wanted
        ]
    few = windows.spread(4, 2)
    assert [(each.source, len(each.tokens)) for each in few] == [("a", 2), ("b", 1), ("c", 1)]
    assert rows(few) == rows(windows.spread(4, 2))
    assert rows(few[:1]) != rows(found)[:2]  # spread, and not the first ones
    monkeypatch.setattr(Shards, "sources", [])
    assert {each.source for each in windows.spread(4, 2)} == {""}
