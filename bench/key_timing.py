"""Does the time of a refusal tell how much of a guessed key is right? 10⁵ guesses, four kinds by turns.

Guesses share nothing with the key, half of it, or all but its last character, or have another length. The table has
each kind's median and the difference from the first kind in standard errors of a trimmed mean; a difference that
means something would be several of those, and grow with what is right.

    python bench/key_timing.py -m MODEL.gguf > key_timing.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from pathlib import Path

from http_load import ours, running
from provenance import provenance

KEY = "0123456789abcdef" * 4
KINDS = {
    "nothing": "x" * len(KEY),
    "half": KEY[: len(KEY) // 2] + "x" * (len(KEY) // 2),
    "all but one": KEY[:-1] + "x",
    "another length": "x",
}


def trimmed(times: list[float]) -> list[float]:
    """The faster half, which says less about the machine's other work."""
    return sorted(times)[: len(times) // 2]


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a model's file")
    parser.add_argument("--guesses", type=int, default=100_000, help="how many (default 100000)")
    options = parser.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rng = random.Random(0)
    with running("llama2", ours("-m", str(options.model)), {"LLAMA2_API_KEY": KEY}) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for _ in range(options.guesses // len(KINDS)):
            for kind in rng.sample(list(KINDS), len(KINDS)):
                start = time.perf_counter()
                connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KINDS[kind]}"})
                response = connection.getresponse()
                response.read()
                times[kind].append(time.perf_counter() - start)
                if response.status != 401:
                    raise SystemExit(f"{kind}: status {response.status}")
    kept = {kind: trimmed(values) for kind, values in times.items()}
    first = kept["nothing"]
    rows = {}
    for kind, values in kept.items():
        error = (statistics.variance(values) / len(values) + statistics.variance(first) / len(first)) ** 0.5
        difference = statistics.fmean(values) - statistics.fmean(first)
        rows[kind] = {
            "guesses": len(times[kind]),
            "median_us": round(statistics.median(times[kind]) * 1e6, 2),
            "difference_us": round(difference * 1e6, 3),
            "standard_errors": round(difference / error, 2),
        }
    json.dump({**provenance(), "kinds": rows}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
