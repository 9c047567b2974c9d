"""A model in programs that end, fork and run event loops while it answers: no abort, no hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2.text.worker import Worker
from models import write_tiny_gguf

#: Begins to answer in three threads, of which the end waits for none.
WORK = """
import sys, threading, llama2
path, runner = sys.argv[1:3]
begun = threading.Event()
def answer(model):
    while True:
        for event in model.generate_stream("to be", max_tokens=200, logit_bias={2: -1e9}):
            begun.set()
model = llama2.load(path, runner=runner)
for _ in range(3):
    threading.Thread(target=answer, args=(model,), daemon=True).start()
begun.wait()
"""
LOAD = """
import sys, threading, llama2
path, runner = sys.argv[1:3]
begun = threading.Event()
def load():
    while True:
        llama2.load(path, runner=runner)
        begun.set()
for _ in range(2):
    threading.Thread(target=load, daemon=True).start()
begun.wait()
"""
NATIVE = """
import sys, threading, numpy as np
from llama2 import native
begun, data = threading.Event(), np.zeros(34 * 4096, np.uint8)
def pack():
    while True:
        native.module().pack("Q8_0", data, 64, 2048, np.empty(native.module().packed_bytes("Q8_0", 64, 2048), np.uint8))
        begun.set()
for _ in range(3):
    threading.Thread(target=pack, daemon=True).start()
begun.wait()
"""
ENCODE = """
import sys, threading, llama2
model, begun = llama2.load(sys.argv[1]), threading.Event()
def encode():
    while True:
        model.encode("to be or not to be " * 20)
        begun.set()
for _ in range(3):
    threading.Thread(target=encode, daemon=True).start()
begun.wait()
"""
#: Ends so many times what follows, each in a process of its own that has PyTorch already. PyTorch did nothing before.
FORKED = """
import os, sys, torch
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        break
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print("ended with", status, file=sys.stderr)
        os._exit(1)
else:
    os._exit(0)
"""
HALF = 'stream = model.generate_stream("a", max_tokens=99, logit_bias={2: -1e9}); next(stream); next(stream)'
ANOTHER = "threading.Thread(target=answer, args=(llama2.load(path, runner=runner),), daemon=True).start()"

FORK = """
import os, signal, sys, threading, llama2
path, runner, kind = sys.argv[1:4]
model = llama2.load(path, runner=runner)
def answer():
    return model.generate("to be", max_tokens=20, temperature=0).token_ids
want, begun = answer(), threading.Event()
def work():
    while True:
        for event in model.generate_stream("a", max_tokens=200, logit_bias={2: -1e9}):
            begun.set()
if kind == "busy":
    threading.Thread(target=work, daemon=True).start()
    begun.wait()
stream = model.generate_stream("to be", max_tokens=20, temperature=0)
begin = [next(stream).token, next(stream).token]
for end in (sys.exit, os._exit):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            rest = list(stream)
            if rest[-1].error:
                print(rest[-1].error, flush=True)
            else:
                assert begin + [event.token for event in rest] == want
            assert answer() == want
        except llama2.Llama2Error as error:
            print(error, flush=True)
        except AssertionError as error:
            print("failed", error, flush=True)
        end(0)
    assert os.waitpid(child, 0)[1] == 0
if runner != "torch":
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(answer) == want
assert begin + [event.token for event in stream] == want
assert answer() == want
"""

ASYNCIO = """
import asyncio, sys, llama2
async def main():
    model = llama2.load(sys.argv[1])  # within a running loop
    other = await asyncio.to_thread(llama2.load, sys.argv[1])
    ask = lambda m: asyncio.to_thread(m.generate, "to be", max_tokens=20, temperature=0)
    answers = await asyncio.gather(*map(ask, (model, other, model)))
    assert answers[0] == answers[1] == answers[2]
    with_limit = asyncio.wait_for(asyncio.to_thread(model.generate, "a", max_tokens=5), 60)
    assert (await with_limit).text is not None
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def program(source: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(
    ("source", "runner", "status"),
    [
        (WORK, "native", 0),
        (WORK, "numpy", 0),
        (WORK, "torch", 0),
        (LOAD, "native", 0),
        (FORKED + LOAD, "torch", 0),
        (NATIVE, "native", 0),
        (ENCODE, "native", 0),
        (WORK + ANOTHER, "native", 0),
        (WORK + HALF, "native", 0),
        (WORK + "raise ValueError('mine')", "native", 1),
        (WORK + "sys.exit(3)", "native", 3),
        (WORK + "import atexit; atexit.register(lambda: model.generate('a', max_tokens=3))", "native", 0),
    ],
)
def test_the_interpreter_ends_while_threads_are_at_work(source: str, runner: str, status: int, model: Path) -> None:
    for _ in range(5 if source == LOAD else 3 if (source, runner) == (WORK, "native") else 1):
        done = program(source, model, runner, 5)
        assert done.returncode == status, done.stderr
        assert "terminate" not in done.stderr
        if not source.endswith(LOAD):  # whose pool of threads is closed before
            assert (done.stderr == "") == (status != 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("runner", "kind", "said"), [("native", "idle", ""), ("native", "busy", ""), ("numpy", "busy", "")]
)
def test_a_forked_process_answers_too(runner: str, kind: str, said: str, model: Path) -> None:
    done = program(FORK, model, runner, kind)
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_pytorch_says_that_it_does_not_outlive_a_fork(model: Path) -> None:
    done = program(FORK, model, "torch", "idle")
    line = "PyTorch does not work in a process forked from one that used it; load the model in a process that was"
    assert (done.returncode, done.stdout.count(line)) == (0, 4), done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_worker_stays_with_the_parent(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text("import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)")
    worker = Worker(str(script), ValueError)  # type: ignore[arg-type]
    assert worker.ask("a", 20) == "a"
    process = worker.process
    child = os.fork()
    if child == 0:
        try:
            same = worker.process is not None or worker.ask("b", 20) != "b"
            worker.close()
            os._exit(int(same))
        finally:
            os._exit(9)
    assert os.waitpid(child, 0)[1] == 0
    assert (worker.ask("c", 20), worker.process) == ("c", process)
    del worker  # which its process does not outlive
    assert process is not None
    assert process.returncode is not None


def test_under_asyncio(model: Path) -> None:
    done = program(ASYNCIO, model)
    assert done.returncode == 0, done.stderr


def test_in_a_notebook(model: Path) -> None:
    import nbclient
    import nbformat

    cells = [
        f"import llama2; model = llama2.load({str(model)!r})",
        "tokens = [event.token for event in model.generate_stream('to be', max_tokens=5, temperature=0)]\n"
        "stream = model.chat_stream('to be', max_tokens=99); print(next(stream).token is not None)",
        "import threading\n"
        "threading.Thread(target=lambda: [list(model.generate_stream('a')) for _ in range(99)], daemon=True).start()\n"
        "print(tokens == model.generate('to be', max_tokens=5, temperature=0).token_ids)",
        "import asyncio; answer = await asyncio.to_thread(model.generate, 'to be', max_tokens=5, temperature=0)\n"
        "print(answer.token_ids == tokens)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = [o["text"] for cell in notebook.cells for o in cell["outputs"] if o["name"] == "stdout"]
    assert said == ["True\n", "True\n", "True\n"]
