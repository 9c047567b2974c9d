"""The program, as somebody types it, in this process."""

from __future__ import annotations

import pytest

from llama2.cli.main import run


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        run([str(word) for word in words])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def done(capture: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard output of a command that must succeed."""
    code, out, error = typed(capture, *words)
    assert code == 0, error
    return out
