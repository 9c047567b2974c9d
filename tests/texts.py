"""Varied strings and small vocabularies for tests of text."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2.text.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    Ends,
    Tokenizer,
    from_merges,
    from_pieces,
    from_scores,
)

_WORDS = """
    the of and to in is it that Hello World don't we'LL I'm it's he'd they've naïve café über señor Привет мир 日本語
    你好，世界。 안녕 สวัสดี مرحبا שלום नमस्ते ελληνικά x=1 foo_bar() C++17 3.14 1,000 12345 2³ Ⅷ ½ ٣٤ <b> </b> [INST]
    [/INST] <<SYS>> <s> </s> <unk> <|im_start|> <|im_end|> <|eot_id|> <0x0A> https://a.b/c?d=e&f=%20
""".split()  # noqa: SIM905
_PARTS = [
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\u2581", "'", '"', "-", "_"),
    *(
        "e\u0301",
        "\u0301\u0302",
        "👩‍👩‍👧",
        "🇩🇪",
        "😀",
        "𝔘𝔫𝔦",
        "\x00",
        "\x1b",
        "\ufeff",
        "\ufffd",
        "\U0010fffd",
        "ﬁ",
        "Å",
        "ς",
    ),
]


def strings(count: int, seed: int = 0, words: float = 0.7) -> list[str]:
    """`count` strings: a few edge cases, a share of `words` and white space of many scripts, code points at random."""
    rng = random.Random(seed)
    made = [
        "",
        " ",
        "a",
        " a",
        "a ",
        "  a  b  ",
        "\n",
        "12 345",
        "don't",
        "DON'T",
        "e" * 999,
        " " * 99,
        "\n" * 33 + "x",
    ]
    while len(made) < count:
        if rng.random() < words:
            made.append("".join(rng.choice(rng.choice((_WORDS, _PARTS, [" "]))) for _ in range(rng.randint(1, 24))))
        else:
            top = rng.choice((0x80, 0x800, 0x10000, 0x110000))
            points = (rng.randrange(top) for _ in range(rng.randint(1, 24)))
            made.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return made


def train_sentencepiece(
    vocab_size: int = 700, user_defined: Sequence[str] = ("<tool>", "▁▁▁"), **options: Any
) -> bytes:
    """A SentencePiece model with Llama 2's training options (spec 2.1) but for `options`, from texts made here."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(s for s in strings(4000, seed=7, words=1) if s.strip() and "\x00" not in s),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "character_coverage": 0.99,
            "max_sentence_length": 4192,
            "max_sentencepiece_length": 16,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "unk_surface": " \u2047 ",
            "user_defined_symbols": [*user_defined],
            "num_threads": 1,
            "minloglevel": 2,
            **options,
        },
    )
    return model.getvalue()


def train_bpe(pre: str, path: Path, vocab_size: int = 900) -> Path:
    """A `tokenizer.json` with a pre-tokenizer as the Hugging Face repositories of that family have it."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    first: dict[str, list[Any]] = {
        "gpt2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(llama3), "isolated", invert=False)],
    }
    library = Library(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = pre_tokenizers.Sequence([*first[pre], byte_level]) if first[pre] else byte_level
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(strings(4000, seed=7), trainer)
    library.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool><tool>", normalized=False)])
    library.save(str(path))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return path


def llama2_tokenizer() -> Tokenizer:
    """Llama 2's vocabulary with the pieces that the texts of its published vectors need, all at their own ids."""
    pieces = [f"<unused{i}>" for i in range(32000)]
    types = [UNUSED] * 32000
    pieces[:3], types[:3] = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    pieces[3:259], types[3:259] = [f"<0x{byte:02X}>" for byte in range(256)], [BYTE] * 256
    data = json.loads(Path(__file__).with_name("data").joinpath("llama2_pieces.json").read_text(encoding="utf-8"))
    for token, piece in data["pieces"].items():
        pieces[int(token)], types[int(token)] = piece, NORMAL
    scores = [0.0 if i < 259 else -1e9 if not piece.strip("▁") else 259.0 - i for i, piece in enumerate(pieces)]
    return from_pieces(pieces, scores, types)


def from_parts(kind: str, pieces: Sequence[str], **parts: Any) -> Tokenizer:
    """A tokenizer of a `Vocabulary`'s fields and those of `Ends`, by name."""
    named = {name: parts.get(name) for name in ("types", "scores", "merges", "pre", "unk_id")}
    ends = Ends(**{name: value for name, value in parts.items() if name in Ends.__slots__})
    if kind == "bpe":
        return from_merges(pieces, named["types"], named["merges"], named["pre"], ends)
    scheme = parts.get("prepend_scheme", "never")
    return from_scores(
        pieces, named["scores"] or (), named["types"], ends, unk_id=named["unk_id"], prepend_scheme=scheme
    )
