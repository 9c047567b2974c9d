"""Executes a program and then its tests, inside the sandbox that `execution.py` starts.

The sandbox's Python runs the text of this file, so it imports nothing of the package. On stdin are eight bytes with a
size, so many bytes of JSON, and a token. The token stays in the pipe until the tests have run to their end: then this
file copies it to stdout. A program that ends early, whatever it prints and whatever its exit status, never does.
"""

from __future__ import annotations

import json
import os
import sys

#: What stdout begins with once the limits hold: before it, a failure is the sandbox's and not the program's.
STARTED = b"started\n"
#: Bytes of a token.
TOKEN = 32
#: The user and group of the program where root starts the sandbox, since limits on processes do not bind root.
NOBODY = 65534


def limit(limits: dict[str, int]) -> None:
    """Become an ordinary user, and set hard `limits`, by the resource module's names; never above those that hold."""
    import resource

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def receive(size: int) -> bytes:
    """The next `size` bytes of stdin, fewer at its end. Nothing after them is read."""
    data = b""
    while len(data) < size and (part := os.read(0, size - len(data))):
        data += part
    return data


def execute(program: str, tests: str) -> None:
    """Execute both in one module. The tests are compiled apart, so that no quote left open can hide them."""
    from types import ModuleType

    module = ModuleType("program")
    sys.modules[module.__name__] = module
    for name, source in (("program", program), ("tests", tests)):
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)  # noqa: S102


def main() -> None:
    """Execute what is on stdin; the process ends here, without waiting for the program's threads."""
    request = json.loads(receive(int.from_bytes(receive(8), "big")))
    limit(request["limits"])
    token, stdout, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.write(stdout, STARTED)
    try:
        execute(request["program"], request["tests"])
        sys.stdout.flush()
    except BaseException as error:  # SystemExit too: the tests did not run to their end
        os.write(2, f"\n{type(error).__name__}: {error}\n"[:1000].encode("utf-8", "replace"))
        os._exit(1)
    os.write(stdout, os.read(token, TOKEN))
    os._exit(0)


if __name__ == "__main__":
    main()
