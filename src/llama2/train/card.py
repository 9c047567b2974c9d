"""The card of a run that has ended: its losses and notes."""

from __future__ import annotations

import math
import statistics

from llama2 import files
from llama2.errors import RunError
from llama2.records import Run

CARD = "card.md"
#: Last steps, whose mean is a run's training loss.
LAST = 50
#: What has a loss of which the exponential is a perplexity.
LANGUAGE = "a token"


def write(run: Run, unit: str = LANGUAGE) -> None:
    """Write the card beside the run's record; `unit` is what has a loss. Raises RunError where that cannot be done."""
    origin, lines = run.origin, run.curve()
    losses: list[float] = [line["loss"] for line in lines[-LAST:] if line.get("loss") is not None]
    mean = statistics.fmean(losses) if losses else None
    rows: list[tuple[str, float | None]] = [(f"training, the last {len(losses)} steps", mean)]
    measured = next((line for line in reversed(lines) if "validation" in line), None)
    if measured:
        rows.append(("validation", measured["validation"]))
        rows += [(f"validation: {name}", loss) for name, loss in measured.get("sources", {}).items()]
    last = lines[-1] if lines else {}
    notes = [f"- step {line['step']}: {_text(line['note'])}" for line in lines if "note" in line]
    commit = f", at commit {_text(origin['commit'])}" if origin["commit"] else ""
    text = [
        f"# {_text(run.folder.name)}",
        "",
        f"Begun {origin['date']} with `{_text(origin.get('command', ''))}`{commit}; "
        f"{last.get('step', 0):,} steps, {last.get('tokens') or 0:,} tokens.",
        "",
        *_table(rows, unit),
        *(["", "## Notes", "", *notes] if notes else []),
    ]
    with files.create(run.folder / CARD, error=RunError) as file:
        file.write(("\n".join(text) + "\n").encode())


def _table(rows: list[tuple[str, float | None]], unit: str) -> list[str]:
    if unit != LANGUAGE:
        return [f"| | loss, nats {unit} |", "| --- | --- |", *(f"| {_text(n)} | {_number(loss)} |" for n, loss in rows)]
    head = [f"| | loss, nats {unit} | perplexity |", "| --- | --- | --- |"]
    return head + [f"| {_text(name)} | {_number(loss)} | {_number(perplexity(loss))} |" for name, loss in rows]


def perplexity(loss: float | None) -> float | None:
    """Of a mean loss in nats, up to e^700, since a float holds little more."""
    return None if loss is None else math.exp(min(loss, 700.0))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _text(text: object) -> str:
    """On one line of a table."""
    return " ".join(str(text).replace("|", "\\|").replace("`", "'").split())
