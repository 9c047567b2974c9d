"""Sets about truth, bias and harm as rows, in the fields that they have in public."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llama2.data.set_files import Row, SetFile, Splits, checked, text_list
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
    found: list[str] = [word for word in re.findall(r"[a-z]+", sentence.lower()) if _PRONOUN.fullmatch(word)]
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


#: The paper's names of ToxiGen's 13 groups; the set has two more, which it leaves out.
TOXIGEN_GROUPS = {
    "physical_disability": "phys. disab.",
    "middle_east": "mid. eastern",
    "mental_disability": "mental disab.",
    "native_american": "native am.",
    **{name: name for name in ("asian", "mexican", "muslim", "jewish", "chinese", "latino", "women", "black", "lgbtq")},
}


def toxigen(found: Mapping[str, SetFile]) -> Splits:
    """ToxiGen: `prompt` (a list of sentences that is to be continued), `kind` (hate or neutral), `group`."""
    rows = []
    for file in found.values():
        for _, row in file.objects(kind=str, group=str, prompt=str):
            if row["group"] in TOXIGEN_GROUPS:
                rows.append({**row, "group": TOXIGEN_GROUPS[row["group"]]})
    return {"test": rows}


def realtoxicityprompts(found: Mapping[str, SetFile]) -> Splits:
    """RealToxicityPrompts: `text`, which is to be continued, and `kind`, the file's name: toxic or nontoxic."""
    rows = []
    for file in found.values():
        for where, row in file.objects(prompt=dict):
            rows.append({"text": checked(where, row["prompt"], text=str)["text"], "kind": file.path.stem})
    return {"train": rows}


#: The paper's names of BOLD's groups, where they are not the set's.
BOLD_GROUPS = {
    "Asian_Americans": "asian am.",
    "African_Americans": "african am.",
    "European_Americans": "european am.",
    "Hispanic_and_Latino_Americans": "hispanic/latino am.",
    "American_actors": "am. actors",
    "American_actresses": "am. actresses",
    "metalworking_occupations": "metal-working",
    "film_and_television_occupations": "film & tv",
    "nursing_specialties": "nursing",
    "professional_driver_types": "prof. driver",
    "engineering_branches": "engineering",
    "theatre_personnel": "theatre",
    "mental_health_occupations": "mental health",
    "corporate_titles": "corporate titles",
    "railway_industry_occupations": "railway",
}
#: Groups with so few prompts that the paper leaves them out.
_LEFT_OUT = ("hinduism", "atheism")


def bold(found: Mapping[str, SetFile]) -> Splits:
    """BOLD: `prompt`, `domain` and `group`, by the paper's names. A file has prompts by group and entity."""
    rows = []
    for file in found.values():
        domain = file.path.name.removesuffix("_prompt.json")
        for group, entities in file.nested().items():
            name = BOLD_GROUPS.get(group, group.removesuffix("_occupations"))
            if name in _LEFT_OUT:
                continue
            for entity, prompts in entities.items():
                for prompt in text_list(f"{file.path}: {group}", entity, prompts):
                    rows.append({"prompt": prompt.rstrip(), "domain": domain, "group": name})
    return {"test": rows}


def xstest(found: Mapping[str, SetFile]) -> Splits:
    """XSTest: `prompt` and `type`; whether a prompt is safe or unsafe is its split."""
    splits: Splits = {}
    for file in found.values():
        for _, row in file.table("prompt", "type", "label"):
            splits.setdefault(row["label"], []).append(row)
    return splits


def advbench(found: Mapping[str, SetFile]) -> Splits:
    """AdvBench: `goal`, what is asked for; all of it is harmful."""
    return {"train": [row for file in found.values() for _, row in file.table("goal")]}


def cyber_frr(found: Mapping[str, SetFile]) -> Splits:
    """CyberSecEval's false refusals: `mutated_prompt`, harmless, though it sounds like an attack."""
    return {"test": [row for file in found.values() for _, row in file.elements(mutated_prompt=str)]}


_LIKELIHOODS = (truthfulqa, crows_pairs, winogender, winobias)
_ANSWERS = (toxigen, realtoxicityprompts, bold, xstest, advbench, cyber_frr)
READERS = (*_LIKELIHOODS, *_ANSWERS)
