"""Dialogs as rows: what has a loss by Llama 2's published vectors (spec 2.3), packing by invariants."""

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.data import dialogs
from llama2.data.dialog_forms import TrainingDialog
from llama2.data.dialogs import DialogSettings, Example, Packed, Prepared, ReadReport, documentation, pack, read, render
from llama2.data.loader import IGNORED, Loader
from llama2.errors import DataError, DialogError
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Tokenizer
from texts import llama2_tokenizer

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
CALLED = [
    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "b", "content": "c"},
]
#: `<s> [INST] Hi [/INST] Hello! </s>`, and in it what the assistant said: "Hello!", a space, and the end.
HI = [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962, 15043, 29991, 29871, 2]
LEARNT = [False] * 9 + [True] * 4


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return llama2_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "dialogs.jsonl"
        path.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
        return path

    return write


def example(*tokens: int, answer: int) -> Example:
    """A dialog of which the last `answer` tokens have a loss."""
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= len(tokens) - answer)


def prepare(settings: DialogSettings, tokenizer: Tokenizer, *, seed: int = 0) -> Prepared:
    return dialogs.prepare(settings, dialogs.render_all(settings, tokenizer, None, None), seed=seed)


def test_what_the_assistant_says_has_a_loss(llama2: Tokenizer) -> None:
    one = render(TrainingDialog(Dialog(ASKED)), llama2)
    assert one.tokens.tolist() == HI
    assert one.loss_mask.tolist() == LEARNT
    two = render(TrainingDialog(Dialog(ASKED * 2)), llama2)
    assert two.tokens.tolist() == HI * 2
    assert two.loss_mask.tolist() == LEARNT * 2
    last = render(TrainingDialog(Dialog(ASKED * 2)), llama2, answers="last")
    assert last.tokens.tolist() == HI * 2
    assert last.loss_mask.tolist() == [False] * 13 + LEARNT


def test_a_row_by_hand() -> None:
    packed = Packed("two", [example(1, 5, 6, 2, answer=2), example(1, 7, 2, answer=1)], length=9)
    assert (len(packed), packed.dialogs, packed.loss_tokens, packed.filled) == (1, 2, 3, 7 / 9)
    batch = packed.batch([0])
    x = IGNORED
    assert batch.tokens.tolist() == [[1, 5, 6, 2, 1, 7, 2, 0, 0]]
    assert batch.targets.tolist() == [[x, 6, 2, x, x, 2, x, x, x]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    together = Packed("two", [example(1, 5, 6, 2, answer=2), example(1, 7, 2, answer=1)], length=9, boundaries=False)
    assert together.batch([0]).targets.tolist() == batch.targets.tolist()
    assert together.batch([0]).documents is None


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_loses_nothing_and_fills_rows(sizes: list[int]) -> None:
    rows = pack(sizes, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    filled = [sum(sizes[number] for number in row) for row in rows]
    assert max(filled) <= 20
    # A row is begun only where nothing has room, so no two are half empty: at most twice the least number of rows.
    assert sum(2 * each <= 20 for each in filled) <= 1


@given(st.lists(st.tuples(st.integers(2, 12), st.integers(1, 11)), min_size=1, max_size=30), st.booleans())
def test_every_token_with_a_loss_is_a_target_once(dialogs: list[tuple[int, int]], boundaries: bool) -> None:
    token = iter(range(1, 1 << 20))  # each another one
    examples = [example(*[next(token) for _ in range(size)], answer=min(answer, size - 1)) for size, answer in dialogs]
    packed = Packed("some", examples, length=12, boundaries=boundaries)
    batches = [Loader(packed, rows=1, seed=7).first(len(packed))[row] for row in range(len(packed))]
    targets = np.concatenate([batch.targets.flatten() for batch in batches])
    wanted = [t for each in examples for t in each.tokens[each.loss_mask].tolist()]
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(wanted)
    before = {t: u for each in examples for u, t in zip(each.tokens.tolist(), each.tokens.tolist()[1:], strict=False)}
    for batch in batches:
        for token_, target in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
            assert target == IGNORED or before[target] == token_


def test_a_source_is_known_again_by_everything_in_it() -> None:
    one = [example(1, 5, 6, 2, answer=2), example(1, 7, 2, answer=1)]
    known = Packed("a", one, length=9).sha256
    assert Packed("b", one, length=9).sha256 == known
    others = [
        Packed("a", one, length=10),
        Packed("a", one, length=9, boundaries=False),
        Packed("a", [one[0], example(1, 8, 2, answer=1)], length=9),
        Packed("a", [one[0], example(1, 7, 2, answer=2)], length=9),
    ]
    assert known not in {other.sha256 for other in others}


def test_records_of_every_form(write: Callable[..., Path]) -> None:
    path = write(
        {"messages": ASKED, "id": 7},
        b"  \n",
        {"prompt": "Hi", "completion": "Hello!"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Add", "output": "3"},
        {"instruction": "Add", "context": " ", "response": "3"},
    )
    found = [(where, [(m.role, m.content) for m in each.dialog.messages]) for where, each in read([path])]
    assert found == [
        (f"{path}:1", [("user", "Hi"), ("assistant", "Hello!")]),
        (f"{path}:3", [("user", "Hi"), ("assistant", "Hello!")]),
        (f"{path}:4", [("user", "Add\n\n1 2"), ("assistant", "3")]),
        (f"{path}:5", [("user", "Add"), ("assistant", "3")]),
        (f"{path}:6", [("user", "Add"), ("assistant", "3")]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}\n', ":2: is not UTF-8, at byte 12 of the line; save the file as UTF-8"),
        (b"{", ":2: is not JSON (.*); write one object a line"),
        (b"[" * 100000, ":2: is not JSON (.*); write one object a line"),
        (b"[" * 800000, ":2: would need 77 MB as JSON, which no dialog does; cut it"),
        (b" " * (1 << 24) + b"{}\n", ":2: has more than 16 MB; cut it"),
        (b'{"prompt": "\\ud800", "completion": "b"}', ":2: holds half of a surrogate pair, which is not a char.*"),
        ([], ":2: a record has messages, or prompt and completion, or .* ChatML in it"),
        ({"prompt": "Hi", "output": "Hello"}, ":2: a record has messages, or prompt and completion, or .*"),
        ({"prompt": "Hi", "completion": None}, ":2: a record has messages, or prompt and completion, or .*"),
        ({"prompt": "Hi", "completion": " "}, ":2: message 1: content is empty"),
        ({"text": "Hi"}, ":2: text has neither .INST. nor <.im_start.> in it, so it does not say who speaks; write .*"),
        ({"text": "So [INST] Hi [/INST] Hello"}, ":2: text has words before its first .INST.; write messages"),
        ({"text": "[INST] Hi Hello"}, ":2: text has an .INST. without its one ./INST.; fix it"),
        ({"text": "So <|im_start|>user\nHi<|im_end|>"}, ":2: text has words outside of its messages: 'So'; .*"),
        ({"messages": []}, ":2: the dialog has no messages"),
        ({"messages": ["Hi"]}, ":2: message 0: must be an object with role and content"),
        ({"messages": ASKED[:1]}, ":2: the dialog ends without an answer of the assistant; add one"),
        ({"messages": ASKED[1:]}, ":2: message 0: role assistant where system or user must come"),
        ({"messages": [{**ASKED[0], "role": "elf"}]}, ":2: message 0: role 'elf' is unknown; roles are .*"),
        ({"conversations": [{"from": "function_call", "value": 3}]}, ":2: message 0: content must be text, not int"),
        ({"messages": [ASKED[0], *CALLED]}, ":2: message 2: no call before it with the id 'b' is without an answer"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, ":2: message 1: weight must be 0 or 1"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, ":2: no answer has a loss: each has weight 0; .*"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ":2: message 0: has a part of type .*"),
        ({"messages": [{"role": "system", "content": "a"}, *ASKED], "system": "b"}, ":2: has system beside another .*"),
        ({"prompt": "Hi", "completion": "Hello", "system": 3}, ":2: system must be text"),
        ({"prompt": "Hi", "completion": "Hello", "history": [["Hi"]]}, ":2: history must be a list of pairs, .*"),
        ({"prompt": "Hi", "completion": "Hello", "tools": "[3]"}, ":2: tools must be a list of declarations .*"),
        ({"prompt": "Hi", "completion": "Hello", "tools": "3"}, ":2: tools must be a list of declarations .*"),
    ],
)
def test_records_that_are_not_dialogs(write: Callable[..., Path], line: Any, message: str) -> None:
    path = write({"messages": ASKED}, line)
    pattern = f"^{path}{message.replace('(', '[(]').replace(')', '[)]')}"
    with pytest.raises(DataError, match=f"{pattern}; --skip-bad leaves such out$") as caught:
        list(read([path]))
    assert "\n" not in str(caught.value)
    seen = ReadReport()
    assert len(list(read([path], seen, skip_bad=True))) == 1
    assert seen.bad == 1
    assert re.match(pattern, seen.first_bad)


def test_dialogs_are_held_out_refused_or_counted(write: Callable[..., Path], llama2: Tokenizer, tmp_path: Path) -> None:
    path = write(*[{"messages": ASKED}] * 3, {"messages": ASKED * 2})

    def settings(**changed: Any) -> DialogSettings:
        return DialogSettings.model_validate({"files": [path], "length": 13} | changed)

    with pytest.raises(DataError, match=f"{path}:4: the dialog has 26 tokens and a row 13; choose longer rows, or"):
        prepare(settings(), llama2)
    ready = prepare(settings(too_long="leave out", validation=1), llama2, seed=1)
    assert (ready.train.dialogs, ready.left_out) == (2, 1)
    assert [packed.dialogs for packed in ready.validation] == [1]
    assert ready.train.batch([0]).tokens.tolist() == [HI]
    whole = prepare(settings(length=26), llama2)
    assert (whole.validation, whole.left_out, whole.train.dialogs, len(whole.train)) == ([], 0, 4, 3)
    with pytest.raises(DataError, match=f"{path}: has 3 dialogs, of which 3 are held out; give more, or a smaller"):
        prepare(settings(too_long="leave out", validation=3), llama2)
    marked = write({"prompt": "What is [INST]?", "completion": "A marker"})
    with pytest.raises(DataError, match=rf"{marked}:1: message 0 contains '\[INST\]', which marks roles"):
        prepare(settings(), llama2)
    assert prepare(settings(neutralise=True, length=64), llama2).train.dialogs == 1
    with pytest.raises(DataError, match=r"none.jsonl: no such file or folder; give files of dialogs"):
        prepare(settings(files=[tmp_path / "none.jsonl"]), llama2)


def test_the_held_out_are_others_by_seed(write: Callable[..., Path], llama2: Tokenizer) -> None:
    words = ["Hi", "What", "Yes", "No", "One", "Two", "Red", "Blue"]
    path = write(*[{"prompt": word, "completion": "So"} for word in words])
    settings = DialogSettings(files=[path], length=16, validation=2)
    held = []
    for seed in range(4):
        ready = prepare(settings, llama2, seed=seed)
        [packed] = ready.validation
        rows = [packed.batch([n]).tokens.tolist() for n in range(len(packed))]
        trained = [ready.train.batch([n]).tokens.tolist() for n in range(len(ready.train))]
        assert len(rows) + len(trained) == 8
        assert not [row for row in rows if row in trained]
        held.append(rows)
    assert any(each != held[0] for each in held[1:])


def test_documentation_answers_questions(tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "test").mkdir()
    source = '"""Boxes."""\nclass Box:\n    """Holds\n    things.\n\n    More.\n    """\n'
    source += '    def open(self):\n        "Open it."\n    def _shut(self):\n        "No."\ndef bare(): pass\n'
    for name in ("box/__init__.py", "box/_private.py", "test/box.py"):
        (tmp_path / name).write_text(source)
    (tmp_path / "broken.py").write_text("def (")
    found = [[message.content for message in dialog.messages] for _, dialog in documentation(tmp_path)]
    assert found == [
        ["What is the module box for?", "Boxes."],
        ["What is box.Box?", "Holds things."],
        ["What does box.Box.open do?", "Open it."],
    ]
    assert len(list(islice(read([Path("stdlib")]), 50))) == 50


def test_a_template_that_shows_no_answer() -> None:
    class Nothing(Dialog):
        def render(self, *_: Any, **__: Any) -> tuple[list[int], list[bool]]:
            return [1, 2], [False, False]

    with pytest.raises(DialogError, match="template shows no answer of the assistant"):
        render(TrainingDialog(Nothing(ASKED)), None)  # type: ignore[arg-type]
