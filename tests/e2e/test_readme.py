"""The README's code works: `bash` and `python` blocks are run, and `sh` blocks only set a machine up."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llama2 import hub
from llama2.hub.registry import MODELS
from serving import serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
PYTHON = [code for language, code in BLOCKS if language == "python"]
#: What makes training short enough to be tested.
SHORT = "compile=false evaluate=2 save.every=2 batch.size=4 batch.micro_size=4 data.validation=0 optimizer.warmup=0"
TRAINING = {
    "llama2 pretrain ": f"{SHORT} steps=4 data.dir=texts",
    "llama2 sft ": f"{SHORT} epochs=1 data.files='[\"dialogs.jsonl\"]'",
}
SET_UP = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


@pytest.fixture(scope="module")
def environment(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A shell with this Python's programs on its path, and the default model at hand by its name."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / MODELS[hub.DEFAULT].file).symlink_to(model_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"LLAMA2_HOME": str(home), "PATH": path}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: what one makes, the next one may use."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "LICENSE").write_text((ROOT / "LICENSE").read_text()[:1000])  # all of it takes ten seconds to read
    (folder / "texts").mkdir()
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        shutil.copy(module, folder / "texts")
    dialog = {"prompt": "What does abs do?", "completion": "It gives the absolute value of a number."}
    (folder / "dialogs.jsonl").write_text((json.dumps(dialog) + "\n") * 40)
    return folder


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "runs/" in command[-1]  # a model of four steps may say nothing


@pytest.mark.parametrize("line", SHELL)
def test_shell(line: str, folder: Path, environment: dict[str, str]) -> None:
    short = next((settings for command, settings in TRAINING.items() if line.startswith(command)), "")
    run(["bash", "-c", f"{line} {short}"], folder, environment)


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str, folder: Path, environment: dict[str, str]) -> None:
    if "127.0.0.1:8080" in code:
        with serving([hub.DEFAULT], **environment) as server:
            run([sys.executable, "-c", code.replace(":8080", f":{server.port}")], folder, environment)
    else:
        run([sys.executable, "-c", code], folder, environment)


def test_nothing_else_is_left_untested() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "sh"}
    assert SHELL
    assert PYTHON
    for line in SET_UP:
        assert line.startswith(
            (
                *("make ", "python3 -m venv ", ".venv/bin/pip install ", "pip install whole_llama-"),
                *(".venv/bin/llama2 chat", "llama2 chat", "llama2 serve"),
            )
        )
