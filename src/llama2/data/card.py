"""The corpus card: what is in a corpus and what was done to it, as JSON, as Markdown, and in plots.

Its tables are the paper's (spec 8.1, 8.2, 9.9) for any corpus, and figures of counts at every step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document

from llama2 import files as safely
from llama2.data import describe, overlap
from llama2.data.overlap import Coverage
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Manifest
from llama2.data.stage import Stage
from llama2.errors import DataError

#: Languages with a lesser share of the documents are not listed (spec 8.2).
_LEAST_SHARE = 5e-5
_LENGTHS = [1 << n for n in range(6, 23)]  # characters, upper ends of the bins

CARD = "card.json"

Counts = Mapping[str, Counter[str]]


class Describe(Stage):
    """Counts what is in the documents that are left."""

    name = "describe"

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in data:
            name, facts = document.metadata["source"], document.metadata
            self.count(name, "kept")
            self.count(name, "bytes kept", len(document.text.encode("utf-8", "replace")))
            self.count(name, f"language: {facts['language']}")
            length = next((bound for bound in _LENGTHS if len(document.text) <= bound), _LENGTHS[-1] * 2)
            self.count(name, f"length: {length}")
            for tag in facts.get("tags", ()):
                self.count(name, f"tag: {tag}")
            if "toxicity" in facts:
                self.count(name, f"toxicity: {min(int(10 * facts['toxicity']), 9)}")
                self.count(name, "toxic", facts["toxicity"] >= 0.5)
            yield document


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write card.json, README.md and plots into `folder`."""
    folder.mkdir(exist_ok=True)
    _write(folder / CARD, json.dumps(facts, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    _write(folder / "README.md", markdown(facts).encode("utf-8", "replace"))
    _plot(folder, facts)


def _write(path: Path, data: bytes) -> None:
    with safely.create(path, error=DataError) as file:
        file.write(data)


def facts(
    recipe: BuildRecipe,
    manifest: Manifest,
    cleaned: Counts,
    kept: Counts,
    samples: Sequence[int],
    before: Coverage,
    after: Coverage,
    left_out: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Everything the card says.

    `cleaned` and `kept` are the counts up to deduplication and after it. `samples` is the number of each benchmark's
    samples; `before` and `after` are what of them the corpus had, and has. `left_out` has source, path and reason of
    files that were.
    """
    total = sum((Counter(counts) for counts in kept.values()), Counter[str]())
    english = total["language: en"]
    documents = total["kept"]
    scored = sum(value for key, value in total.items() if key.startswith("toxicity: "))
    return {
        "sources": {
            name: {
                "licence": source.licence,
                "steps": _steps(cleaned[name], kept[name]),
                "converted": _part(cleaned[name], "converted: "),
                "personal": _part(cleaned[name], "personal: "),
                "bytes": {"read": int(cleaned[name]["bytes read"]), "kept": int(kept[name]["bytes kept"])},
                "corpus": manifest.sources[name],
            }
            for name, source in recipe.sources.items()
        },
        "left_out": [list(each) for each in left_out],
        "tokenizer": manifest.tokenizer.model_dump(),
        "languages": {
            language: count / documents
            for language, count in Counter(_part(total, "language: ")).most_common()
            if count >= _LEAST_SHARE * documents
        },
        "lengths": dict(sorted(_part(total, "length: ").items(), key=lambda each: int(each[0]))),
        "english_documents": int(english),
        "pronouns": _pronouns(total, english),
        "identities": _identities(total, english),
        "toxicity": {
            "scored": int(scored),
            "at_least_half": total["toxic"] / scored if scored else None,
            "histogram": [int(total[f"toxicity: {tenth}"]) for tenth in range(10)],
        },
        "contamination": _contamination(recipe, samples, before, after)
        | {"cut": {what: int(total[f"contaminated {what}"]) for what in ("documents", "tokens")}},
    }


def _part(counts: Mapping[str, float], prefix: str) -> dict[str, int]:
    return {key.removeprefix(prefix): int(value) for key, value in counts.items() if key.startswith(prefix)}


#: What cannot be read, and what went beyond a limit: printed on the screen too.
LOST = (
    *("no text", "not UTF-8", "damaged", "malformed"),
    *("too long", "took too much time or memory", "unpacks to too much"),
)
#: What happens to a document, in order.
_DROPS = (
    ("empty", "no page", *LOST),
    ("blocked site", "other language"),
)


def _steps(cleaned: Mapping[str, float], kept: Mapping[str, float]) -> dict[str, int]:
    """Documents at each step: unusable ones by reason, those read, those left out by reason, those kept."""
    unusable, dropped = ({what: int(cleaned.get(what, 0)) for what in each} for each in _DROPS)
    quality = {key: int(value) for key, value in sorted(cleaned.items()) if key.startswith("quality: ")}
    duplicates = {what: int(kept.get(what, 0)) for what in ("exact duplicate", "near duplicate")}
    steps = {**unusable, "read": int(cleaned.get("read", 0)), **dropped, **quality, **duplicates}
    return {what: count for what, count in steps.items() if count} | {"kept": int(kept.get("kept", 0))}


def _pronouns(total: Mapping[str, float], english: float) -> dict[str, float]:
    return {group: total.get(f"tag: pronoun: {group}", 0) / english if english else 0.0 for group in describe.PRONOUNS}


def _identities(total: Mapping[str, float], english: float) -> dict[str, Any]:
    """Share of English documents with a term of each axis, and among those the share of each of the five commonest."""
    table = {}
    for axis in describe.IDENTITIES:
        mentions = total.get(f"tag: identity: {axis}", 0)
        terms = Counter(_part(total, f"tag: term: {axis}: ")).most_common(5)
        table[axis] = {
            "share": mentions / english if english else 0.0,
            "terms": {term: count / mentions for term, count in terms},
        }
    return table


def _contamination(recipe: BuildRecipe, samples: Sequence[int], before: Coverage, after: Coverage) -> dict[str, Any]:
    settings = recipe.decontamination
    table, start = {}, 0
    subsets = {when: overlap.subsets(each.shares()) for when, each in (("before", before), ("after", after))}
    for name, count in zip(settings.benchmarks, samples, strict=True):
        part = slice(start, start + count)
        table[name] = {"samples": count} | {
            when: {subset: int(mask[part].sum()) for subset, mask in masks.items()} for when, masks in subsets.items()
        }
        start += count
    return {"length": settings.length, "skips": settings.skips, "benchmarks": table}


def markdown(facts: Mapping[str, Any]) -> str:
    """The card as a page."""
    lines = ["# Corpus card", "", *_sources_section(facts)]
    lines += ["## What happened to documents", "", *_table(["source", "step", "documents"], _counted(facts, "steps"))]
    lines += ["## Files that were left out", "", "Each from the first place on that could not be used.", ""]
    lines += _table(["source", "file", "reason"], [list(each) for each in facts["left_out"]])
    lines += ["## Encodings that were converted", ""]
    lines += _table(["source", "encoding", "documents or files"], _counted(facts, "converted"))
    lines += ["## Personal information that was replaced", ""]
    lines += _table(["source", "kind", "times"], _counted(facts, "personal"))
    lines += [*_language_sections(facts), *_toxicity_section(facts["toxicity"])]
    lines += _contamination_section(facts["contamination"])
    lines += [f"![{name}]({name}.svg)" for name in _PLOTS]
    return "\n".join(lines) + "\n"


def _sources_section(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            source["licence"],
            f"{source['steps'].get('read', 0):,}",
            f"{source['steps']['kept']:,}",
            f"{source['bytes']['kept'] / 1e6:.2f}",
            f"{source['corpus']['train']['tokens']:,}",
            f"{source['corpus']['validation']['tokens']:,}",
        ]
        for name, source in facts["sources"].items()
    ]
    return _table(
        ["source", "licence", "documents read", "kept", "MB kept", "training tokens", "validation tokens"], rows
    )


def _language_sections(facts: Mapping[str, Any]) -> list[str]:
    lines = ["## Languages", "", "By a document's beginning and middle; unknown is what is less than half certain.", ""]
    lines += _table(["language", "documents"], [[name, _percent(share)] for name, share in facts["languages"].items()])
    lines += ["## Pronouns and identities", "", f"Shares of the {facts['english_documents']:,} English documents.", ""]
    lines += _table(["pronouns", "documents"], [[group, _percent(share)] for group, share in facts["pronouns"].items()])
    rows = [
        [
            axis,
            _percent(entry["share"]),
            ", ".join(f"{term} {_percent(share)}" for term, share in entry["terms"].items()),
        ]
        for axis, entry in facts["identities"].items()
    ]
    return lines + _table(["axis", "documents", "of those, the commonest terms"], rows)


def _toxicity_section(found: Mapping[str, Any]) -> list[str]:
    line = "No document was scored."
    if found["scored"]:
        share = _percent(found["at_least_half"])
        line = f"{share} of {found['scored']:,} scored English documents have 0.5 or more."
    return ["## Toxicity", "", line, ""]


def _contamination_section(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Contamination", ""]
    if not found["benchmarks"]:
        return [*lines, "No benchmark was looked for.", ""]
    lines += [
        f"Runs of at least {found['length']} tokens, of which {found['skips']} may differ after the first ten. "
        f"{found['cut']['tokens']:,} tokens were cut out of {found['cut']['documents']:,} documents.",
        "",
    ]
    subsets = [(when, subset) for when in ("before", "after") for subset in ("not clean", "dirty")]
    rows = [
        [name, f"{entry['samples']:,}", *(f"{entry[when][subset]:,}" for when, subset in subsets)]
        for name, entry in found["benchmarks"].items()
    ]
    return lines + _table(["benchmark", "samples", *(f"{subset} {when}" for when, subset in subsets)], rows)


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _counted(facts: Mapping[str, Any], what: str) -> list[list[str]]:
    """A row for each thing that is counted of each source."""
    return [
        [name, thing, f"{count:,}"]
        for name, source in facts["sources"].items()
        for thing, count in source[what].items()
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["None.", ""]
    escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped]] + [""]


_PLOTS = ("steps", "languages", "lengths", "toxicity")


def _plot(folder: Path, facts: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    steps = {
        f"{name}: {step}": count for name, source in facts["sources"].items() for step, count in source["steps"].items()
    }
    bars = {
        "steps": (steps, "documents"),
        "languages": (facts["languages"], "share of documents"),
        "lengths": ({f"≤ {int(key):,}": count for key, count in facts["lengths"].items()}, "documents by characters"),
        "toxicity": (
            {f"{tenth / 10:.1f}": count for tenth, count in enumerate(facts["toxicity"]["histogram"])},
            "scored documents by toxicity",
        ),
    }
    for name in _PLOTS:
        values, label = bars[name]
        figure = Figure(figsize=(7, 1 + 0.25 * max(len(values), 1)), layout="constrained")
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()), color="#3b6ea5")
        axes.invert_yaxis()
        axes.set_xlabel(label)
        with safely.create(folder / f"{name}.svg", error=DataError) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
