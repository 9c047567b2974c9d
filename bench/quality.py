"""How much a runner's arithmetic costs in quality: teacher-forced comparison with the NumPy oracle on real text.

Windows, positions and figures are those of llama2.engine.divergence. One JSON object on stdout.

    python bench/quality.py -m MODEL.gguf --text wikitext-2-test.txt
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from provenance import provenance

from llama2 import checkpoint
from llama2.engine.divergence import DivergenceReport, compare, logits, windows
from llama2.engine.runner import Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.scheduler import blocks_for


def measure(model: Path, text: str, *, window: int, positions: int, threads: int) -> dict[str, object]:
    """Compare the native runner with the NumPy runner on `text`."""
    with checkpoint.open(model) as opened:
        blocks = blocks_for(window)
        runners: dict[str, Runner] = {
            "native": NativeRunner(opened, blocks, threads=threads),
            "numpy": NumpyRunner(opened, blocks),
        }
        seconds = dict.fromkeys(runners, 0.0)
        parts = []
        for tokens in windows(text, opened.tokenizer, window, positions):
            rows = {}
            for name, runner in runners.items():
                start = time.perf_counter()
                rows[name] = logits(runner, tokens)
                seconds[name] += time.perf_counter() - start
            parts.append(compare(rows["native"], rows["numpy"], tokens[1:]))
        agreement = DivergenceReport.join(parts)
        if len(agreement.loss) < positions:
            raise SystemExit(f"the text has {len(agreement.loss)} positions; give a longer one or fewer --positions")
        return {
            "model": model.name,
            "window": window,
            "bos": opened.tokenizer.add_bos,
            "threads": threads,
            **agreement.summary(),
            "seconds": seconds,
        }


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--window", type=int, default=512, help="tokens of context that start afresh (default 512)")
    parser.add_argument("--positions", type=int, default=20_000, help="predictions to compare (default 20000)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the native runner (default 2)")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    figures = measure(options.model, text, window=options.window, positions=options.positions, threads=options.threads)
    json.dump({**provenance(), "text": options.text.name, **figures}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
