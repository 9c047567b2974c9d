"""What tuning on one's own dialogs gives and takes: losses of answers, perplexity of another text, what is answered.

The model is tuned once by the fitted settings, and once at each `--rate` besides. One JSON object on stdout.

    python bench/own_data.py recipes/data/tool-library.json --text wikitext-2-test.txt --rate 1e-3 --ask "Who runs it?"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from provenance import provenance

import llama2
from llama2 import checkpoint, hub, recipe
from llama2.cli.training import ConsoleReporter
from llama2.engine.divergence import log_softmax, logits, windows
from llama2.engine.runner_native import NativeRunner
from llama2.engine.scheduler import blocks_for
from llama2.train.sft import sft
from llama2.train.tuning import SftRecipe


def perplexity(model: Path, text: str, *, window: int, positions: int) -> float:
    """Of the text's first predictions, in windows that start afresh."""
    losses = []
    with checkpoint.open(model) as opened:
        runner = NativeRunner(opened, blocks_for(window))
        for tokens in windows(text, opened.tokenizer, window, positions):
            scores = log_softmax(logits(runner, tokens).astype(np.float64))
            losses.append(-scores[np.arange(len(scores)), tokens[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def look(model: Path, options: argparse.Namespace) -> dict[str, object]:
    """Perplexity and answers of a model."""
    found: dict[str, object] = {}
    if options.text:
        text = options.text.read_text(encoding="utf-8")
        found["perplexity"] = perplexity(model, text, window=options.window, positions=options.positions)
    with llama2.load(model) as loaded:
        found["answers"] = {q: loaded.chat(q, temperature=0, max_tokens=64).text for q in options.ask}
    return found


def main() -> None:
    """Parse the command line, tune, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", help="files and folders of dialogs")
    parser.add_argument("-m", "--model", default=hub.DEFAULT, help="the model to begin with")
    parser.add_argument(
        "--rate", type=float, action="append", default=[], help="another learning rate; may be repeated"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    parser.add_argument("--ask", action="append", default=[], help="a question; may be repeated")
    parser.add_argument("--text", type=Path, help="a UTF-8 text whose perplexity is measured")
    parser.add_argument("--window", type=int, default=512, help="tokens of context that start afresh (default 512)")
    parser.add_argument("--positions", type=int, default=20_000, help="predictions of the text (default 20000)")
    options = parser.parse_args()
    start = hub.locate(options.model)
    runs = []
    for rate in [None, *options.rate]:
        settings = [f"data.files={json.dumps(options.data)}", f"start={json.dumps(str(start))}", *options.set]
        settings += [] if rate is None else [f"optimizer.lr={rate}"]
        asked = recipe.make({}, SftRecipe, settings, where="own_data")
        with TemporaryDirectory() as folder:
            begun = time.perf_counter()
            tuned = sft(asked, Path(folder) / "run", locate=hub.locate, reporter=ConsoleReporter())
            seconds = time.perf_counter() - begun
            used = tuned.run.recipe
            fitted = {name: used[name] for name in ("steps", "epochs", "batch", "optimizer", "precision", "compile")}
            losses = {"before": tuned.before and tuned.before._asdict(), "after": tuned.after._asdict()}
            runs.append(
                {**fitted, "data": used["data"], "seconds": seconds, **losses, **look(tuned.run.folder, options)}
            )
    json.dump(
        {**provenance(), "model": start.name, "untuned": look(start, options), "runs": runs}, sys.stdout, indent=1
    )
    print()


if __name__ == "__main__":
    main()
