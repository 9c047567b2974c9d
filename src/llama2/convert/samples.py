"""What the receipt gives to both models: 1,000 strings, 50 dialogs, how a text begins. The same ones everywhere."""

from __future__ import annotations

from hashlib import sha256

from llama2.text.dialog import Message

STRINGS, DIALOGS = 1000, 50

#: The text that both models continue.
PROMPT = "Once upon a time"

_WORDS = """
    the and of to Hello World don't I'm they've naïve über señor Łódź İstanbul ﬁne Привет мир Ελληνικά שלום مرحبا नमस्ते
    สวัสดี 你好，世界。 日本語 カタカナ 한국어 გამარჯობა አማርኛ தமிழ் 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 é ́ ½ ² Ⅷ ٣٤ 12 345 3.14159 1,000,000
    0x1F 2024-02-29 😀 👩‍👩‍👧 🇩🇪 👍🏽 https://a.b/c?d=e&f=%20 user@example.org x=1; foo_bar() def if(a<b){ }=>
    // /* */ \\n C++17 #include <b> </b> ... ?! — „“ ‘’ € £ § ▁ ▁a <s> </s> <unk> [INST] [/INST] <<SYS>> <</SYS>> <0x0A>
    <|im_start|> <|im_end|> <|eot_id|> <|endoftext|> <|begin_of_text|> [PAD1]
""".split()  # noqa: SIM905
_SPACES = (" ", " ", " ", " ", "", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b")
_ODD = ("\x00", "\x1b", "\x7f", "\u00ad", "\u202e", "\ufeff", "\ufffd", "\ue000", "\U0010fffd", "\udc80", "\ud800")
_EDGES = (
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "a ",
    " a b  c ",
    "a" * 99,
    " " * 99,
    "\n" * 33,
    "0" * 33,
    "é" * 33,
    "😀" * 33,
)


def strings() -> list[str]:
    """Words of many scripts, digits, code, emoji, white space, what looks like control tokens.

    Each third string also has a code point at random. Each twentieth has one that is seldom right, or half of a
    surrogate pair, which is refused.
    """
    made = [*_EDGES]
    for number in range(STRINGS - len(_EDGES)):
        dice = sha256(number.to_bytes(4)).digest()  # random, and the same everywhere
        parts = [
            _WORDS[(256 * dice[i] + dice[i + 1]) % len(_WORDS)] + _SPACES[dice[i + 2] % len(_SPACES)]
            for i in range(0, 3 * (1 + dice[30] % 8), 3)
        ]
        if number % 3 == 0:
            point = int.from_bytes(dice[24:27]) % (0x80, 0x800, 0x10000, 0x110000)[dice[27] % 4]
            parts.append("" if 0xD800 <= point < 0xE000 else chr(point))
        if number % 20 == 0:
            parts.insert(dice[28] % len(parts), _ODD[dice[29] % len(_ODD)])
        made.append("".join(parts))
    return made


def dialogs() -> list[list[Message]]:
    """One to three rounds, with and without a system message, ending with either side; texts of `strings`."""
    texts = [text for text in strings() if text.strip() and text.isprintable()]
    made = []
    for number in range(DIALOGS):
        roles = ["user", "assistant"] * (1 + number % 3)
        roles = ["system"] * (number % 2) + roles[: len(roles) - number // 6 % 2]
        made.append([Message(role, texts[(7 * number + i) % len(texts)]) for i, role in enumerate(roles)])
    return made
