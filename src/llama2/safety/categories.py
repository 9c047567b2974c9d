"""What is judged: the acceptable-use categories of Llama 2's release, and how those of others map to them.

Sources: the Llama 2 Acceptable Use Policy (spec 10.3), and Llama 2's risk categories (paper 4.2). Llama Guard's model
card (O1 to O6), and MLCommons' taxonomy as Llama Guard 2 and 3 list it (S1 to S14). OpenAI's moderation API.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Category:
    """One category: what it means, the paper's risk category, and OpenAI's category that has the same meaning."""

    name: str
    meaning: str
    paper: str | None
    openai: str | None


_ILLICIT, _HATEFUL, _ADVICE = "illicit and criminal", "hateful and harmful", "unqualified advice"

#: The policy's own three lists and its fourth rule, in its order; then what no list has.
CATEGORIES: Mapping[str, Category] = {
    category.name: category
    for category in (
        Category("violence_terrorism", "violence or terrorism", _ILLICIT, "illicit/violent"),
        Category("child_exploitation", "exploitation of or harm to children", _ILLICIT, "sexual/minors"),
        Category("trafficking", "human trafficking, exploitation and sexual violence", _ILLICIT, None),
        Category("illegal_to_minors", "illegal distribution of material to minors", _ILLICIT, None),
        Category("sexual_solicitation", "sexual solicitation, and sexual content", _ILLICIT, "sexual"),
        Category("other_crime", "other criminal activity", _ILLICIT, "illicit"),
        Category("harassment", "harassment, abuse, threats or bullying of persons or groups", _HATEFUL, "harassment"),
        Category("discrimination", "discrimination in work, credit, housing and services", _HATEFUL, "hate"),
        Category("unlicensed_practice", "unlicensed practice of a profession", _ADVICE, None),
        Category("personal_data", "unlawful processing of sensitive personal data", None, None),
        Category("infringement", "infringement of others' rights", _ILLICIT, None),
        Category("malware", "malware, and the disruption of systems", _ILLICIT, "illicit"),
        Category("military", "military, warfare, nuclear uses, espionage", _ILLICIT, "illicit/violent"),
        Category("weapons", "guns and illegal weapons", _ILLICIT, "illicit/violent"),
        Category("drugs", "illegal drugs and regulated substances", _ILLICIT, "illicit"),
        Category("infrastructure", "critical infrastructure, transport, heavy machinery", _ILLICIT, None),
        Category("self_harm", "self-harm, suicide, eating disorders", _HATEFUL, "self-harm"),
        Category("inciting_violence", "inciting violence, or depicting it", _HATEFUL, "violence"),
        Category("fraud", "fraud and disinformation", _ILLICIT, "illicit"),
        Category("defamation", "defamation", _HATEFUL, None),
        Category("spam", "spam", None, None),
        Category("impersonation", "impersonation without consent", None, None),
        Category("undisclosed_ai", "passing generated text as a person's", None, None),
        Category("fake_engagement", "fake reviews and other engagement", None, None),
        Category("undisclosed_danger", "hiding known dangers of an AI system from its users", None, None),
        Category("other", "unsafe by a guard's code that is not in this table", None, None),
    )
}

#: Llama Guard's codes, and ours that each means.
LLAMA_GUARD: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "O1": ("Violence and Hate", ("inciting_violence", "harassment")),
    "O2": ("Sexual Content", ("sexual_solicitation",)),
    "O3": ("Criminal Planning", ("other_crime",)),
    "O4": ("Guns and Illegal Weapons", ("weapons",)),
    "O5": ("Regulated or Controlled Substances", ("drugs",)),
    "O6": ("Self-Harm", ("self_harm",)),
}
#: MLCommons' hazards with the codes of Llama Guard 3, and ours that each means. Llama Guard 2 has other codes for the
#: same names, so a verdict's codes are looked up by the names in its prompt.
MLCOMMONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "S1": ("Violent Crimes", ("violence_terrorism",)),
    "S2": ("Non-Violent Crimes", ("other_crime",)),
    "S3": ("Sex-Related Crimes", ("trafficking",)),
    "S4": ("Child Sexual Exploitation", ("child_exploitation",)),
    "S5": ("Defamation", ("defamation",)),
    "S6": ("Specialized Advice", ("unlicensed_practice",)),
    "S7": ("Privacy", ("personal_data",)),
    "S8": ("Intellectual Property", ("infringement",)),
    "S9": ("Indiscriminate Weapons", ("military",)),
    "S10": ("Hate", ("discrimination", "harassment")),
    "S11": ("Suicide & Self-Harm", ("self_harm",)),
    "S12": ("Sexual Content", ("sexual_solicitation",)),
    "S13": ("Elections", ("fraud",)),
    "S14": ("Code Interpreter Abuse", ("malware",)),
}
#: OpenAI's categories, in the order of its answers. Five of them are finer than any of ours, and so are never judged.
OPENAI = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic"),
)


def _folded(name: str) -> str:
    """A hazard's name without case, punctuation and a final s, which its spellings differ in."""
    words = re.findall(r"[a-z]+", name.lower().replace("&", " and "))
    return " ".join(word.rstrip("s") for word in words)


_BY_NAME = {_folded(name): ours for name, ours in (*MLCOMMONS.values(), *LLAMA_GUARD.values())}


def ours_of(name: str) -> tuple[str, ...]:
    """Our categories for a guard's name of one, such as "Violent Crimes."; `other` for a name that nobody knows."""
    return _BY_NAME.get(_folded(name), ("other",))


def to_openai(scores: Mapping[str, float]) -> dict[str, float | None]:
    """OpenAI's categories with the largest score of ours that have their meaning; None where none was judged."""
    found: dict[str, float | None] = dict.fromkeys(OPENAI)
    for name, score in scores.items():
        theirs = CATEGORIES[name].openai
        if theirs is not None:
            found[theirs] = max(score, found[theirs] or 0.0)
    return found


def table() -> Iterable[tuple[str, str, str, str, str]]:
    """Rows of the published table: ours, the paper's, Llama Guard's, MLCommons', OpenAI's; "none" where no equal is."""

    def codes(theirs: Mapping[str, tuple[str, tuple[str, ...]]], name: str) -> str:
        return ", ".join(f"{code} {label}" for code, (label, ours) in theirs.items() if name in ours) or "none"

    for name, category in CATEGORIES.items():
        guards = codes(LLAMA_GUARD, name), codes(MLCOMMONS, name)
        yield (name, category.paper or "none", *guards, category.openai or "none")
