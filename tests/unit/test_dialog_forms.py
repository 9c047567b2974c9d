"""Forms of dialogs: ids by Llama 2's published vocabulary and vectors (spec 2.3), written by hand; files; limits."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from llama2.data import dialog_files, dialogs
from llama2.data.dialog_forms import understand
from llama2.data.dialogs import DialogSettings, ReadReport, read
from llama2.errors import DataError, DialogError
from llama2.text.bpe import LETTERS
from llama2.text.tokenizer import CONTROL, NORMAL, Ends, Tokenizer, from_merges
from texts import llama2_tokenizer
from tool_templates import HERMES

# `[INST]` and `[/INST]` after a space, and the ends of an answer: a space and </s>.
INST, TSNI, END = [518, 25580, 29962], [518, 29914, 25580, 29962], [29871, 2]
# `<<SYS>>\n`, `\n<</SYS>>\n\n` with what begins a line; be, not; each a piece of its own.
RULES = [3532, 14816, 29903, 6778, 13, 915, 13, 29966, 829, 14816, 29903, 6778, 13, 13]
# Three dialogs: be / not → answer; what → help; why → fact, question → something.
IDS = [
    [1, *INST, *RULES, 1333, *TSNI, 1234, *END],
    [1, *INST, 825, *TSNI, 1371, *END],
    [1, *INST, 2020, *TSNI, 2114, *END, 1, *INST, 1139, *TSNI, 1554, *END],
]
LEARNT = [[1234, *END], [1371, *END], [2114, *END, 1554, *END]]
LAST = [[1234, *END], [1371, *END], [1554, *END]]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


OPENAI = [
    {"messages": [{"role": "developer", "content": "be"}, user(parts("n", "ot")), answer("answer")]},
    {"messages": [{**user("what"), "name": "Ann"}, {**answer("help"), "weight": 1, "refusal": None}]},
    {"messages": [user("why"), answer("fact"), user("question"), answer(parts("something"))], "id": "7"},
]
SHAREGPT = [
    {"conversations": [{"from": f, "value": v} for f, v in turns], **more}
    for turns, more in (
        ([("human", "not"), ("gpt", "answer")], {"system": "be"}),
        ([("user", "what"), ("chatgpt", "help")], {}),
        ([("human", "why"), ("gpt", "fact"), ("human", "question"), ("gpt", "something")], {"source": "web"}),
    )
]
CONVERSATIONAL = [
    {"prompt": [{"role": "system", "content": "be"}, user("not")], "completion": [answer("answer")]},
    {"prompt": [user("what")], "completion": [answer("help")]},
    {"prompt": [user("why"), answer("fact"), user("question")], "completion": [answer("something")]},
]


def pairs(question: str, answer: str) -> list[dict[str, Any]]:
    """The three in a form of one question and one answer."""
    return [
        {question: "not", answer: "answer", "system": "be"},
        {question: "what", answer: "help", "history": []},
        {question: "question", answer: "something", "history": [["why", "fact"]]},
    ]


INSTRUCTED = [
    "<s>[INST] <<SYS>>\nbe\n<</SYS>>\n\nnot [/INST] answer </s>",
    "[INST] what [/INST] help",
    "<s> [INST] why [/INST] fact </s><s>[INST] question [/INST] something </s>",
]
CHATML = [
    "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nnot<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>\n",
    "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nhelp",
    "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nfact<|im_end|>\n<|im_start|>user\nquestion<|im_end|>\n"
    "<|im_start|>assistant\nsomething<|im_end|><|endoftext|>",
]


def lines(records: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def array(records: list[Any]) -> bytes:
    return json.dumps(records, indent=2).encode()


def table(records: list[Any], separator: str = ",") -> bytes:
    names = list(dict.fromkeys(name for record in records for name in record))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, delimiter=separator)
    writer.writeheader()
    for record in records:
        writer.writerow({n: v if isinstance(v, str) else json.dumps(v) for n, v in record.items()})
    return b"\xef\xbb\xbf" + file.getvalue().encode()


def columns(records: list[Any]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


FORMATS: dict[str, tuple[str, bytes, str, list[list[int]]]] = {
    "OpenAI": ("a.jsonl", lines(OPENAI), "OpenAI's messages", LEARNT),
    "ShareGPT": ("a.json", array(SHAREGPT), "ShareGPT", LEARNT),
    "TRL, conversational": ("a.jsonl", lines(CONVERSATIONAL), "TRL's conversational prompt and completion", LAST),
    "TRL": ("a.ndjson", lines(pairs("prompt", "completion")), "prompt and completion", LEARNT),
    "question": ("a.jsonl", lines(pairs("question", "answer")), "question and answer", LEARNT),
    "Alpaca, JSON lines": ("a.json", lines(pairs("instruction", "output")), "Alpaca", LEARNT),
    "Alpaca, an array": ("a.json", array(pairs("instruction", "output")), "Alpaca", LEARNT),
    "Dolly": ("a.jsonl", lines(pairs("instruction", "response")), "Dolly", LEARNT),
    "[INST]": ("a.jsonl", lines([{"text": text} for text in INSTRUCTED]), "[INST] in text", LEARNT),
    "ChatML": ("a.jsonl", lines([{"text": text} for text in CHATML]), "ChatML in text", LEARNT),
    "CSV": ("a.csv", table(pairs("prompt", "response")), "prompt and response", LEARNT),
    "CSV with semicolons": ("a.CSV", table(pairs("query", "response"), ";"), "query and response", LEARNT),
    "CSV of messages": ("a.tsv", table(OPENAI, "\t"), "OpenAI's messages", LEARNT),
    "ShareGPT, gz": ("a.json.gz", gzip.compress(array(SHAREGPT), mtime=0), "ShareGPT", LEARNT),
    "TRL, zst": ("a.jsonl.zst", zstd(lines(pairs("prompt", "completion"))), "prompt and completion", LEARNT),
    "Parquet": ("a.parquet", columns(SHAREGPT), "ShareGPT", LEARNT),
    "Parquet of texts": ("a.parquet", columns([{"text": text} for text in INSTRUCTED]), "[INST] in text", LEARNT),
}


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return llama2_tokenizer()


@pytest.mark.parametrize("format", FORMATS)
def test_three_dialogs_by_hand(format: str, llama2: Tokenizer, tmp_path: Path) -> None:
    name, data, form, wanted = FORMATS[format]
    (tmp_path / name).write_bytes(data)
    found = dialogs.render_all(DialogSettings(files=[tmp_path / name]), llama2, None, None)
    assert [example.tokens.tolist() for example in found.examples] == IDS
    assert [example.tokens[example.loss_mask].tolist() for example in found.examples] == wanted
    for example in found.examples:  # the last answer ends the dialog
        assert example.loss_mask[-3:].all()
    assert found.report.lines()[0] == f"3 dialogs read as {form}"


def test_what_is_not_used_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(OPENAI * 2))
    (tmp_path / "b.json").write_bytes(array(SHAREGPT))
    seen = ReadReport()
    assert len(list(read([tmp_path], seen))) == 9
    assert seen.lines() == [
        "6 dialogs read as OpenAI's messages, 3 dialogs read as ShareGPT",
        "not used: 'messages.name', 'id', 'source'",
    ]
    many = {"prompt": "Hi", "completion": "Hello", **{f"k{i}": 1 for i in range(20)}}
    (tmp_path / "c.jsonl").write_bytes(lines([many]))
    seen = ReadReport()
    list(read([tmp_path / "c.jsonl"], seen))
    assert seen.lines()[1] == "not used: 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', and 12 more"


@pytest.fixture(scope="module")
def hermes() -> Tokenizer:
    """Every byte a token, and ChatML's."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS]
    return from_merges(pieces, [CONTROL] * 3 + [NORMAL] * 256, [], "smollm", Ends(eos_id=2))


CHATML_SOURCE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_loss(record: Any, tokenizer: Tokenizer, template: str, folder: Path) -> tuple[str, list[str]]:
    """A record's whole text, and the texts that have a loss."""
    (folder / "x.jsonl").write_bytes(lines([record]))
    found = dialogs.render_all(DialogSettings(files=[folder / "x.jsonl"]), tokenizer, CHATML_SOURCE, template)
    (example,) = found.examples
    texts = {token: text for text, token in tokenizer.control.items()}

    def text(tokens: list[int]) -> str:
        return "".join(texts.get(t) or tokenizer.decode([t]) for t in tokens)

    runs: list[list[int]] = []
    before = False
    for token, now in zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    return text(example.tokens.tolist()), [text(run) for run in runs]


def test_answers_without_weight_are_read_and_have_no_loss(hermes: Tokenizer, tmp_path: Path) -> None:
    messages = [
        user("a"),
        {**answer("b"), "weight": 0},
        user("c"),
        {**answer("d"), "weight": 1},
        user("e"),
        answer("f"),
    ]
    whole, said = with_loss({"messages": messages}, hermes, CHATML_SOURCE, tmp_path)
    assert "assistant\nb<|im_end|>" in whole
    assert said == ["d<|im_end|>", "f<|im_end|>"]


CALL = '{"name": "weather", "arguments": {"city": "Rom"}}'
DECLARED = [{"name": "weather", "description": "Any.", "parameters": {"type": "object", "properties": {}}}]
TOLD = [("human", "How is it?"), ("function_call", CALL), ("observation", "sun"), ("gpt", "Sunny.")]
TOOLS_SHAREGPT = {"conversations": [{"from": f, "value": v} for f, v in TOLD], "tools": json.dumps(DECLARED)}
OPENAI_CALL = {"id": "x1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
TOOLS_OPENAI = {
    "messages": [
        user("How is it?"),
        {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
        {"role": "tool", "tool_call_id": "x1", "content": "sun"},
        answer("Sunny."),
    ],
    "tools": [{"type": "function", "function": DECLARED[0]}],
}


@pytest.mark.parametrize("record", [TOOLS_SHAREGPT, TOOLS_OPENAI])
def test_tools_are_declared_and_calls_have_a_loss(record: Any, hermes: Tokenizer, tmp_path: Path) -> None:
    whole, said = with_loss(record, hermes, HERMES, tmp_path)
    assert '"name": "weather", "description": "Any."' in whole
    assert "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>" in whole
    assert said == [f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "Sunny.<|im_end|>"]
    whole, said = with_loss(record, hermes, CHATML_SOURCE, tmp_path)  # which knows none
    assert whole.startswith("<|im_start|>system\nYou can call these functions, one JSON object a line:")
    assert said == [f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "Sunny.<|im_end|>"]


def test_messages_of_sharegpt_and_tools_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": SHAREGPT[1]["conversations"]}]))
    tools: list[list[dict[str, str]]] = [[{"name": "a", "description": "b"}], [{"name": "c"}]]
    (tmp_path / "b.parquet").write_bytes(columns([{"prompt": "Hi", "completion": "So", "tools": t} for t in tools]))
    seen = ReadReport()
    found = [dialog for _, dialog in read([tmp_path], seen)]
    assert seen.forms == {"ShareGPT": 1, "prompt and completion": 2}
    assert found[2].tools == ({"type": "function", "function": {"name": "c"}},)  # and no description that is null


def test_a_template_that_rewrites_calls_is_refused(hermes: Tokenizer, tmp_path: Path) -> None:
    forgetful = HERMES.replace(
        "{{ '\\n' }}<tool_call>", "{{ '\\n' }}{% if not loop.last or messages|length < 3 %}<tool_call>{% endif %}"
    )
    with pytest.raises(DataError, match="the chat template rewrites the assistant's messages"):
        with_loss(TOOLS_OPENAI, hermes, forgetful, tmp_path)


@given(st.lists(st.recursive(st.none() | st.text() | st.integers(), partial(st.lists, max_size=3)), max_size=6))
def test_elements_of_an_array_are_separated(values: list[Any]) -> None:
    """Each element with its line, however the array is laid out, beside Python's own reader."""
    for indent in (None, 1):
        data = json.dumps(values, indent=indent, ensure_ascii=False).encode()
        found = list(dialog_files._values(Path("x.json"), io.BytesIO(b"\n" + data)))
        assert [json.loads(text) for _, text in found] == values
        starts = data.splitlines()
        for where, text in found:
            assert text.splitlines()[0].strip() in starts[int(where.rpartition(":")[2]) - 2]


NAMES = ["messages", "conversations", "prompt", "completion", "text", "system", "history", "tools", "instruction"]
NAMES += ["output", "role", "from", "content", "value", "weight", "tool_calls", "function_call", "name", "type"]
WORDS = ["user", "gpt", "system", "tool", "function_call", "[INST] a [/INST] b", "<|im_start|>user\nx", "[]", "{", ""]
ANYTHING = st.recursive(
    st.sampled_from([None, 0, 1, True, 0.5, *WORDS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


MESSAGES = st.lists(st.dictionaries(st.sampled_from(NAMES), ANYTHING, min_size=1, max_size=3), min_size=1, max_size=3)


@given(st.dictionaries(st.sampled_from(NAMES), MESSAGES | ANYTHING, max_size=5))
def test_any_record_is_a_dialog_or_refused(record: dict[str, Any]) -> None:
    with suppress(DialogError):
        _, found, _ = understand(record)
        assert found.dialog.messages[-1].role == "assistant"


PAIR = b'{"prompt": "Hi", "completion": "Hello"}'
CUT = gzip.compress(lines([{"text": "a"}]), mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"[" + PAIR + b",\n" + PAIR, r"a.json: ends before its array does; the file is cut short"),
        ("a.json", b"[" + PAIR + b",\n{]", r"a.json:2: is not JSON \(.*\); write one object a line; --skip-bad"),
        ("a.json", b"[" + PAIR + b"]\n3", r"a.json:2: a record has messages"),
        ("a.json", PAIR + b"\n3\n", r"a.json:2: a record has messages"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: has 3 cells, and the first line names 2; fix the row"),
        ("a.csv", b'prompt,completion\n"' + b"x" * 200_000 + b'",y\n', r"a.csv:2: is not CSV \(field larger than"),
        ("a.csv", b"prompt,completion\n\xff,y\n", r"a.csv:2: is not UTF-8, at byte 0; save the file as UTF-8"),
        ("a.csv", b"x,y\n1,2\n", r"a.csv:2: a record has messages"),
        ("a.parquet", b"PAR1", r"a.parquet: cannot be read as Parquet after row 0: .*; write it anew"),
        ("a.jsonl.gz", CUT, r"a.jsonl.gz: cannot be read \(.*ended.*\); check"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00no", r"a.jsonl.xz: cannot be read \(.*\); check the file"),
        (
            "a.jsonl.gz",
            gzip.compress(bytes(80 << 20), mtime=0),
            r"a.jsonl.gz: cannot be read \(unpacks to more than .. MB\)",
        ),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"a.jsonl: is a pointer of Git LFS"),
    ],
)
def test_what_cannot_be_read(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read([tmp_path / name]))
    assert "\n" not in str(caught.value)


def test_places_in_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n[\n " + PAIR + b",\n\n " + PAIR.replace(b", ", b",\n") + b"]\n")
    (tmp_path / "b.json").write_bytes(PAIR.replace(b", ", b",\n") + b"\n\n" + PAIR)
    (tmp_path / "c.csv").write_bytes(b'prompt,completion\n"H\ni",x\nb,y\n')
    (tmp_path / "notes.txt").write_text("no dialogs")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.jsonl").write_text("no dialogs")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_bytes(PAIR)
    places = [where.removeprefix(f"{tmp_path}/") for where, _ in read([tmp_path])]
    assert places == ["a.json:3", "a.json:5", "b.json:1", "b.json:4", "c.csv:2", "c.csv:4", "deep/d.jsonl:1"]


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no file of dialogs; they end in .jsonl, .ndjson, .json, .csv, .tsv, .p"
    ):
        list(read([tmp_path]))
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: is not a regular file"):
        list(read([tmp_path / "a.jsonl"]))


def many_letters(path: Path) -> None:
    """A file of 2 KB with three hundred values of 60 MB."""
    indices, values = pa.array([0] * 300, pa.int32()), pa.array(["a" * 60_000_000])
    column = pa.DictionaryArray.from_arrays(indices, values)
    records = pa.table({"prompt": column, "completion": ["b"] * 300})
    parquet.write_table(records, path, compression="zstd", store_schema=False)


def test_a_row_of_parquet_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialog_files, "LONGEST", 60)
    rows = [{"prompt": "Hi", "completion": text} for text in ("So", "x" * 60, "No")]
    (tmp_path / "a.parquet").write_bytes(columns(rows))
    assert [raw is None for _, raw in dialog_files.records(tmp_path / "a.parquet")] == [False, True, False]


def long_lines(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(300):
            file.write(b"x" * (1 << 20))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.parquet", many_letters, "took more than 200 s or too much memory, and was stopped"),
        ("a.jsonl", long_lines, "a.jsonl:1: has more than 16 MB; cut it"),
        ("a.json", long_lines, "a.json: has more than 256 MB; write it as JSON lines, in a file that ends in .jsonl"),
        ("a.csv", long_lines, "a.csv:1: has more than 16 MB; cut it, or write JSON lines"),
    ],
)
def test_hostile_files_take_bounded_memory(
    name: str, write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    program = (
        "import re, sys; from pathlib import Path; from llama2.data.dialogs import read\n"
        "try: list(read([Path(sys.argv[1])]))\n"
        "except Exception as error: print(error)\n"
        "print(re.search('VmHWM: *([0-9]+)', Path('/proc/self/status').read_text().replace('\\t', ' '))[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / name], capture_output=True, text=True, check=True)
    said, memory = done.stdout.splitlines()
    assert message in said
    assert int(memory) << 10 < (100 << 20) + dialog_files.LARGEST
