"""Fixtures that every kind of test shares."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file: $LLAMA2_TEST_MODEL, else what the hub finds or fetches."""
    if path := os.environ.get("LLAMA2_TEST_MODEL"):
        return Path(path)
    from llama2 import hub

    return Path(hub.locate("smollm2-135m-instruct"))
