"""How byte-level vocabularies split text into words: regular expressions by llama.cpp's names of pre-tokenizers.

The expressions of a list apply in turn, each within what those before it left in one piece. A match becomes a word, and
so does what lies between two matches. They were compared with llama.cpp's own vectors (bench/llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
#: Llama 3's: contractions, words, up to three digits, punctuation, line ends, spaces. Qwen 2 has digits one by one.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

#: The expressions of each name of ours, and whether a word that is a token becomes that token whatever the merges say.
SPLITS: dict[str, tuple[list[str], bool]] = {
    "smollm": ([_DIGIT, _GPT2], False),
    "gpt2": ([_GPT2], False),
    "llama-bpe": ([_LLAMA3], True),
    "dbrx": ([_LLAMA3], False),
    "qwen2": ([_QWEN2], False),
    "tekken": ([_TEKKEN], True),
    "deepseek-llm": (
        [r"[\r\n]", f"\\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_MARKS, r"\s+$", _EAST_ASIAN, r"\p{N}+"],
        False,
    ),
    "deepseek-coder": ([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT], False),
    "deepseek-v3": (
        [
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        False,
    ),
    "falcon": ([r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"], False),
    "default": ([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], False),
}

#: Ours by the names that llama.cpp gives files. The names of one group mean the same expressions.
PRE_TOKENIZERS = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt2", "gpt-2", "phi-2", "gigachat", "mpt", "olmo", "jais", "trillion", "exaone4"), "gpt2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), "qwen2"),
    **{name: name for name in ("tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "default")},
}
#: Those whose prompts begin with BOS where a file does not say it.
BEGINS = frozenset({"llama-bpe", "tekken"})


def ignores_merges(name: str) -> bool:
    """Whether a word that is a token becomes that token, whatever the merges say."""
    return SPLITS[name][1]


def pre_tokenizer(name: str) -> Any:
    """The tokenizers library's object that splits text into words by the rules of a key of SPLITS."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as library

    expressions, _ = SPLITS[name]
    by_itself = expressions[-1] == _GPT2  # which the library has built in
    steps = [
        library.Digits(individual_digits=True) if each == _DIGIT else library.Split(Regex(each), behavior="isolated")
        for each in (expressions[:-1] if by_itself else expressions)
    ]
    letters = library.ByteLevel(add_prefix_space=False, use_regex=by_itself)
    return library.Sequence([*steps, letters]) if steps else letters


def find(rules: Any, ignores: bool) -> str | None:
    """The name of rules as `tokenizer.json` writes a pre-tokenizer, and of how it takes whole words; None without."""
    found = _expressions(rules)
    return next((name for name, known in SPLITS.items() if known == (found, ignores)), None)


def _expressions(rules: Any) -> list[str] | None:
    """The expressions that a pre-tokenizer of `tokenizer.json` applies in turn; None for any other rules."""
    steps: Sequence[Any] = rules["pretokenizers"] if rules and rules.get("type") == "Sequence" else [rules]
    found = []
    for i, step in enumerate(steps):
        match step:
            case {"type": "Split", "pattern": {"Regex": str(each)}, "behavior": "Isolated", "invert": False}:
                found.append(each.replace("\r", r"\r").replace("\n", r"\n"))  # some files have line ends themselves
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False} if i == len(steps) - 1:
                return [*found, _GPT2] if step.get("use_regex", True) else found
            case _:
                return None
    return None
