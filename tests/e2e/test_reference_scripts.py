"""Scripts written for the reference run on the default model with a changed import."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def answers(script: str, *arguments: object) -> list[str]:
    """What the script prints for each prompt, after its `> `."""
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [part.rpartition("\n> ")[2].strip() for part in done.stdout.split("=" * 34)[:-1]]


def test_text_completion(model_path: Path) -> None:
    colours, water, german = answers("reference_text_completion.py", model_path, 0)
    assert "red" in colours
    assert "100" in water or "212" in water
    assert german.startswith("drei")
    drawn = answers("reference_text_completion.py", model_path, 0.9)
    assert drawn == answers("reference_text_completion.py", model_path, 0.9)
    assert drawn != [colours, water, german]


def test_chat_completion(model_path: Path) -> None:
    berlin, fruit, sea, unsafe = answers("reference_chat_completion.py", model_path, 0)
    assert berlin == "Assistant: The capital city of Germany is Berlin."
    assert len(fruit) > len("Assistant: ")
    assert "salt" in sea
    assert unsafe == "Assistant: Error: special tags are not allowed as part of the prompt."
