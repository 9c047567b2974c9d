"""No circle of imports, none upward, also within functions; and importing any module does nothing."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import llama2

BENCH = Path(__file__).parents[2] / "bench"

#: Imports the modules named by its argument, and prints what their own statements did to the process.
WATCH = """
import atexit, importlib, json, logging, os, signal, subprocess, sys, threading, warnings

done, standard = [], sys.stdlib_module_names - {"__main__"}

def watch(owner, name):
    true = getattr(owner, name)
    def seen(*arguments, **options):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].partition(".")[0] in standard and frame.f_code.co_name != "<module>":
            frame = frame.f_back
        if (who := frame.f_globals["__name__"]).startswith("llama2"):  # what libraries do for themselves is theirs
            done.append(f"{who}: {owner.__name__}.{name}")
        return true(*arguments, **options)
    setattr(owner, name, seen)

for owner, names in {
    atexit: ["register"],
    threading.Thread: ["start"],
    subprocess.Popen: ["__init__"],
    signal: ["signal"],
    os: ["fork", "register_at_fork"],
    warnings: ["filterwarnings", "simplefilter"],
    logging: ["basicConfig"],
    logging.Logger: ["addHandler", "setLevel"],
    type(os.environ): ["__getitem__", "__setitem__", "__delitem__"],
}.items():
    for name in names:
        watch(owner, name)
for name in sys.argv[1].split(","):
    importlib.import_module(name)
print(json.dumps([sorted(set(done)), "torch" in sys.modules]))
"""
#: What needs PyTorch.
TORCH = (
    "llama2.model.",
    "llama2.train.",
    "llama2.engine.runner_torch",
    "llama2.align.ranking",
    "llama2.align.reward_training",
    "llama2.align.merging",
    "llama2.align.surrogate",
    "llama2.align.experience",
    "llama2.align.handover",
    "llama2.align.watching",
    "llama2.align.gatt_attention",
    "llama2.align.ppo",
)


@pytest.fixture(scope="module")
def graph() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("import_graph")
    finally:
        sys.path.remove(str(BENCH))


def test_imports_lead_down_and_nowhere_twice(graph: ModuleType) -> None:
    found = graph.report()
    assert (found.circles, found.upward, found.of_root) == ([], [], [])
    assert sum(found.files.values()) == len(names()) + 2  # the package, and what runs it
    assert next(graph.mermaid(found)) == "flowchart TD"


def test_circles_by_hand(graph: ModuleType) -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert sorted(graph.circles(arrows)) == [["a", "b", "c"], ["d", "e"]]


def test_an_import_upward_of_the_package_is_seen(graph: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.importlinter.contracts]]\ncontainers = ["llama2"]\nlayers = ["cli", "low | other", "errors"]\n'
    )
    package = tmp_path / "src" / "llama2"
    package.mkdir(parents=True)
    for name, text in {
        "__init__": "from llama2 import low",
        "cli": "import llama2",
        "low": "def f():\n    from llama2 import other\n    import llama2",
        "other": "from llama2 import errors",
        "errors": "def f():\n    from llama2 import cli",
    }.items():
        (package / f"{name}.py").write_text(text)
    program = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import import_graph, pathlib; "
        f"found = import_graph.report(pathlib.Path({str(tmp_path / 'src')!r})); "
        "print(found.upward, found.circles)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    upward = [("llama2.errors", "llama2.cli"), ("llama2.low", "llama2"), ("llama2.low", "llama2.other")]
    circle = ["llama2", "llama2.cli", "llama2.errors", "llama2.low", "llama2.other"]
    assert done.stdout.strip() == f"{upward} {[circle]}"


def names() -> list[str]:
    """Every module in Python, but for the one that runs the program."""
    found = [info.name for info in pkgutil.walk_packages(llama2.__path__, "llama2.")]
    return [name for name in found if name != "llama2.__main__" and not name.startswith("llama2.native._")]


def imported(modules: list[str], before: str = "") -> tuple[list[str], bool]:
    command = [sys.executable, "-W", "ignore", "-c", before + WATCH, ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen, torch = json.loads(done.stdout)
    return seen, torch


def test_importing_does_nothing() -> None:
    """No thread, process, handler of a signal, of an end or of a log, and no environment variable read or changed."""
    assert imported([name for name in names() if not name.startswith(TORCH)]) == ([], False)


def test_importing_what_needs_torch_does_nothing() -> None:
    assert imported([name for name in names() if name.startswith(TORCH)])[0] == []


def test_what_an_import_does_is_seen(tmp_path: Path) -> None:
    (tmp_path / "llama2_other.py").write_text(
        "import atexit, os, threading, warnings\n"
        "atexit.register(print)\nos.environ.get('HOME')\nthreading.Thread(target=print).start()\n"
        "warnings.filterwarnings('ignore')\nos.environ['A'] = 'b'\n"
    )
    seen, _ = imported(["llama2_other"], f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n")
    what = [
        "_Environ.__getitem__",
        "_Environ.__setitem__",
        "Thread.start",
        "atexit.register",
        "warnings.filterwarnings",
    ]
    assert seen == sorted(f"llama2_other: {each}" for each in what)
