#!/usr/bin/env bash
# bench/gpu_wheels.sh DIR [WHEEL]: what bench/gpu.py needs on a machine without a network, in DIR: this package's wheel
# for Python 3.12 and later on x86-64, and every wheel it needs that such a machine with PyTorch and transformers may
# lack. WHEEL is by default the one that `make wheels` has put into dist/. At most 60 MB.
#
# There, in a copy of this repository with DIR in it:
#
#     python3 -m pip install --no-index --find-links DIR whole-llama gguf
#     python3 bench/gpu.py
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
here=$(realpath "$1")
wheel=${2:-$(echo "$root"/dist/whole_llama-*-cp312-abi3-manylinux*_x86_64.whl)}
[ -f "$wheel" ] || { echo "$wheel: is not there; make it with \`make wheels\`" >&2 && exit 1; }
rm -f "$here"/*.whl
cp "$wheel" "$here"

# Those that come with PyTorch and transformers are there already; their versions must not change. NumPy is one.
options=(--disable-pip-version-check --quiet download --only-binary :all: --no-deps --python-version 3.12
    --implementation cp --dest "$here")
for glibc in 39 35 34 31 28 27 24 17; do options+=(--platform "manylinux_2_${glibc}_x86_64"); done
options+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"${PYTHON:-python3}" -m pip "${options[@]}" annotated-doc annotated-types anyio click fastapi gguf h11 httptools idna jinja2 \
    llguidance markdown-it-py markupsafe mdurl opentelemetry-api prometheus-client prompt-toolkit pydantic \
    "pydantic-core==$("${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet install --dry-run --no-deps --report - --ignore-installed pydantic 2>/dev/null |
        "${PYTHON:-python3}" -c 'import json, re, sys; [found] = json.load(sys.stdin)["install"]; print(re.search(r"pydantic-core==([\d.]+)", " ".join(found["metadata"]["requires_dist"]))[1])')" \
    pygments rich sentencepiece shellingham sniffio starlette 'typer<0.28' typing-extensions typing-inspection uvicorn \
    uvloop wcwidth
size=$(du --bytes --summarize "$here" | cut -f 1)
echo "$(find "$here" -name '*.whl' | wc -l) wheels, $((size / 1000000)) MB"
[ "$size" -le 60000000 ] || { echo "more than 60 MB" >&2 && exit 1; }
