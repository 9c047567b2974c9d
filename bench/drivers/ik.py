"""ik_llama.cpp's prefill and decode on a GGUF model, in the Python of its own environment; one JSON object on stdout.

As llama-bench does it: a prompt of random tokens, and random tokens one at a time after an empty cache, without
sampling; each once to warm up. Nothing of llama2 is imported.

    ik/bin/python bench/drivers/ik.py MODEL.gguf --prompt 512 --generate 128 --threads 2
"""

from __future__ import annotations

import argparse
import json
import random
import time

from ik_llama_cpp import _ctypes_api as C
from ik_llama_cpp._internals import IkContext, IkModel, make_batch


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    model = IkModel(options.model)
    context = IkContext(model, n_ctx=max(options.prompt, options.generate), n_threads=options.threads)
    draw = random.Random(0)

    def run(batch: C.llama_batch) -> None:
        if status := context.decode(batch):
            raise SystemExit(f"llama_decode failed with status {status}")
        context.get_logits(-1)  # waits for the result

    def seconds(tokens: int, at_once: int) -> float:
        """Of `tokens` random tokens after an empty cache, so many in one batch."""
        context.kv_cache_clear()
        batch = make_batch([0] * at_once)
        start = time.perf_counter()
        for first in range(0, tokens, at_once):
            for i in range(at_once):
                batch.token[i] = draw.randrange(model.n_vocab)
                batch.pos[i] = first + i
            run(batch)
        elapsed = time.perf_counter() - start
        C.llama_batch_free(batch)
        return elapsed

    seconds(options.prompt, options.prompt)
    prefill = options.prompt / seconds(options.prompt, options.prompt)
    seconds(1, 1)
    decode = options.generate / seconds(options.generate, 1)
    print(json.dumps({"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}))


if __name__ == "__main__":
    main()
