"""Metrics of answers: against the harness's own functions, the papers' definitions, and arithmetic by hand."""

from itertools import combinations
from typing import Any

import pytest

from llama2.evaluate import execution, metrics
from llama2.evaluate.task import load


def test_pass_at_k_has_the_published_values() -> None:
    """The check table of the specification, 12.7, and the definition: the share of all subsets with a correct one."""
    table = {(200, 20, 1): 0.1, (200, 20, 10): 0.660226, (10, 3, 5): 0.916667, (100, 5, 80): 0.999794}
    for case, expected in table.items():
        assert metrics.pass_at_k(*case) == pytest.approx(expected, abs=5e-7)
    for correct in range(7):
        subsets = list(combinations(range(6), 4))
        share = sum(any(i < correct for i in each) for each in subsets) / len(subsets)
        assert metrics.pass_at_k(6, correct, 4) == pytest.approx(share, abs=1e-15)
    assert metrics.pass_at_k(1000, 1, 1000) == 1.0
    for case in [(10, 3, 11), (10, 3, 0), (10, 11, 1), (10, -1, 1)]:
        with pytest.raises(ValueError, match="not defined"):
            metrics.pass_at_k(*case)


#: An answer whose right number is 1234: as `####` says, and as its last number says.
GSM8K = [
    ("She has 1,200 + 34 = 1234.\n#### 1234", 1, 1),
    ("#### 1,234", 1, 1),
    ("#### $1,234", 1, 1),
    ("#### 1234.", 1, 1),
    ("#### 1234 dollars", 1, 1),
    ("The answer is $1,234.", 0, 1),
    ("It costs 1234 dollars, not 12", 0, 0),  # the last number counts
    ("First 12, then 1234", 0, 1),
    ("#### 1234\n\nThen 5 more.\n#### 9", 1, 0),  # the first mark counts, and the last number
    ("#### -1234", 0, 0),
    ("#### ?\n#### 1234", 1, 1),
    ("", 0, 0),
    ("twelve hundred", 0, 0),
]


@pytest.mark.parametrize(("answer", "strict", "flexible"), GSM8K)
def test_gsm8k_extracts_strictly_and_flexibly(answer: str, strict: int, flexible: int) -> None:
    row = {"answer": "1200 + 34 = <<1200+34=1234>>1234\n#### 1,234"}
    assert metrics.gsm8k(answer, row) == {"strict": strict, "flexible": flexible}


def test_gsm8k_is_the_harnesss_on_plain_answers() -> None:
    """Where an answer follows the format, the harness's filters and its exact match give the same."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    patterns = {"strict": (r"#### (\-?[0-9\.\,]+)", 0), "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    row = {"answer": "so 1234\n#### 1234"}
    for answer, *_ in GSM8K:
        if "#### $" in answer or "?" in answer:
            continue  # the harness's strict pattern takes neither
        for name, (pattern, select) in patterns.items():
            (found,) = RegexFilter(pattern, select).apply([[answer]], [row])
            expected = exact_match_hf_evaluate(found, [row["answer"]], ignored, ignore_case=True)["exact_match"]
            assert metrics.gsm8k(answer, row)[name] == expected, (answer, name)


def test_a_hyphen_between_numbers_is_not_a_sign() -> None:
    assert metrics.gsm8k("10-3", {"answer": "#### 3"})["flexible"] == 1
    assert metrics.gsm8k("x = -3", {"answer": "#### -3"})["flexible"] == 1
    assert metrics.gsm8k("it is 3.50", {"answer": "#### 3.5"})["flexible"] == 1


def test_svamp_takes_the_first_number() -> None:
    row = {"Answer": "51"}
    assert [metrics.svamp(text, row)["exact_match"] for text in (" 51", "51.0 - 25", "76 - 25 = 51", "")] == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" The Beatles.", 1),
        (" beatles,", 1),
        ("\nThe   BEATLES\nQ: who", 1),  # white space before the answer; what follows its line is cut
        ("John Lennon", 0),
        ("The Beatles and Queen", 0),
        ("Fab-Four", 1),
        ("", 0),
    ],
)
def test_open_answers_match_any_alias(answer: str, expected: int) -> None:
    natural = {"answer": ["Beatles", "The FabFour"]}
    trivia = {"answer": {"value": "Beatles", "aliases": ["The FabFour"]}}
    assert metrics.open_answer(answer, natural) == {"exact_match": expected}
    assert metrics.open_answer(answer, trivia) == {"exact_match": expected}


def test_words_are_compared_without_case_articles_and_punctuation() -> None:
    assert metrics.normalize(" An apple,  A pear; the FIG-tree: another’s. ") == "apple pear figtree anothers"


def test_squad_is_exact_match_and_f1_of_words() -> None:
    row = {"answers": {"text": ["the Denver Broncos", "Broncos"]}}
    assert metrics.squad(" Denver Broncos.\n\nQuestion", row) == {"exact_match": 1, "f1": 1}
    # precision 1/3, recall 1 against "Broncos": 2/4; 2/3 and 1 against "Denver Broncos": 4/5
    assert metrics.squad("Denver Broncos team", row) == {"exact_match": 0, "f1": pytest.approx(0.8)}
    assert metrics.squad("Carolina", row) == {"exact_match": 0, "f1": 0}
    # Repeated words count as often as they are in both: 2 of 3, and 2 of 2.
    assert metrics.f1("no no no", "no no") == pytest.approx(0.8)
    impossible = {"answers": {"text": []}}
    assert metrics.squad("unanswerable", impossible) == {"exact_match": 1, "f1": 1}
    assert metrics.squad("Denver", impossible) == {"exact_match": 0, "f1": 0}


def test_quac_leaves_one_reference_out() -> None:
    row = {"answers": {"texts": ["red car", "blue car", "red"]}}
    # F1 of "red" against each: 2/3, 0, 1. Without the first 1, without the second 1, without the third 2/3.
    assert metrics.quac("red", row)["f1"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert metrics.quac("red", {"answers": {"texts": ["red car"]}})["f1"] == pytest.approx(2 / 3)
    # As many references without an answer as with one: only the former count, and otherwise only the latter.
    none = {"answers": {"texts": ["CANNOTANSWER", "red"]}}
    assert metrics.quac("CANNOTANSWER", none)["f1"] == 1
    assert metrics.quac("red", none)["f1"] == 0
    assert metrics.quac("red", {"answers": {"texts": ["CANNOTANSWER", "red", "red"]}})["f1"] == 1


def test_big_bench_hard_reads_the_answer_behind_its_phrase() -> None:
    row = {"target": "(B)"}
    answers = ["We see. So the answer is (B).", "So the answer is (B)", "the answer is (A). the answer is (B).", "(B)"]
    assert [metrics.chain_of_thought(each, row)["exact_match"] for each in answers] == [1, 1, 0, 0]
    assert metrics.chain_of_thought("So the answer is } ] >.", {"target": "} ] >"}) == {"exact_match": 1}
    assert metrics.chain_of_thought("So the answer is No.\n\nQ: x. So the answer is Yes.", {"target": "No"})[
        "exact_match"
    ]
    answers = [" (B)\n\nQ: next", "(B)", "(B) since", ""]
    assert [metrics.direct(each, row)["exact_match"] for each in answers] == [1, 1, 0, 0]


@pytest.mark.parametrize(  # as normalize_final_answer of lm_eval 0.4.13's minerva_math gives it
    ("answer", "expected"),
    [
        ("12 \\text{ cm}", "12"),
        ("x = 5", "5"),
        ("$\\frac12$", "\\frac{1}{2}"),
        ("\\frac 1 2", "\\frac{1}{2}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\sqrt[3]{8}", "\\sqrt[3]{8}"),
        ("1,234", "1234"),
        ("3,4,5", "3,4,5"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "\\left(3,\\frac{\\pi}{2}\\right)"),
        ("\\$18.90", "18.90"),
        ("90^\\circ", "90"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2\\pi cm", "2\\pi"),
        ("\\overline{AB}", "AB"),
        ("\\textbf{(A)} 4", "(A)4"),
        ("6\\text{ and }7", "6,7"),
        ("12inches", "12"),
        ("so $x^2$ is", "x^2"),
    ],
)
def test_latex_is_normalised_as_minervas(answer: str, expected: str) -> None:
    assert metrics.normalize_latex(answer) == expected


def test_mathematics_reads_what_is_boxed() -> None:
    row = {"solution": "Since $\\boxed{1}$ is wrong, it is $\\boxed{\\frac{1}{2}}$."}
    right = ["It is $\\boxed{\\frac12}$.", "\\boxed{3}, no: \\fbox{\\frac{1}{2}}", "so \\boxed \\frac12$"]
    right += [
        "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.",
        "The final answer is \\frac12.",
    ]
    wrong = ["\\boxed{\\frac12} \\boxed{2}", "\\boxed{\\frac{1}{2}", "0.5", ""]
    for expected, texts in ((1, right), (0, wrong)):
        for text in texts:
            assert metrics.mathematics(text, row) == {"exact_match": expected}, text


#: Rows of our own with answers, for each instruction that needs sentences, words or a language, and a few others.
INSTRUCTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Roe met J. Doe. He left.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "Dr. Roe met J. Doe. He left.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "One two three."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA. And U.S.A. too",
    ),
    ("change_case:english_lowercase", {}, "this is written in plain english, all of it in small letters."),
    ("language:response_language", {"language": "de"}, "Das ist ein kurzer deutscher Satz über das Wetter."),
    ("punctuation:no_comma", {}, "one, two"),
    ("startend:quotation", {}, '"quoted"'),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b"),
    ("startend:end_checker", {"end_phrase": "Over."}, "It is done. Over.\nSincerely"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It."),
]


@pytest.mark.parametrize(("name", "arguments", "answer"), INSTRUCTIONS)
def test_ifeval_is_the_harnesss(name: str, arguments: dict[str, Any], answer: str) -> None:
    from llama2.evaluate import instructions

    row = {
        "key": 1,
        "prompt": "Say it.",
        "instruction_id_list": [name, "punctuation:no_comma"],
        "kwargs": [arguments, {}],
    }
    with instructions._checks():
        from lm_eval.tasks.ifeval import utils

        given = utils.InputExample(**row)
        strict = utils.test_instruction_following_strict(given, answer)
        loose = utils.test_instruction_following_loose(given, answer)
    assert metrics.ifeval(answer, row) == {
        "prompt_strict": strict.follow_all_instructions,
        "instruction_strict": strict.follow_instruction_list,
        "prompt_loose": loose.follow_all_instructions,
        "instruction_loose": loose.follow_instruction_list,
    }


def test_ifeval_counts_sentences_by_hand() -> None:
    row = {"prompt": "", "instruction_id_list": ["length_constraints:number_sentences"]}
    row["kwargs"] = [{"num_sentences": 3, "relation": "less than"}]
    assert metrics.ifeval("Dr. Roe met J. Doe at 5 p.m. in the park. He left.", row)["instruction_strict"] == [1]
    assert metrics.ifeval("He came. He saw. He left.", row)["instruction_strict"] == [0]
    last_line = {"prompt": "", "instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "Over."}]}
    values = metrics.ifeval("Done. Over.\nSincerely", last_line)  # loose: without the last line
    assert (values["prompt_strict"], values["prompt_loose"]) == (0, 1)


def test_an_instruction_that_is_not_known_is_refused() -> None:
    from llama2.errors import EvaluationError

    row = {"prompt": "", "instruction_id_list": ["startend:rhyme"], "kwargs": [{}]}
    with pytest.raises(EvaluationError, match=r"startend:rhyme: unknown instruction of IFEval; the harness has "):
        metrics.ifeval("x", row)
    row = {"prompt": "", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"colour": "red"}]}
    with pytest.raises(EvaluationError, match="punctuation:no_comma: its arguments do not fit"):
        metrics.ifeval("x", row)


@pytest.mark.skipif(execution.available() is not None, reason=str(execution.available()))
def test_code_passes_by_its_rows_tests() -> None:
    row = {"prompt": "def half(x):\n", "test": "def check(f):\n    assert f(4) == 2\n", "entry_point": "half"}
    assert metrics.humaneval("    return x / 2\n", row) == {"passed": 1}
    assert metrics.humaneval("    return x\n", row) == {"passed": 0}
    row = {"test_setup_code": "four = 4", "test_list": ["assert half(four) == 2", "assert half(0) == 0"]}
    assert metrics.mbpp("def half(x):\n    return x / 2\n[DONE]\nassert False", row) == {"passed": 1}
    assert metrics.mbpp("def half(x):\n    return 2\n[DONE]", row) == {"passed": 0}


def test_several_answers_to_a_question_are_averaged_and_estimated() -> None:
    from llama2.evaluate.items import _over_samples

    values = [{"passed": 1.0}, {"passed": 0.0}, {"passed": 0.0}, {"passed": 1.0}]
    estimated = load("humaneval").model_copy(update={"pass_at": [1, 2]})
    # Of the six pairs of answers, one has no correct one.
    assert _over_samples(values, estimated) == {"passed": 0.5, "pass@1": 0.5, "pass@2": pytest.approx(5 / 6)}
    assert _over_samples([{"instruction_strict": [1.0, 0.0]}], load("ifeval")) == {"instruction_strict": [1.0, 0.0]}
    worst = load("realtoxicityprompts").model_copy(update={"maxima": ["passed"]})
    assert _over_samples(values, worst) == {"passed": 0.5, "max_passed": 1.0}
