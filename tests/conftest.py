"""Fixtures that every kind of test shares."""

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("llama2", deadline=None)  # no test asserts on time
settings.load_profile("llama2")

#: The files that take longest. They come first, so that no worker is left with one of them at the end.
LONGEST = (
    "test_sharded_steps",
    "test_chat_page",
    "test_emulated",
    "test_batch_independence",
    "test_readme",
    "test_pretrain",
    "test_interpreter",
    "test_pretrain_processes",
    "test_serve_schema",
    "test_data_build",
    "test_data_corpus",
    "test_runner_torch",
    "test_cli",
    "test_serve",
    "test_page_answers",
    "test_page_composing",
    "test_hub_wheel",
    "test_convert",
    "test_convert_faults",
    "test_pretrain_documents",
    "test_hub_huggingface",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


_USERS_HOME = os.environ.get("LLAMA2_HOME")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests write stays out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA2_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test's handlers go with it: its standard error is closed afterwards, and the next test would fail on it."""
    loggers = [logging.getLogger(name) for name in ("llama2", "uvicorn")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def model_path(_own_home: None) -> Path:
    """The default model's file: $LLAMA2_TEST_MODEL, else what the hub finds in the user's cache, or fetches there."""
    if path := os.environ.get("LLAMA2_TEST_MODEL"):
        return Path(path)
    from llama2 import hub

    with pytest.MonkeyPatch.context() as patch:
        if _USERS_HOME:
            patch.setenv("LLAMA2_HOME", _USERS_HOME)
        else:
            patch.delenv("LLAMA2_HOME")
        return hub.locate(hub.DEFAULT)


@pytest.fixture(scope="session")
def sources(_own_home: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny model in every format (conversions.py)."""
    from conversions import write_sources

    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing may be left that is half done."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder
    assert not [path.name for path in folder.iterdir() if path.suffix == ".part"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: so small networks gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_measurement() -> Iterator[None]:
    """A device's peak is measured at the first run, and not for a second at each."""
    from llama2.train import throughput, training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "peak_flops", cache(throughput.peak_flops))
        yield


@pytest.fixture(scope="module")
def quick_logs() -> Iterator[None]:
    """loguru looks up Python's folders once, not for each of the thirty logs of a corpus: a third of a small build."""
    from loguru._better_exceptions import ExceptionFormatter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExceptionFormatter, "_get_lib_dirs", staticmethod(cache(ExceptionFormatter._get_lib_dirs)))
        yield


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpus cards with empty pictures: another third of a small build."""
    from llama2.data import card

    monkeypatch.setattr(card, "_plot", lambda folder, _: [(folder / f"{name}.svg").touch() for name in card._PLOTS])
