"""One SHA-256 over what a model answers: greedy tokens with their log-probabilities, and a seeded sample.

    python bench/tokens_digest.py MODEL [--isa avx2]

Two builds of the native runner on one instruction set should print the same: compilers, systems and C libraries change
no bit. Prints JSON with the digest and what it was made of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import struct
import sys

PROMPTS = ("The capital of Italy is", "def fibonacci(n):", "Once upon a time", "1, 2, 3, 4,")
TOKENS = 64


def main() -> None:
    """Answer, hash, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="name, file or folder")
    parser.add_argument("--isa", help="the instruction set (default the best)")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default 1)")
    options = parser.parse_args()
    if options.isa:
        os.environ["LLAMA2_ISA"] = options.isa

    import llama2
    from llama2 import native

    hashing = hashlib.sha256()
    with llama2.load(options.model, threads=options.threads, context=512) as model:
        answers = [model.generate(text, max_tokens=TOKENS, temperature=0, logprobs=3) for text in PROMPTS]
        answers.append(model.generate(PROMPTS[2], max_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=7, logprobs=3))
    for answer in answers:
        hashing.update(struct.pack(f"<{len(answer.token_ids)}i", *answer.token_ids))
        for each in answer.logprobs or ():
            hashing.update(struct.pack("<if", each.token, each.logprob))
            for token, logprob in each.top:
                hashing.update(struct.pack("<if", token, logprob))
    json.dump(
        {
            "sha256": hashing.hexdigest(),
            "tokens": sum(len(answer.token_ids) for answer in answers),
            "isa": options.isa or native.supported()[0],
            "system": platform.system(),
            "machine": platform.machine(),
        },
        sys.stdout,
    )
    print()


if __name__ == "__main__":
    main()
