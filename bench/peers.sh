#!/bin/sh
# The programs that bench/table.py measures llama2 against, all from the package index, in one folder. What is already
# there is kept, so an interrupted run continues. About fifteen minutes on two cores, 1.5 GB.
#
#     bench/peers.sh DIR
#
# Environment: PYTHON makes the virtual environments (default python3); JOBS compile at once (default 2).

set -eu

if [ $# -ne 1 ]; then
    echo "usage: bench/peers.sh DIR" >&2
    exit 2
fi
mkdir -p "$1"
cd "$1"

python=${PYTHON:-python3}
release=llama_cpp_python-0.3.36
sources=$release/vendor/llama.cpp

# llama.cpp's sources are inside the sdist of llama-cpp-python.
if [ ! -f $release.tar.gz ]; then
    "$python" -m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
fi
[ -f $sources/CMakeLists.txt ] || tar xzf $release.tar.gz

# build FOLDER "TARGETS" OPTION...
build() {
    folder=$1 targets=$2
    shift 2
    cmake -S $sources -B "$folder" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "$@"
    # shellcheck disable=SC2086  # targets are words
    cmake --build "$folder" --parallel "${JOBS:-2}" --target $targets
}

build llama.cpp "llama-bench llama-batched-bench llama-completion llama-quantize" -DGGML_NATIVE=ON
build llama.cpp-avx2 "llama-bench" -DGGML_NATIVE=OFF -DGGML_AVX512=OFF \
    -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON

# venv FOLDER REQUIREMENT
venv() {
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
    "$1/bin/python" -m pip install --disable-pip-version-check "$2"
}

venv ik ik-llama-cpp-python==0.1.5
venv ov openvino-genai==2026.4.1
