"""What hostile documents cost `llama2 data build`: memory and time to read each kind, and what became of it.

Each kind is a folder of one file made to be read badly, beside a good document. A process of its own reads and cleans
it; its memory and that of the largest process which it started are measured from outside, and compared with the bounds
below. One JSON object on stdout.

    python bench/hostile_corpus.py > hostile.json
    python bench/hostile_corpus.py --only gzip_bomb,deep_python
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2.records import installed

#: Bounds of a task that reads one such file with the default limit of 4 MB a document: MB of the process and of the
#: largest that it starts, and seconds of processors.
MEMORY, CHILD_MEMORY, SECONDS = 1000, 1300, 60
MB = 1 << 20

READ = """
import json, resource, sys, time
from llama2.data import clean, describe, read
from llama2.data.settings import BuildRecipe
asked = BuildRecipe.model_validate({"output": "out", "dir": sys.argv[1], **json.loads(sys.argv[2])})
begun = time.perf_counter()
stage = read.Read(asked, read.find(asked))
documents = stage.documents(iter(()), 0, 1)
kept = [len(each.text) for each in clean.Clean(asked, describe.word_list).documents(documents, 0, 1)]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
json.dump({
    "kept": len(kept), "characters": sum(kept), "counts": dict(stage._counts), "seconds": time.perf_counter() - begun,
    "processor_seconds": sum(each.ru_utime + each.ru_stime for each in (own, children)),
    "megabytes": int(peak) / 1024, "child_megabytes": children.ru_maxrss / 1024,
}, sys.stdout)
"""


def warc(pages: Iterable[bytes], head: bytes = b"") -> bytes:
    """A WARC of pages, each the answer to a request."""
    records = []
    for page in pages:
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + head + b"\r\n" + page
        records.append(
            b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a/\r\n"
            b"Content-Type: application/http; msgtype=response\r\n"
            b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(body), body)
        )
    return b"".join(records)


def packed(place: Path, piece: bytes, times: int) -> None:
    """A gzip file of a piece, again and again."""
    with gzip.open(place, "wb", compresslevel=6) as file:
        for _ in range(times):
            file.write(piece)


def table(place: Path, value: str, rows: int) -> None:
    """A Parquet file of one value, which is stored once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({"text": column}), place, compression="zstd", dictionary_pagesize_limit=1 << 30)


def zstd(place: Path, data: bytes) -> None:
    """A zstd file."""
    import pyarrow as pa

    place.write_bytes(pa.compress(data, "zstd", asbytes=True))


def binary(name: str, make: Callable[[], bytes]) -> Callable[[Path], None]:
    """What writes a file with these bytes."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(make())

    return write


KINDS: dict[str, Callable[[Path], None]] = {
    "nested_html_50_kB": binary("a.html", lambda: b"<div>" * 10_000 + b"deep"),
    "nested_html_4_MB": binary("a.html", lambda: b"<div>" * 800_000 + b"deep"),
    "misnested_html_1_MB": binary("a.html", lambda: b"<a><b><i><p></a>" * 65_536),
    "attributes_of_html_4_MB": binary(
        "a.html", lambda: b"<p " + b" ".join(b"a%d=1" % i for i in range(400_000)) + b">"
    ),
    "nested_page_in_warc": binary("a.warc", lambda: warc([b"<div>" * 10_000] * 5 + [b"<p>Good."])),
    "header_of_warc_300_MB": binary("a.warc", lambda: warc([b"<p>Good."], b"X-Long: " + b"x" * (300 * MB) + b"\r\n")),
    "name_of_warc_300_MB": binary("a.warc", lambda: b"WARC/1.0\r\nWARC-Type: " + b"x" * (300 * MB)),
    "gzip_bomb_in_warc_2_GB": lambda folder: packed(folder / "a.warc.gz", warc([bytes(20 * MB)]), 100),
    "value_of_parquet_300_MB": lambda folder: table(folder / "a.parquet", "x" * (300 * MB), 1),
    "dictionary_of_parquet_300_GB": lambda folder: table(folder / "a.parquet", "word " * 600_000, 100_000),
    "line_of_json_60_MB": binary("a.jsonl", lambda: b'{"text": "' + b"x" * (60 * MB) + b'"}'),
    "values_of_json_4_MB": binary("a.jsonl", lambda: b'{"text": "a", "x": [' + b"[]," * 1_300_000 + b"1]}"),
    "deep_json_4_MB": binary("a.jsonl", lambda: b"[" * (4 * MB - 1)),
    "line_of_text_1_GB": lambda folder: packed(folder / "a.txt.gz", b"x" * MB, 1000),
    "gzip_bomb_2_GB": lambda folder: packed(folder / "a.txt.gz", b"lines and more lines\n" * 50_000, 2_000),
    "zstd_bomb_1_GB": lambda folder: zstd(folder / "a.txt.zst", b"lines and more lines\n" * 50_000_000),
    "xz_bomb_1_GB": binary("a.txt.xz", lambda: lzma.compress(b"lines and more lines\n" * 50_000_000, preset=0)),
    "xz_dictionary_1_GB": binary(
        "a.txt.xz",
        lambda: lzma.compress(b"x" * MB, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]),
    ),
    "deep_python": binary("a.py", lambda: b"x = " + b"not " * 100_000 + b"y\n"),
    "unary_python_4_MB": binary("a.py", lambda: b"x = " + b"-" * (4 * MB - 10) + b"1\n"),
    "brackets_of_python_4_MB": binary("a.py", lambda: b"x = " + b"(" * (4 * MB - 10) + b"\n"),
    "list_of_python_4_MB": binary("a.py", lambda: b"x = [" + b"1," * (2 * MB - 10) + b"]\n"),
    "word_of_4_MB": binary("a.txt", lambda: b"x" * (4 * MB - 1)),
    "one_letter_words_of_4_MB": binary("a.txt", lambda: b"a " * (2 * MB - 1)),
    "addresses_of_4_MB": binary("a.txt", lambda: b"a@" + b"a." * (2 * MB - 10)),
}


def measure(name: str, make: Callable[[Path], None]) -> dict[str, Any]:
    """Make one kind, read it, and compare."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "texts"
        folder.mkdir()
        (folder / "good.txt").write_text("A good document, which is to stay whatever stands beside it.")
        make(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        settings: dict[str, Any] = {}
        if "python" in name:
            settings["sources"] = {"s": {"files": ["*.py"], "format": "docstrings"}, "t": {"files": ["*.txt"]}}
        begun = time.perf_counter()
        command = [sys.executable, "-c", READ, str(folder), json.dumps(settings)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
        wall = time.perf_counter() - begun
    result: dict[str, Any] = {"bytes": size, "wall_seconds": round(wall, 2)}
    try:
        found = json.loads(ran.stdout)
    except ValueError:
        return {**result, "held": False, "failed": ran.stderr[-500:]}
    for key, value in found.items():
        result[key] = round(value, 2) if isinstance(value, float) else value
    within = (
        found["megabytes"] <= MEMORY
        and found["child_megabytes"] <= CHILD_MEMORY
        and found["processor_seconds"] <= SECONDS
    )
    return {**result, "held": bool(found["kept"] and within)}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="kinds, with commas; none: all")
    options = parser.parse_args()
    kinds = options.only.split(",") if options.only else list(KINDS)
    results = {}
    for name in kinds:
        results[name] = measure(name, KINDS[name])
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    bounds = {"megabytes": MEMORY, "child_megabytes": CHILD_MEMORY, "processor_seconds": SECONDS}
    versions = {name: installed(name) for name in ("pyarrow", "fastwarc", "resiliparse")}
    json.dump({**provenance(), **versions, "bounds": bounds, "kinds": results}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
