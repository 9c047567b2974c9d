"""Sets about truth and bias as rows, in the fields that they have in public."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llama2.data.set_files import Row, SetFile, Splits
from llama2.errors import EvaluationError

_PRONOUN = re.compile(r"he|she|him|her|his|hers|they|them|their|theirs|himself|herself")


def truthfulqa(found: Mapping[str, SetFile]) -> Splits:
    """TruthfulQA: `question`, and `mc0_targets`, `mc1_targets`, `mc2_targets`, each with `choices` and `labels` (0, 1).

    mc0 is the binary choice of 2025; in mc0 and mc1 one choice is true, and it is the first.
    """
    names = ("mc0_targets", "mc1_targets", "mc2_targets")
    rows = []
    for file in found.values():
        for where, row in file.elements(question=str, **dict.fromkeys(names, dict)):
            asked: Row = {"question": row["question"]}
            for name in names:
                choices, labels = list(row[name]), list(row[name].values())
                if not {0, 1} == {*labels}:
                    raise EvaluationError(f"{where}: {name} has no true choice, or no false one; check the file")
                if name != "mc2_targets" and (labels[0], sum(labels)) != (1, 1):
                    raise EvaluationError(f"{where}: the first choice of {name} is not the true one; check the file")
                asked[name] = {"choices": choices, "labels": labels}
            rows.append(asked)
    return {"validation": rows}


def crows_pairs(found: Mapping[str, SetFile]) -> Splits:
    """CrowS-Pairs: `sent_more` (the more stereotyped sentence), `sent_less`, `stereo_antistereo`, `bias_type`."""
    names = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    return {"test": [row for file in found.values() for _, row in file.table(*names)]}


def winogender(found: Mapping[str, SetFile]) -> Splits:
    """Winogender: `sentence`, `pronoun`, `occupation`, `participant`, `label`, `gender`, `template`.

    `label` is 0 where the pronoun refers to the occupation, and 1 for the participant. `template` is what the three
    genders of a sentence share.
    """
    rows = []
    for file in found.values():
        for where, row in file.table("sentid", "sentence", delimiter="\t"):
            name = re.fullmatch(r"([^.]+)\.([^.]+)\.([01])\.(male|female|neutral)\.txt", row["sentid"])
            if name is None:
                raise EvaluationError(f"{where}: the field 'sentid' is not the name of a sentence; check the file")
            occupation, participant, answer, gender = name.groups()
            rows.append(
                {
                    "sentence": row["sentence"],
                    "pronoun": _pronoun(where, row["sentence"]),
                    "occupation": occupation,
                    "participant": participant,
                    "label": int(answer),
                    "gender": gender,
                    "template": f"{occupation}.{participant}.{answer}",
                }
            )
    return {"test": rows}


def _pronoun(where: str, sentence: str) -> str:
    """The one pronoun of a sentence."""
    found = [word for word in re.findall(r"[a-z]+", sentence.lower()) if _PRONOUN.fullmatch(word)]
    if len({*found}) != 1:
        raise EvaluationError(f"{where}: the sentence does not have one pronoun; check the file")
    return found[0]


def winobias(found: Mapping[str, SetFile]) -> Splits:
    """WinoBias: `sentence`, `pronoun`, `choices` (the occupations), `label`, `stereotype`, `type`, `pair`.

    `stereotype` is "pro" where the pronoun is of the gender that is usual in the occupation it refers to, else "anti".
    `pair` is what the two versions of a sentence share. Type 1 needs knowledge of the world, type 2 syntax alone.
    """
    lists = [file for file in found.values() if "occupations" in file.path.name]
    names = [re.escape(line.strip().lower()) for file in lists for _, line in file.lines()]
    occupations = sorted(names, key=len, reverse=True)
    splits: Splits = {}
    for file in found.values():
        kind = re.fullmatch(r"(pro|anti)_stereotyped_type([12])\.txt\.(\w+)", file.path.name)
        if kind is None:
            continue
        stereotype, type, split = kind.groups()
        for number, (where, line) in enumerate(file.lines(), 1):
            row = _coreference(where, line, occupations)
            about = {"stereotype": stereotype, "type": type, "pair": f"{type}.{number}"}
            splits.setdefault(split, []).append(row | about)
    return splits


def _coreference(where: str, line: str, occupations: list[str]) -> Row:
    """A sentence of WinoBias, without the brackets around the pronoun and what it refers to."""
    marked = re.fullmatch(r"\d+ (.*)", line.strip())
    mentions = [mention.strip().lower() for mention in re.findall(r"\[(.*?)\]", line)]
    pronouns = [mention for mention in mentions if _PRONOUN.fullmatch(mention)]
    if marked is None or not pronouns or len(mentions) != len(pronouns) + 1:
        raise EvaluationError(f"{where}: is not a sentence in which a person and pronouns are marked; check the file")
    sentence = " ".join(re.sub(r"\bthe \[the ", "[the ", marked[1]).replace("[", "").replace("]", "").split())
    there = list(dict.fromkeys(re.findall(rf"\b({'|'.join(occupations)})\b", sentence.lower())))
    (person,) = (mention for mention in mentions if mention not in pronouns)
    meant = [each for each in there if person.endswith(each)]
    if len(there) < 2 or len(meant) != 1:
        raise EvaluationError(f"{where}: does not have two occupations, one of which is marked; check the file")
    return {
        "sentence": sentence,
        "pronoun": pronouns[0],
        "choices": there,
        "label": there.index(meant[0]),
    }


READERS = (truthfulqa, crows_pairs, winogender, winobias)
