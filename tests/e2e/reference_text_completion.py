"""A script as people wrote them for the reference implementation; only its first import differs."""

import sys
from typing import List, Optional  # noqa: UP035

from llama2 import Llama


def main(
    ckpt_dir: str,
    tokenizer_path: Optional[str] = None,  # noqa: UP045
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 24,
    max_batch_size: int = 4,
) -> None:
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts: List[str] = [  # noqa: UP006
        "The three primary colours are",
        "Water boils at",
        """English to German:

        one => eins
        two => zwei
        three =>""",
    ]
    results = generator.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    main(sys.argv[1], temperature=float(sys.argv[2]))
