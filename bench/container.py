"""The image of deploy/container, run as Kubernetes would: user 10001, a read-only root, little memory, no network out.

A machine for builds may have no daemon of containers. So the image's files are taken as a folder (`buildah mount`), and
bubblewrap makes the namespaces. The checks: it answers; it writes nowhere else; it refuses a wrong hash, a missing
volume and a missing key, each in one line; at SIGTERM, eight streams that are open end whole, and nothing new is taken.

    python bench/container.py ROOT MODEL.gguf --memory 2 > container.json

Needs Linux, root, bubblewrap, `unshare`, and control groups for the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import provenance

PORT = 8080
STREAMS, TOKENS = 8, 300
URL = f"http://127.0.0.1:{PORT}"


def command(root: Path, folder: Path, variables: dict[str, str], *words: str) -> list[str]:
    """bubblewrap's command line for the image's start script, with `folder`'s models and cache."""
    settings = {"PATH": "/opt/llama2/bin:/usr/local/bin:/usr/bin:/bin", "LLAMA2_HOME": "/cache", "PORT": str(PORT)}
    settings |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **variables}
    named = [word for name, value in settings.items() for word in ("--setenv", name, value)]
    mounts = ["--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108
    mounts += ["--ro-bind", str(folder / "models"), "/models", "--bind", str(folder / "cache"), "/cache"]
    user = [
        "--unshare-user",
        "--uid",
        "10001",
        "--gid",
        "10001",
        "--unshare-pid",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
    ]
    return ["bwrap", *user, *mounts, "--clearenv", *named, "/usr/local/bin/start", *words]


@dataclass(frozen=True, slots=True)
class Group:
    """A control group of memory, of version 2 or 1."""

    folder: Path
    limit: str
    peak: str

    @classmethod
    def create(cls, memory: float) -> Group | None:
        """One with so many GB; None where there is none to be had."""
        root, name = Path("/sys/fs/cgroup"), f"llama2-{os.getpid()}"
        if (root / "cgroup.controllers").exists():
            group = cls(root / name, "memory.max", "memory.peak")
        elif (root / "memory/memory.limit_in_bytes").exists():
            group = cls(root / "memory" / name, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
        else:
            return None
        try:
            group.folder.mkdir()
            (group.folder / group.limit).write_text(str(int(memory * 1e9)), encoding="ascii")
        except OSError:
            group.remove()
            return None
        return group

    def enter(self) -> None:
        """Put this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def most(self) -> int:
        """Bytes that it had at most, pages of files included."""
        return int((self.folder / self.peak).read_text(encoding="ascii"))

    def remove(self) -> None:
        """Take it away, if it is there."""
        with suppress(OSError):
            self.folder.rmdir()


def healthy() -> int:
    """Status of /health; 0 where nobody listens."""
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def stream(number: int) -> dict[str, Any]:
    """An answer as a stream: how many pieces, and whether it ended as it should."""
    body = {
        "messages": [{"role": "user", "content": f"Write a long story about {number} friends."}],
        "stream": True,
        "max_tokens": TOKENS,
    }
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body | {"temperature": 0}).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", "Bearer key")
    with urllib.request.urlopen(request, timeout=500) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    reasons = [choice["finish_reason"] for line in lines[:-1] for choice in json.loads(line[6:])["choices"]]
    return {"pieces": len(lines), "whole": lines[-1] == "data: [DONE]", "finish": [r for r in reasons if r][-1:]}


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, and it: of bubblewrap the last is the container's process 1."""
    found = [pid]
    for each in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        found += descendants(int(each))
    return found


def drained(server: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """Eight streams, SIGTERM to the process within, and how all ended."""
    end = time.monotonic() + seconds
    while healthy() != 200 and time.monotonic() < end and server.poll() is None:
        time.sleep(0.5)
    first = stream(0)
    with ThreadPoolExecutor(STREAMS) as pool:
        waiting = [pool.submit(stream, number) for number in range(1, STREAMS + 1)]
        time.sleep(1)
        os.kill(descendants(server.pid)[-1], signal.SIGTERM)
        time.sleep(0.5)
        new = healthy()
        streams = [each.result() for each in waiting]
    return {"first": first, "new requests while it drains": new, "streams": streams, "exit code": server.wait(60)}


def inside(options: argparse.Namespace) -> None:
    """In a network namespace of its own: all checks."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("models", "cache"):
            (folder / part).mkdir()
        (folder / "cache").chmod(0o777)  # user 10001 within is root outside

        def refused(**variables: str) -> dict[str, Any]:
            given = command(options.root, folder, {"LLAMA2_API_KEY": "key"} | variables)
            done = subprocess.run(given, capture_output=True, text=True, check=False)
            return {"exit code": done.returncode, "said": done.stderr.splitlines()}

        found["no volume"] = refused()
        model = folder / "models" / options.model.name
        os.link(options.model, model) if options.link else model.write_bytes(options.model.read_bytes())
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        found["wrong hash"] = refused(MODEL_SHA256="0" * 64)
        found["no key"] = refused(LLAMA2_API_KEY="")
        group = Group.create(options.memory)
        variables = {"LLAMA2_API_KEY": "key", "MODEL_SHA256": digest}
        words = ["--parallel", "8", "--cache-gb", "0.3", "--context", "512", "--drain", "300"]

        with (folder / "log").open("wb") as log:
            started = command(options.root, folder, variables, *words)
            server = subprocess.Popen(started, stdout=log, stderr=log, preexec_fn=group.enter if group else None)  # noqa: PLW1509
            try:
                found |= drained(server, 300)
            finally:
                server.kill()
                server.wait()
        found["log"] = (folder / "log").read_text(encoding="utf-8").splitlines()[-20:]
        if group is not None:
            found["peak bytes"] = group.most()
            group.remove()
    print(json.dumps(found | {"memory limit GB": group and options.memory}))


def main() -> None:
    """Run the checks in a namespace, and print JSON. Exit code 1 says that one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path, help="the image's files")
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--memory", type=float, default=2, help="GB that it may have (default 2)")
    parser.add_argument("--link", action="store_true", help="link the model's file instead of copying it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return
    again = ["unshare", "--net", sys.executable, __file__, *sys.argv[1:], "--inside"]
    done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    refusals = [found[name] for name in ("no volume", "wrong hash", "no key")]
    right = all(each["exit code"] == 1 and len(each["said"]) == 1 for each in refusals)
    right = right and all(each["whole"] for each in [found["first"], *found["streams"]]) and found["exit code"] == 0
    right = right and found["new requests while it drains"] == 503
    size = sum(path.lstat().st_size for path in options.root.rglob("*") if path.is_file() and not path.is_symlink())
    json.dump({**provenance(), "image bytes": size, **found, "right": right}, sys.stdout, indent=1)
    print()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
