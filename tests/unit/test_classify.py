"""The small classifiers: their features by hand, scikit-learn's own result, files, and what they cannot judge."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import typed
from llama2.classify import sets, training
from llama2.classify.classifier import NAMES, WEIGHTS, Classifier, bundled
from llama2.classify.features import NGrams, Phrases, normalise, words
from llama2.classify.sets import Labelled
from llama2.classify.training import PLANS, Plan, fit
from llama2.errors import ClassifierError

PLAN = Plan(("calm", "angry"), (NGrams("words", 1, 2), NGrams("characters", 2, 3)), (1, 1), Phrases(()), 10)
TEXTS = [
    *("a calm sea", "the calm of evening", "quiet water", "calm calm calm"),
    *("an angry sea", "angry men shout", "they shout and rage", "rage rage"),
]


def labelled(texts: list[str] = TEXTS) -> list[Labelled]:
    half = len(texts) // 2
    return [Labelled(text, PLAN.labels[i >= half], str(i), "test") for i, text in enumerate(texts)]


def test_ngrams_by_hand() -> None:
    text = normalise("Don’t  go, \u200bGO!")
    assert words(text) == ["don't", "go", "go"]
    assert [*NGrams("words", 1, 2).of(text)] == ["don't", "go", "go", "don't go", "go go"]
    assert [*NGrams("words", 1, 1, head=6).of(text)] == ["don't"]
    assert [*NGrams("characters", 2, 3).of("ab c")] == [" a", "ab", "b ", " ab", "ab ", " c", "c ", " c "]


def test_phrases_by_place() -> None:
    phrases = Phrases((r"\bsorry\b",))
    found = phrases.of(normalise("No. Sorry! I go on."))
    assert found[:4] == [0, 1, 1, 1]  # first sentence, first two, beginning, all
    assert len(found) == len(phrases) == 7
    assert Phrases(()).of("sorry") == []


def test_a_classifier_is_scikit_learns() -> None:
    """Vectors and probabilities of its TfidfVectorizer and LogisticRegression, on texts that were not trained on."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    ours = fit("mood", PLAN, labelled())
    made = [TfidfVectorizer(analyzer=lambda t, k=kind: k.of(normalise(t)), sublinear_tf=True) for kind in PLAN.ngrams]
    model = LogisticRegression(C=10, max_iter=2000).fit(
        hstack([v.fit_transform(TEXTS) for v in made]), [0] * 4 + [1] * 4
    )
    new = ["calm rage", "a shouting sea sea", "zzz"]
    theirs = model.predict_proba(hstack([v.transform(new) for v in made]))
    assert ours.probabilities(new) == pytest.approx(theirs, abs=1e-3)  # weights are stored in half precision


def test_a_saved_classifier_says_the_same(tmp_path: Path) -> None:
    made = fit("mood", PLAN, labelled())
    made.save(tmp_path / "mood.npz")
    read = Classifier.open(tmp_path / "mood.npz")
    assert (read.probabilities(TEXTS) == made.probabilities(TEXTS)).all()
    assert (read.labels, read.ngrams, read.words) == (made.labels, made.ngrams, made.words)
    made.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "mood.npz").read_bytes()


@given(st.text(max_size=200))
def test_any_text_has_a_verdict(text: str) -> None:
    """Labels with probabilities that sum to one, or a reason; the same for however the text is written."""
    for name in NAMES:
        found = bundled(name).judge(text)
        assert (found.label is None) == bool(found.reason)
        assert found.label is None or sum(found.probabilities.values()) == pytest.approx(1)
        assert bundled(name).judge(f" {text}\u200b ") == found


def test_what_cannot_be_judged() -> None:
    """Never a probability of 0: neither for a text without words, nor for one in another language."""
    toxicity = bundled("toxicity")
    for text, reason in (
        ("", "the text has no words"),
        ("…!?", "the text has no words"),
        ("Ich gehe heute in den Wald spazieren", "of its words are known; it was trained on English"),
        ("今日は森を散歩します 明日 海 へ", "of its words are known"),
    ):
        found = toxicity.judge(text)
        assert (found.label, found.probabilities) == (None, {})
        assert reason in str(found.reason)


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("refusal", "I'm sorry, but I cannot help you with that.", "refused"),
        ("refusal", "Sure! Here are three steps:\n1. Open the lid.\n2. Pour it out.", "complied"),
        ("toxicity", "You are a stupid idiot.", "toxic"),
        ("toxicity", "The library opens at nine.", "not toxic"),
        ("toxicity", "I am a gay man.", "not toxic"),
    ],
)
def test_plain_cases(name: str, text: str, label: str) -> None:
    assert bundled(name).judge(text).label == label


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.npz")) < 10 << 20


def test_agreement_by_hand() -> None:
    truth = np.array([True, True, False, False])
    says = np.array([0.9, 0.4, 0.4, 0.1])
    assert training.auroc(says, truth) == 0.875  # of four pairs three and a half
    assert training.calibration_error(np.array([0.9, 0.6, 0.6, 0.9]), np.array([1, 0, 1, 1]) > 0) == pytest.approx(0.1)
    share = training.proportion(np.array([True] * 8 + [False] * 2))
    assert (share["mean"], share["low"], share["high"]) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)  # Wilson's
    assert training.proportion(np.array([], bool)) == {"n": 0}


def test_a_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 2))
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    answers = (rng.random(4000) < odds[:, 1]).astype(np.int64)
    assert training.temperature_of(3 * logits, answers) == pytest.approx(3, rel=0.1)


def test_folds_keep_a_key_together() -> None:
    texts = [Labelled("x", "calm", str(i // 3), "test") for i in range(30)]
    inside_all = []
    for train, inside in training.folds(texts, 5):
        assert not {each.key for each in train} & {texts[i].key for i in inside}
        assert len(train) + len(inside) == 30
        inside_all += inside
    assert sorted(inside_all) == [*range(30)]


def write_xstest(folder: Path, labels: list[str]) -> None:
    for name in sets.REFUSAL_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["prompt", "completion", "final_label"])
            for i, label in enumerate(labels):
                said = {"2": "I cannot do that", "3": "I cannot, but here is"}.get(label[0], "Sure, here it is")
                table.writerow([f"question {i}", f"{said} {i % 4}", label])


def test_training_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_xstest(tmp_path, [*sets.REFUSAL_LABELS] * 12)
    out = tmp_path / "refusal.npz"
    status, text, _ = typed(capsys, "classify", "train", "refusal", "--data", tmp_path, "--out", out, "--json")
    report = json.loads(text)
    assert (status, report["texts"], report["folds by prompt"]["n"]) == (0, 72, 72)
    assert report["folds by prompt"]["mean"] == 1  # words tell them apart
    status, text, _ = typed(capsys, "classify", "refusal", "--weights", out, "I cannot do that 1", "Sure, here it is 2")
    assert (status, [line.split()[0] for line in text.splitlines()]) == (0, ["refused", "complied"])
    status, text, error = typed(capsys, "classify", "toxicity", "--weights", out, "x")
    assert (status, text) == (2, "")
    assert "judges refusal, not toxicity" in error


def write_toxicity(folder: Path, row: dict[str, object]) -> None:
    *prompts, sentences = sets.TOXICITY_FILES
    for name in prompts:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row) + "\n")
    (folder / sentences).parent.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "hate", "group": "x", "prompt": "- they rage\n- they rage\n-"}]
    (folder / sentences).write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def test_sets_of_toxicity(tmp_path: Path) -> None:
    """A part without a score is left out, a sentence that is repeated counts once."""
    row = {
        "filename": "f",
        "prompt": {"text": "rage", "toxicity": 0.5},
        "continuation": {"text": "calm", "toxicity": None},
    }
    write_toxicity(tmp_path, row)
    found = [*sets.toxicity(tmp_path)]
    assert [(each.text, each.label, each.group) for each in found] == [
        *[("rage", "toxic", "")] * 2,
        ("they rage", "toxic", "x"),
    ]
    assert [each.text for each in sets.harmless(("A {} ran.", "x"))][:2] == ["A gay man ran.", "A lesbian ran."]
    assert {"An atheist ran.", "An Asian man ran."} <= {each.text for each in sets.harmless(("A {} ran.", "x"))}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"filename": "f", "prompt": {"toxicity": 0.5}, "continuation": {}}, "toxic.jsonl:1: the prompt has no text"),
        ({"filename": "f", "prompt": 1}, "the field 'prompt' has a value of another type"),
    ],
)
def test_rows_that_are_not_the_sets(row: dict[str, object], message: str, tmp_path: Path) -> None:
    write_toxicity(tmp_path, row)
    with pytest.raises(ClassifierError, match=message):
        [*sets.toxicity(tmp_path)]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each."""
    write_xstest(tmp_path / "other", ["1_full_compliance", "4_none"])
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "lacking.npz", about=np.frombuffer(b"{}", np.uint8))
    for arguments, message in (
        (["train", "refusal", "--data", tmp_path, "--out", tmp_path / "x"], "mistralguard_gpteval.csv: "),
        (["train", "refusal", "--data", tmp_path / "other", "--out", tmp_path / "x"], "'4_none' is not a label of"),
        (["toxicity", "x", "--weights", tmp_path / "none.npz"], "none.npz: "),
        (["toxicity", "x", "--weights", tmp_path / "damaged.npz"], "damaged.npz: is not a classifier"),
        (["toxicity", "x", "--weights", tmp_path / "lacking.npz"], "lacking.npz: is not a classifier"),
    ):
        status, out, error = typed(capsys, "classify", *arguments)
        assert (status, out, error.count("\n")) == (1, "", 1)
        assert message in error
    with pytest.raises(ClassifierError, match="anger: is not a classifier; there are refusal, toxicity"):
        bundled("anger")
    with pytest.raises(ClassifierError, match="no text has the label angry"):
        fit("mood", PLAN, labelled()[:4])
    assert PLANS.keys() == {*NAMES} == training.TRAIN.keys()
