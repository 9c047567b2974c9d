"""deploy/azure as far as a machine without Azure can run it: score.py under Azure's own server, and the MLflow model.

`score.py` answers under `azmlinfsrv` in a network namespace of its own, as that server listens to all addresses. The
ChatModel is saved, loaded and asked by MLflow. Their answers must be those of `llama2.load` on the same model. What
the files in YAML say is tested by tests/unit/test_deploy.py, where azure-ai-ml is installed.

    python -m venv azure && azure/bin/pip install whole-llama azure-ai-ml azureml-inference-server-http mlflow
    azure/bin/python bench/azure.py MODEL.gguf > azure.json

Needs Linux and root, or namespaces of users, for `unshare`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from provenance import provenance

import llama2
from llama2.records import installed

ROOT = Path(__file__).resolve().parents[1]
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def ask(port: int, body: Any, seconds: float) -> tuple[int, Any]:
    """Status and JSON of a request, which is tried until the server is there."""
    end = time.monotonic() + seconds
    request = urllib.request.Request(f"http://127.0.0.1:{port}/score", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def inside(port: int) -> None:
    """In the namespace: start the server, ask, print what it answered."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    program = Path(sys.executable).with_name("azmlinfsrv")
    command = [str(program), "--entry_script", str(ROOT / "deploy/azure/score.py"), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            good = ask(port, {"messages": QUESTION, "max_tokens": 20, "temperature": 0}, 300)
            bad = ask(port, {"messages": QUESTION, "stream": True}, 60)
        finally:
            server.terminate()
    print(json.dumps({"good": good, "bad": bad}))


def scored(model: Path) -> dict[str, Any]:
    """What score.py answers under Azure's server."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / model.name).symlink_to(model)
        command = ["unshare", "--net", sys.executable, __file__, str(model), "--inside"]
        environment = {**os.environ, "AZUREML_MODEL_DIR": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def through_mlflow(model: Path) -> str:
    """What the ChatModel answers after it was saved and loaded."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/runs.db")
        script, place = str(ROOT / "deploy/azure/mlflow_model.py"), f"{folder}/saved"
        mlflow.pyfunc.save_model(place, python_model=script, artifacts={"model": str(model)}, pip_requirements=[])
        answer = mlflow.pyfunc.load_model(place).predict({"messages": QUESTION, "max_tokens": 20, "temperature": 0.0})
    text: str = answer["choices"][0]["message"]["content"]
    return text


def main() -> None:
    """Run both, compare, print JSON. Exit code 1 says that an answer differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--port", type=int, default=5001, help="in the namespace (default 5001)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.port)
        return
    model = options.model.resolve()
    with llama2.load(model) as ours:
        expected = ours.chat(QUESTION, max_tokens=20, temperature=0).text
    found = scored(model)
    (good, answer), (bad, refusal) = found["good"], found["bad"]
    text = answer["choices"][0]["message"]["content"]
    mlflow = through_mlflow(model)
    right = (good, bad) == (200, 400) and text == mlflow == expected and "stream" in refusal["error"]["message"]
    versions = {name: installed(name) for name in ("azureml-inference-server-http", "mlflow", "azure-ai-ml")}
    answers = {"score.py says": text, "ChatModel says": mlflow, "llama2 says": expected, "refused": refusal}
    json.dump({**provenance(), **versions, **answers, "right": right}, sys.stdout, indent=1)
    print()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
