"""Train a SentencePiece BPE vocabulary with the settings that Llama 2's own file states (spec 2.1)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llama2.errors import TokenizerError
from llama2.text.tokenizer import one_line

#: Bytes of the longest line that is trained on, as Llama 2 had it.
LONGEST_LINE = 4192


@dataclass(frozen=True, slots=True)
class Trained:
    """A `tokenizer.model` as bytes, how many lines it was trained on, and how many were too long for that."""

    model: bytes
    lines: int
    too_long: int


def train(
    texts: Iterable[str], vocabulary: int, *, exact: bool = True, sample: int = 2_000_000, threads: int = 1
) -> Trained:
    """A vocabulary of so many tokens, three control tokens and 256 bytes among them, trained on lines of text.

    Of more than `sample` lines, it is trained on a random choice of so many, always the same one, which bounds memory.
    Each digit is a token, a text gets a space in front and is not changed otherwise, and what has no token is bytes.
    Raises TokenizerError without text, or when it is too little for `exact` so many tokens. Otherwise, little text
    gives fewer tokens.
    """
    from sentencepiece import SentencePieceTrainer, set_random_generator_seed

    counted = _Lines(texts)
    model = io.BytesIO()
    set_random_generator_seed(0)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=exact,
            character_coverage=0.99995,
            input_sentence_size=sample,
            shuffle_input_sentence=True,
            max_sentence_length=LONGEST_LINE,
            max_sentencepiece_length=16,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            split_by_number=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" \u2047 ",
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"no vocabulary of {vocabulary} tokens can be trained on {counted.lines} lines "
            f"({one_line(error)}); give more text or a smaller vocabulary"
        ) from None
    return Trained(model.getvalue(), counted.lines, counted.too_long)


class _Lines:
    """Lines of texts that the library takes, and how many there were."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.lines = self.too_long = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for line in text.split("\n"):
                if len(line.encode()) > LONGEST_LINE:
                    self.too_long += 1
                elif line and "\0" not in line:
                    self.lines += 1
                    yield line
