"""What the corpus card says of a document: pronouns, terms of identity, toxicity (paper 4.1, spec 8.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datatrove.data import Document

from llama2.data.settings import Card
from llama2.data.stage import fraction
from llama2.data.words import Words

#: Lines of a document → their toxicity, each from 0 to 1.
Scorer = Callable[[Sequence[str]], Sequence[float]]

_SHE = "she her hers herself"
_HE = "he him his himself"
_THEY = "they them their theirs theirself themself themselves"
#: The paper's groups of pronouns.
PRONOUNS = {
    "she": _SHE,
    "he": _HE,
    "unspecified": _THEY,
    "first person": "i me my mine myself we us our ours ourselves",
    "second person": "you your yours yourself yourselves",
    "third person": f"{_SHE} {_HE} {_THEY} it its itself",
}
#: Terms of identity by axis: those that the paper shows, and others of their kind that mean little else.
IDENTITIES = {
    "gender and sex": "female male feminine transgender masculine nonbinary cisgender intersex androgynous genderqueer",
    "sexual orientation": "gay lesbian lgbt lgbtq queer bisexual heterosexual homosexual asexual pansexual",
    "nationality": "american indian chinese korean mexican british german french japanese russian italian canadian",
    "race and ethnicity": "european african asian latin indigenous hispanic latino latina caucasian arab",
    "religion": "christian religious spiritual catholic jewish muslim buddhist hindu protestant atheist",
}
#: A first, rough idea of toxicity: words that insult. A caller with a classifier passes it in.
INSULTS = """arse arsehole ass asshole bastard bitch bitches bloody bollocks bullshit cock crap cunt damn dick dickhead
    dumbass fuck fucked fucker fucking goddamn idiot idiots imbecile jackass moron morons motherfucker piss prick pussy
    retard retarded scum shit shitty slut sluts stupid twat wanker whore whores"""


def _hashes(words: str) -> Any:
    return np.sort(Words(words).hashes)


_TERMS = {
    **{f"pronoun: {group}": _hashes(words) for group, words in PRONOUNS.items()},
    **{f"identity: {axis}": _hashes(words) for axis, words in IDENTITIES.items()},
    **{f"term: {axis}: {word}": _hashes(word) for axis, words in IDENTITIES.items() for word in words.split()},
}
_ALL = np.unique(np.concatenate(list(_TERMS.values())))
_NAMES = np.array(list(_TERMS))
_MEMBERS = np.array([np.isin(_ALL, terms) for terms in _TERMS.values()])  # (groups, all terms)
_INSULTS = frozenset(INSULTS.split())


def word_list(lines: Sequence[str]) -> list[float]:
    """Toxicity of each line by words alone: 1 where it has an insult, else 0."""
    return [float(not _INSULTS.isdisjoint(re.findall(r"\w+", line.lower()))) for line in lines]


def describe(document: Document, words: Words, toxicity: Scorer, card: Card) -> dict[str, Any]:
    """`tags`, the groups of terms that are in an English document, and for a sample of those documents `toxicity`.

    That is the mean over the lines that are not empty.
    """
    if document.metadata["language"] != "en":
        return {}
    places = np.searchsorted(_ALL, words.hashes).clip(max=len(_ALL) - 1)
    present = np.zeros(len(_ALL), bool)
    present[places[_ALL[places] == words.hashes]] = True
    facts: dict[str, Any] = {"tags": _NAMES[_MEMBERS @ present].tolist()}
    if fraction(document.id, "toxicity") < card.sample:
        lines = [line for line in document.text.split("\n") if line.strip()]
        facts["toxicity"] = float(np.mean(toxicity(lines))) if lines else 0.0
    return facts
