"""Unmodified clients against a running server: which feature passes, and which fails with what.

Each library has an environment of its own in the folder that `--environments` names. `--install` makes them with pip
and npm; what is not there is left out, and the table says so. What is tried is in `client_probes.py` and
`client_probes.mjs`. The table goes to standard output in Markdown, every outcome to a JSON file. Exit code 1 if
something fails. Checks expect the default model's greedy answers.

    llama2 serve --port 8080
    python bench/serve_clients.py -m MODEL --environments DIR --install -o clients.json
    python bench/serve_clients.py -m MODEL --environments DIR --only anthropic -o clients.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from client_probes import CLIENTS
from provenance import provenance

#: The columns of the table: what a client may be able to do.
FEATURES = (
    "models", "chat", "stream", "completions", "responses", "logprobs", "schema", "tools", "tools, stream", "count",
    "embeddings", "agent", "stop", "regenerate", "title", "errors", "process",
)  # fmt: skip

#: Node's clients, which share one folder of modules, and their packages.
NODE: dict[str, tuple[str, ...]] = {
    "openai (Node)": ("openai",),
    "Vercel AI SDK": ("ai", "@ai-sdk/openai-compatible"),
    "LangChain.js": ("@langchain/openai", "@langchain/core"),
    "@openai/agents": ("@openai/agents", "zod"),
    "ollama (Node)": ("ollama",),
}

SECONDS = 900  # of a client, at most
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
PROBES = Path(__file__).with_name("client_probes.py")


class Result(TypedDict):
    """What was tried: packages at their versions, and each feature's outcome."""

    packages: dict[str, str]
    outcomes: dict[str, str]


def python(environments: Path, client: str) -> Path:
    """Interpreter of a Python client's environment."""
    return environments / CLIENTS[client].environment / "bin/python"


def distributions(client: str) -> list[str]:
    """Packages of a Python client without their extras and versions."""
    return [re.split(r"[\[=]", package)[0] for package in CLIENTS[client].packages]


def install(environments: Path, client: str) -> None:
    """Install a client's packages where they are missing. Raises CalledProcessError."""
    if client in NODE:
        folder = environments / "node"
        folder.mkdir(parents=True, exist_ok=True)
        words = ("npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NODE[client])
    else:
        interpreter = python(environments, client)
        if not interpreter.exists():
            venv.create(interpreter.parents[1], with_pip=True)
        words = (str(interpreter), "-m", "pip", "install", "-q", *CLIENTS[client].packages)
    subprocess.run(words, check=True, stdout=sys.stderr)


def versions(environments: Path, client: str) -> dict[str, str]:
    """Installed versions of a client's packages; empty when one is missing."""
    if client in NODE:
        manifests = {name: environments / "node/node_modules" / name / "package.json" for name in NODE[client]}
        if not all(path.exists() for path in manifests.values()):
            return {}
        return {name: str(json.loads(path.read_text())["version"]) for name, path in manifests.items()}
    interpreter, names = python(environments, client), distributions(client)
    if not interpreter.exists():
        return {}
    done = subprocess.run([interpreter, "-c", VERSIONS, *names], capture_output=True, text=True, check=False)
    return dict(zip(names, done.stdout.split(), strict=True)) if done.returncode == 0 else {}


def tried(environments: Path, client: str, url: str, model: str) -> Iterator[tuple[str, str]]:
    """Each feature and its outcome, in a process of the client's environment; one that dies fails as `process`."""
    words: tuple[str, ...]
    if client in NODE:
        script = environments / "node" / PROBES.with_suffix(".mjs").name
        shutil.copyfile(PROBES.with_suffix(".mjs"), script)
        words = ("node", str(script))
    else:
        words = (str(python(environments, client)), "-P", str(PROBES))
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [*words, client, url, model], capture_output=True, text=True, timeout=SECONDS, check=False, env=quiet
        )
    except subprocess.TimeoutExpired:
        yield "process", f"FAILS: took longer than {SECONDS} s"
        return
    for line in done.stdout.splitlines():
        if line.startswith('["'):  # clients may print, too
            feature, outcome = json.loads(line)
            yield feature, outcome
    if done.returncode:
        yield "process", f"FAILS: {' '.join(done.stderr.split())[-400:]}"


def table(results: dict[str, Result]) -> str:
    """Clients by features in Markdown; failures are listed below."""
    lines = ["| client | packages | " + " | ".join(FEATURES) + " |", "| --- " * (len(FEATURES) + 2) + "|"]
    notes: list[str] = []
    for client, result in results.items():
        cells = []
        for feature in FEATURES:
            outcome = result["outcomes"].get(feature, "–")
            if outcome.startswith("FAILS"):
                notes.append(f"{len(notes) + 1}. {client}, {feature}: {outcome}")
                outcome = f"FAILS ({len(notes)})"
            cells.append(outcome)
        packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items()) or "not installed"
        lines.append(f"| {client} | {packages} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Try each client, log each outcome on standard error, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--environments", type=Path, required=True, help="folder with an environment for each library")
    parser.add_argument("--install", action="store_true", help="install what is missing there")
    parser.add_argument("--only", action="append", choices=[*CLIENTS, *NODE], help="one client; may be repeated")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    results: dict[str, Result] = {}
    for client in args.only or [*CLIENTS, *NODE]:
        if args.install and not versions(args.environments, client):
            install(args.environments, client)
        results[client] = {"packages": versions(args.environments, client), "outcomes": {}}
        cells = tried(args.environments, client, args.url.rstrip("/"), args.model)
        for feature, outcome in cells if results[client]["packages"] else ():
            results[client]["outcomes"][feature] = outcome
            print(f"{client:22} {feature:12} {outcome}", file=sys.stderr, flush=True)
        args.output.write_text(json.dumps({**provenance(), "clients": results}, indent=1) + "\n")
    print(table(results))
    if any(outcome.startswith("FAILS") for result in results.values() for outcome in result["outcomes"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
