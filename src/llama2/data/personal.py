"""Personal information: what is replaced in texts, and sources that are known to hold much of it."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from functools import partial
from urllib.parse import urlsplit

#: Sites whose business is information about private people.
PEOPLE_SEARCH = frozenset(
    [
        "411.com",
        "anywho.com",
        "beenverified.com",
        "clustrmaps.com",
        "cyberbackgroundchecks.com",
        "familytreenow.com",
        "fastpeoplesearch.com",
        "instantcheckmate.com",
        "intelius.com",
        "mylife.com",
        "nuwber.com",
        "peekyou.com",
        "peoplebyname.com",
        "peoplefinders.com",
        "peoplelooker.com",
        "peoplesmart.com",
        "pipl.com",
        "privateeye.com",
        "publicrecordsnow.com",
        "radaris.com",
        "searchpeoplefree.com",
        "smartbackgroundchecks.com",
        "spokeo.com",
        "spyfly.com",
        "thatsthem.com",
        "truepeoplesearch.com",
        "truthfinder.com",
        "usphonebook.com",
        "ussearch.com",
        "veripages.com",
        "whitepages.com",
        "zabasearch.com",
    ]
)


def blocked(address: str, hosts: frozenset[str]) -> bool:
    """Whether an address is on one of `hosts` or below one."""
    try:
        host = (urlsplit(address).hostname or "").lower()
    except ValueError:
        return True
    labels = host.split(".")
    return any(".".join(labels[i:]) in hosts for i in range(len(labels)))


def _global_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _luhn(text: str) -> bool:
    """Whether the digits end with their own check digit (ISO/IEC 7812), as payment cards' do."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) in range(13, 20) and digits[0] in range(3, 7) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """Whether an account number has the right check digits (ISO 13616)."""
    plain = re.sub(r"\s", "", text)
    moved = plain[4:] + plain[:4]
    return len(plain) in range(15, 35) and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _phone(text: str) -> bool:
    return sum(c.isdigit() for c in text) in range(8, 16)


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
#: Where digits are that could be any of the kinds below.
_DIGITS = re.compile(r"\d[\d ().-]{5,}\d|\d\d ?[A-Z0-9]{4} ?[A-Z0-9]{4} ?")
_KINDS = (
    ("IBAN", re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    ("CARD", re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])"), _luhn),
    ("SSN", re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"), lambda _: True),
    ("IP", re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)"), _global_address),
    ("PHONE", re.compile(r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,5}(?![\w-])"), _phone),
    (
        "PHONE",
        re.compile(r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}(?![\w-]|\.\d)"),
        lambda _: True,
    ),
)


def replace(text: str) -> tuple[str, Counter[str]]:
    """`text` with [EMAIL], [PHONE], [IP], [SSN], [CARD] and [IBAN] in place of what they name, and how many.

    Phone numbers are those of North America and those with a country's code. Numbers that carry a check digit count
    only where it is right, and addresses of machines only where they are public.
    """
    found: Counter[str] = Counter()

    def replaced(kind: str, valid: object, match: re.Match[str]) -> str:
        if not callable(valid) or not valid(match[0]):
            return match[0]
        found[kind] += 1
        return f"[{kind}]"

    if "@" in text:
        text = _EMAIL.sub(partial(replaced, "EMAIL", lambda _: True), text)
    if _DIGITS.search(text):
        for kind, pattern, valid in _KINDS:
            text = pattern.sub(partial(replaced, kind, valid), text)
    return text, found
