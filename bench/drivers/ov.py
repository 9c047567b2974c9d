"""OpenVINO GenAI's prefill and decode on a GGUF model, in the Python of its own environment; one JSON object on stdout.

Prompts are random tokens, each time others, so that none is remembered. Prefill is timed to the first token, decode by
the time between tokens after a prompt of eight, both by the pipeline's own clock, after a run of each to warm up.
Nothing of llama2 is imported.

    ov/bin/python bench/drivers/ov.py MODEL.gguf --prompt 512 --generate 128 --threads 2
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    pipeline = openvino_genai.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads)
    rng = np.random.default_rng(0)

    def run(prompt: int, answer: int) -> openvino_genai.PerfMetrics:
        ids = openvino.Tensor(rng.integers(100, 30_000, (1, prompt), dtype=np.int64))
        settings = openvino_genai.GenerationConfig(max_new_tokens=answer, min_new_tokens=answer, ignore_eos=True)
        return pipeline.generate(ids, settings).perf_metrics

    run(options.prompt, 1)
    prefill = options.prompt / run(options.prompt, 1).get_ttft().mean * 1000
    run(8, 2)
    decode = 1000 / run(8, options.generate + 1).get_tpot().mean
    print(json.dumps({"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}))


if __name__ == "__main__":
    main()
