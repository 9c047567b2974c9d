"""Single documents: how files are read, what is counted and skipped, personal information, quality, language."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from llama2.data import clean, compressed, extract, personal, quality, read
from llama2.data.settings import BuildRecipe
from llama2.data.words import Words
from llama2.errors import DataError
from llama2.text.worker import Worker

pytestmark = pytest.mark.usefixtures("quick_logs")


def documents(
    folder: Path, limit: int = 1 << 20, pattern: str = "*", **source: Any
) -> tuple[list[tuple[str, str | None]], Counter[str]]:
    """Text and address of each document of a source, and what was counted."""
    recipe = BuildRecipe.model_validate(
        {
            "output": "out",
            "dir": str(folder),
            "document_limit": limit,
            "sources": {"s": {"files": [pattern], **source}},
            "tokenizer": {"vocabulary": 300},
        }
    )
    reader = read.Read(recipe, read.find(recipe))
    found = [(each.text, each.metadata.get("url")) for each in reader.documents(iter(()), 0, 1)]
    counts = Counter({key.removeprefix("s/"): value for key, value in reader._counts.items()})
    del counts["bytes read"]
    return found, counts


def test_text_and_compressed_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("zwei é".encode()))
    (tmp_path / "c.md.bz2").write_bytes(bz2.compress(b"\xef\xbb\xbfthree"))
    assert documents(tmp_path) == ([("eins\n", None), ("zwei é", None), ("three", None)], Counter({"read": 3}))


def test_documents_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n== b ==\ntwo\n== c ==\n")
    assert documents(tmp_path, separator=r"\n(?=== )")[0] == [
        ("one", None),
        ("== b ==\ntwo", None),
        ("== c ==\n", None),
    ]


def test_docstrings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Module.\n\n    More.\n"""\nclass A:\n    """Class."""\n    def f(self): "F."\nx = "no"\n'
    )
    (tmp_path / "b.py").write_text("def (")
    found, counts = documents(tmp_path, format="docstrings")
    assert found == [("Module.\n\nMore.\n\nClass.\n\nF.", None)]
    assert counts == {"read": 1, "malformed": 1}


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a", "url": "http://x/"}',
        b"",
        b'{"text": ""}',
        b'{"text": 1}',
        b'{"other": "a"}',
        b"[1]",
        b"{",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800b"}',
        b'{"text": "' + b"x" * 200 + b'"}',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, counts = documents(tmp_path, limit=100)
    assert found == [("a", "http://x/"), ("?b", None), ("last", None)]
    assert counts == {"read": 3, "empty": 1, "malformed": 4, "not UTF-8": 1, "too long": 1}


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a", None, "c"], "url": ["http://x/", None, None]}), tmp_path / "a.parquet")
    found, counts = documents(tmp_path, text="body")
    assert found == [("a", "http://x/"), ("c", None)]
    assert counts == {"read": 2, "malformed": 1}


def test_warc(tmp_path: Path) -> None:
    page = "<html><body><nav>Menu</nav><main><p>Grüße &amp; more.</p><p>Second.</p></main></body></html>"
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=True)
    for address, kind, body in (
        ("http://a/", "text/html; charset=latin-1", page.encode("latin-1")),
        ("http://b/", "image/png", b"\x89PNG"),
    ):
        http = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
        writer.write_record(writer.create_warc_record(address, "response", io.BytesIO(body), http_headers=http))
    wet = writer.create_warc_record(
        "http://c/", "conversion", io.BytesIO("Texte déjà extrait".encode()), warc_content_type="text/plain"
    )
    writer.write_record(wet)
    (tmp_path / "a.warc.gz").write_bytes(stream.getvalue())
    found, counts = documents(tmp_path)
    assert [address for _, address in found] == ["http://a/", "http://c/"]
    assert "Grüße & more." in found[0][0]
    assert "Menu" not in found[0][0]
    assert found[1][0] == "Texte déjà extrait"
    assert counts == {"read": 2, "no page": 1}


def left_out(folder: Path, **source: Any) -> list[tuple[str, str]]:
    """Files that were left out, and why, as the card names them."""
    named = folder.parent / "left_out"
    recipe = BuildRecipe.model_validate({"output": "out", "dir": str(folder), "sources": {"s": source}})
    list(read.Read(recipe, read.find(recipe), named).documents(iter(()), 0, 1))
    return [(path, reason) for _, path, reason in json.loads((named / "00000.json").read_bytes())]


def test_damaged_files_are_left_out_by_name_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(b"\x1f\x8bnothing of the kind")
    (folder / "b.parquet").write_bytes(b"PAR1 nothing of the kind")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"whole " * 1000)[:-12])
    (folder / "d.txt.zst").write_bytes(b"nothing of the kind")
    (folder / "e.txt.xz").write_bytes(lzma.compress(b"x" * 100)[:-30])
    (folder / "f.txt").write_text("good")
    found, counts = documents(folder)
    assert found == [("good", None)]
    assert counts == {"read": 1, "damaged": 5}
    named = left_out(folder, files=["*"])
    assert [path for path, _ in named] == ["a.jsonl.gz", "b.parquet", "c.txt.gz", "d.txt.zst", "e.txt.xz"]
    assert all(reason.startswith("damaged: ") and "\n" not in reason for _, reason in named)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_the_system_refuses_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(.*\); fix it or exclude it"):
        documents(tmp_path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "a.txt").write_text("a")
    assert documents(tmp_path)[0] == [("a", None)]


def test_every_compression(tmp_path: Path) -> None:
    two = [b"first " * 20_000, b"second\n"]
    (tmp_path / "a.txt.gz").write_bytes(b"".join(map(gzip.compress, two)))
    (tmp_path / "b.txt.bz2").write_bytes(b"".join(map(bz2.compress, two)))
    (tmp_path / "c.txt.xz").write_bytes(b"".join(map(lzma.compress, two)))
    (tmp_path / "d.txt.zst").write_bytes(b"".join(pa.compress(each, "zstd", asbytes=True) for each in two))
    found, counts = documents(tmp_path)
    assert found == [(b"".join(two).decode(), None)] * 4
    assert counts == {"read": 4}


def test_bombs_end_at_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE", 1 << 16)
    lines = (b"x" * 1023 + b"\n") * (1 << 14)  # 16 MB, a thousandth of which is left
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "c.txt.bz2").write_bytes(bz2.compress(lines))
    (tmp_path / "d.txt.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(1 << 18).hex().encode()))
    found, counts = documents(tmp_path, limit=1 << 22)
    assert counts["unpacks to too much"] == 4
    assert len(found[-1][0]) == 1 << 19


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize(
    "text",
    [
        "Das Wetter war schön, und wir gingen am Fluß entlang, bis es endlich dunkel wurde.\n\nÜber den Hügeln.",
        "L’été dernier, nous étions à la mer ; ça nous a beaucoup plu, même s’il pleuvait.\nEt après ? Rien.",
        "El señor Núñez contestó que sí, que vendría mañana por la mañana con sus niños.",
    ],
)
def test_encodings_that_are_certain(tmp_path: Path, encoding: str, text: str) -> None:
    if encoding == "latin-1":
        text = text.replace("’", "'")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    found, counts = documents(tmp_path)
    assert found == [(text, None)] * 2
    assert counts["read"] == 2
    assert sum(value for key, value in counts.items() if key.startswith("converted: ")) == 2 * (encoding != "utf-8-sig")


@pytest.mark.parametrize(
    "data",
    [
        "Погода была хорошая, и мы гуляли вдоль реки до темноты.".encode("koi8-r"),
        "Погода была хорошая, и мы гуляли вдоль реки до темноты.".encode("cp1251"),
        "Pogoda była ładna, więc poszliśmy wzdłuż rzeki aż do zmroku.".encode("cp1250"),
        "Počasí bylo pěkné, a tak jsme šli podél řeky až do setmění.".encode("iso8859-2"),
        "Počasí bylo velmi pěkné, a proto jsme celé odpoledne chodili podél řeky po starém městě.".encode("iso8859-2"),
        "Das Wetter war schön, und wir gingen am Fluß entlang, bis es dunkel wurde.".encode("mac-roman"),
        "Das Wetter war schön, und wir gingen am Fluß entlang, bis es dunkel wurde.".encode("cp850"),
        "天気がよかったので、暗くなるまで川沿いを歩きました。".encode("shift-jis"),
        "Half of it is UTF-8: schön. ".encode() + "And half of it is not: schön.".encode("latin-1"),
        b"The weather was fine \x01 and caf\xe9 was open until it was dark and cold outside.",
        b"a\xff",
    ],
)
def test_encodings_that_are_not(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert documents(tmp_path) == ([], Counter({"not UTF-8": 1}))


def test_what_is_not_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "b.bin").write_bytes(b"text, and then\0" * 100)
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.7\nstream")
    (tmp_path / "d.txt").write_bytes(b" \n")
    (tmp_path / "e.txt").write_bytes(b"")
    assert documents(tmp_path) == ([], Counter({"no text": 3, "empty": 1}))


def test_html(tmp_path: Path) -> None:
    page = "<html><head><meta charset=latin-1></head><body><nav>Menu</nav><main><p>Grüße &amp; mehr.</p></main>"
    (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(b"<nav>Only a menu.</nav>"))
    assert documents(tmp_path)[0] == [("Grüße & mehr.", None), ("Only a menu.", None)]


def test_a_page_that_takes_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SECONDS", 0.2)
    (tmp_path / "a.html").write_text("<div>" * 50_000 + "deep")
    (tmp_path / "b.html").write_text("<p>flat")
    found, counts = documents(tmp_path)
    assert found == [("flat", None)]
    assert counts == {"read": 1, "took too much time or memory": 1}


def test_sources_that_no_compiler_reads(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = " + "not " * 100_000 + "y")
    (tmp_path / "b.py").write_text("x = " + "-" * 1_000_000 + "1")
    (tmp_path / "c.py").write_text('"""Good."""')
    found, counts = documents(tmp_path, limit=1 << 22, format="docstrings")
    assert found == [("Good.", None)]
    assert counts["malformed"] + counts["took too much time or memory"] == 2


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="no /proc here")
@pytest.mark.parametrize("form", ["parquet", "rows"])
def test_a_reader_has_a_limit_of_memory(form: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    place = str(tmp_path / "a.parquet")
    asked = {"place": place, "form": form, "names": ["text"], "limit": 10, "seconds": 5}
    with Worker(extract.__file__, DataError) as worker:
        assert "error" not in worker.ask(asked, 20)
        assert worker.process is not None
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    [size] = re.findall(r"Max address space +(\d+)", limits)
    assert int(size) == 1280 << 20


def test_a_value_of_parquet_has_a_limit(tmp_path: Path) -> None:
    long = pa.table({"text": ["short", "x" * 300_000, "last"]})
    pq.write_table(long, tmp_path / "a.parquet", compression="zstd")
    pq.write_table(pa.table({"text": ["y" * 60_000_000]}), tmp_path / "b.parquet", compression="zstd")
    assert (tmp_path / "b.parquet").stat().st_size < 100_000
    found, counts = documents(tmp_path, limit=200_000)
    assert found == [("short", None), ("last", None)]
    assert counts["too long"] + counts["took too much time or memory"] + counts["damaged"] == 2


def test_one_value_of_parquet_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE", 1 << 16)
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["word " * 2000]))
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="zstd")
    found, counts = documents(tmp_path)
    assert 1 <= len(found) < 100
    assert counts["unpacks to too much"] == 1


def test_json_lines_of_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_JSON_MEMORY", 1 << 16)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "x": [' + "[]," * 1000 + "[]]}\n" + "[" * 100)
    found, counts = documents(tmp_path)
    assert found == [("a", None)]
    assert counts == {"read": 1, "took too much time or memory": 1, "malformed": 1}


def test_where_records_have_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a"}\n{"body": "b", "content": "c"}\n{"story": "d", "id": 1}')
    pq.write_table(pa.table({"id": [1], "body": pa.array(["e"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert documents(tmp_path)[0] == [("a", None), ("c", None), ("e", None)]
    assert left_out(tmp_path, files=["*.jsonl"]) == [("a.jsonl", "malformed: no text in text; there is story, id")]
    assert documents(tmp_path, text="story", pattern="*.jsonl")[0][2] == ("d", None)


class _Endless(io.RawIOBase):
    """A line of so many bytes, that is nowhere as a whole, then a short one."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._end = b"\nend"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._left)
        if size:
            self._left -= size
            buffer[:size] = b"x" * size
            return size
        data, self._end = self._end[: len(buffer)], self._end[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


@pytest.mark.parametrize("reader", [read.lines, read.pieces])
def test_a_line_of_a_gigabyte_is_never_held(reader: Any) -> None:
    tracemalloc.start()
    assert list(reader(io.BufferedReader(_Endless(1 << 30), 1 << 16), 1 << 20)) == [None, b"end"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@given(
    st.binary(max_size=60).map(lambda data: data.translate(bytes(b"a\n"[i % 2] for i in range(256)))), st.integers(1, 9)
)
def test_pieces_are_the_whole_file(data: bytes, limit: int) -> None:
    found = list(read.pieces(io.BytesIO(data), limit))
    assert all(len(piece) <= limit for piece in found if piece is not None)
    if None not in found:
        assert b"".join(piece for piece in found if piece) == data
    else:
        assert any(len(line) > limit - 1 for line in data.split(b"\n"))
    if all(len(line) < limit for line in data.split(b"\n")):
        assert None not in found


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=6), st.integers(1, 9))
def test_lines_are_all_but_long_ones(rows: list[bytes], limit: int) -> None:
    data = b"\n".join(rows)
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    expected = [None if len(line.removesuffix(b"\n")) > limit else line for line in lines if line]
    assert list(read.lines(io.BytesIO(data), limit)) == expected


PERSONAL = [
    ("write to jo.doe+x@mail.example.org.", "write to [EMAIL].", "EMAIL"),
    ("call (415) 555-2671 now", "call [PHONE] now", "PHONE"),
    ("call 415-555-2671.", "call [PHONE].", "PHONE"),
    ("call +44 20 7946 0958", "call [PHONE]", "PHONE"),
    ("from 8.8.8.8 port 53", "from [IP] port 53", "IP"),
    ("SSN 536-22-8145", "SSN [SSN]", "SSN"),
    ("card 4111 1111 1111 1111 ok", "card [CARD] ok", "CARD"),  # the well-known test number, whose Luhn sum is 30
    ("IBAN GB82 WEST 1234 5698 7654 32", "IBAN [IBAN]", "IBAN"),  # the standard's own example
]


@pytest.mark.parametrize(("text", "expected", "kind"), PERSONAL)
def test_personal_information_is_replaced(text: str, expected: str, kind: str) -> None:
    assert personal.replace(text) == (expected, Counter([kind]))


@pytest.mark.parametrize(
    "text",
    [
        "@dataclass and a @ b",
        "192.168.0.1 and 127.0.0.1",
        "300.300.300.300",
        "4111 1111 1111 1112",
        "GB83 WEST 1234 5698 7654 32",
        "in 1990 1995 2000 and 2010-2011",
        "pi is 3.14159265358979, e is 2.718281828",
        "000-12-3456 and 666-12-3456",
        "1,234,567,890 people in 2020-01-31",
        "version 1.10.2",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert personal.replace(text) == (text, Counter())


def test_sites_and_what_is_below_them() -> None:
    hosts = frozenset({"spokeo.com"})
    assert personal.blocked("https://www.spokeo.com/john", hosts)
    assert personal.blocked("http://SPOKEO.com:80/", hosts)
    assert personal.blocked("http://[broken", hosts)
    assert not personal.blocked("https://notspokeo.com/", hosts)
    assert not personal.blocked("https://com/", hosts)


SENTENCES = [
    "The keeper climbed to the lantern before sunset, as he had done for thirty years.",
    "Below him lay the harbour, where fishermen were mending nets and boys threw stones.",
    "A schooner from the north would have to turn with the tide, or wait until morning.",
    "He trimmed every wick, polished brass, and wrote three lines about wind and cloud.",
    "That evening no ship came; instead a woman knocked at his door with a letter.",
    "It had travelled further than she, through two countries and a war.",
    "Nobody could read its seal, but both knew whose hand had folded that paper.",
    "So they sat until dawn without opening it, listening to waves break on rock.",
    "When light returned, gulls rose all together from their ledges and were gone.",
    "Then he took a knife, cut the thread, and began to laugh.",
]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("\n".join(SENTENCES), None),
        ("Too short to be of the use that we have with it.", "fewer than 50 words"),
        ("a b c d e " * 20, "mean word length not from 3 to 10"),
        ("antidisestablishmentarianism " * 60, "mean word length not from 3 to 10"),
        ("\n".join("# " + " # ".join(line.split()) for line in SENTENCES), "more than one # or … to ten words"),
        (
            " ".join(f"{i:05d} the of" if i % 2 else f"{i:05d} word" for i in range(60)),
            "less than 80 % of words with a letter",
        ),
        (
            " ".join(f"ipsum{chr(97 + i % 26)} dolor{chr(97 + i // 26)}" for i in range(80)),
            "fewer than 2 of the commonest words",
        ),
        ("\n".join(f"- {line}" for line in SENTENCES), "more than 90 % of lines with a bullet"),
        ("\n".join(f"{line[:-1]} …" for line in SENTENCES), "more than 30 % of lines with an ellipsis"),
        ("\n".join(SENTENCES + [SENTENCES[0]] * 5), "repeated lines"),
        (
            "\n".join(f"nonsense lampshade {word}" for line in SENTENCES for word in line.split()),
            "one 2-gram again and again",
        ),
        (" ".join(SENTENCES + SENTENCES[:4]), "repeated 5-grams"),
    ],
)
def test_quality(text: str, fault: str | None) -> None:
    assert quality.fault(text, Words(text)) == fault


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather was fine and we walked along the river until it was dark.", "en"),
        ("Das Wetter war schön, und wir gingen am Fluss entlang, bis es dunkel wurde.", "de"),
        ("天気がよかったので、暗くなるまで川沿いを歩きました。", "ja"),
        ("0101 1101 ::: {} [] ++ -- 0x1f", "unknown"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert clean.identify(clean.language_detector(), text) == language


def words_of(text: str) -> Iterator[str]:
    """Words by the definition, character by character."""
    word = ""
    for c in text:
        if c.isascii() and not c.isalnum():
            yield word
            word = ""
        elif c.encode()[0] >= 0xE3:
            yield word
            word = c
        elif word and word[0].encode()[0] >= 0xE3 and c.isascii():
            word += c
        else:
            word += c
    yield word


@given(st.lists(st.text(st.sampled_from("abAB01 .\n\0éß日本あ한😀"), max_size=30), min_size=2, max_size=2))
def test_words(texts: list[str]) -> None:
    plain = [[word.lower() if word.isascii() else word for word in words_of(text) if word] for text in texts]
    fast = [Words(text) for text in texts]
    for expected, words in zip(plain, fast, strict=True):
        assert words.lengths.tolist() == [len(word) for word in expected]
    cased = [[("".join(c.lower() if c.isascii() else c for c in word)) for word in words] for words in plain]
    together = [
        pair for words, each in zip(cased, fast, strict=True) for pair in zip(words, each.hashes.tolist(), strict=True)
    ]
    hashes = dict(together)
    assert all(hashes[word] == h for word, h in together)
    for words, each in zip(cased, fast, strict=True):
        assert len(each) == len(words)
        assert len(each.grams(3)) == max(len(words) - 2, 0)
    assert len(set(hashes.values())) == len(hashes)


def test_a_json_document_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json.txt").write_text(json.dumps({"text": "a"}))
    assert documents(tmp_path)[0] == [('{"text": "a"}', None)]
