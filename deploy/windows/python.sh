#!/usr/bin/env bash
# deploy/windows/python.sh DIR WHEEL PYTHONS: a Python 3.11 for Windows in DIR, with a wheel of this package and what it
# needs, to run under wine. No installer of Windows can be had from the package index, but one wheel there has Python's
# DLLs. PYTHONS is the folder that deploy/wheels/headers.sh makes.
#
# DIR/python/python.exe      CPython 3.11.9 and the standard library
# DIR/prefix                 wine's own folder, for WINEPREFIX
#
# Needs x86_64-w64-mingw32-gcc-posix, wine, and a Python 3.11 of this system, whose standard library is copied.
set -euo pipefail
mkdir -p "$1"
here=$(realpath "$1") wheel=$(realpath "$2") pythons=$(realpath "$3")
python=${PYTHON:-python3.11}
source=panda3d==1.10.16
hash=37acfb92655c4226879f95c988e2ef1449a53c54486d6c1ebc00e2772429af82

fetch() { # FOLDER REQUIREMENT ...
    "$python" -m pip --quiet --disable-pip-version-check download --platform win_amd64 --python-version 3.11 \
        --only-binary=:all: --dest "$@"
}

if ! [ -d "$here/dlls" ]; then
    fetch "$here" --no-deps "$source"
    echo "$hash  $(echo "$here"/panda3d-*.whl)" | sha256sum --quiet --check
    "$python" -m zipfile -e "$here"/panda3d-*.whl "$here/unpacked"
    mv "$here/unpacked/deploy_libs" "$here/dlls"
    rm -rf "$here/unpacked" "$here"/panda3d-*.whl
fi

rm -rf "$here/python"
mkdir -p "$here/python/DLLs" "$here/python/Lib/site-packages"
cp "$here"/dlls/{python3*,VCRUNTIME140*}.dll "$here/python"
cp "$here"/dlls/*.pyd "$here"/dlls/lib{crypto,ssl,ffi}*.dll "$here/python/DLLs"
cp "$here"/dlls/sqlite3.dll "$here/python/DLLs" 2>/dev/null || true
library=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
(cd "$library" && tar --create --exclude site-packages --exclude lib-dynload --exclude '__pycache__' --exclude test \
    --exclude 'config-*' .) | tar --extract --directory "$here/python/Lib"

cd "$here"
# wine 8 lacks a library that Rust's programs call for random bytes.
cat >random.c <<'C'
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE bytes, SIZE_T count) { return SystemFunction036(bytes, count); }
C
x86_64-w64-mingw32-gcc-posix -shared -o python/bcryptprimitives.dll random.c -ladvapi32
# Python's program is one call; the DLL is linked by name.
cat >python.c <<'C'
#include <stddef.h>
int Py_Main(int, wchar_t **);
int wmain(int count, wchar_t **words) { return Py_Main(count, words); }
C
printf 'LIBRARY python311.dll\nEXPORTS\nPy_Main\n' >python.def
x86_64-w64-mingw32-dlltool -d python.def -l libpython.dll.a
x86_64-w64-mingw32-gcc-posix -municode -o python/python.exe python.c libpython.dll.a
# The DLL of the stable ABI passes every call on to the version's own.
awk 'NR <= 2 { print; next } { print $1 "=python311." $1 ($2 == "DATA" ? " DATA" : "") }' \
    "$pythons/windows/3.13/python.def" >python3.def
echo 'int DllMainCRTStartup(void *a, unsigned b, void *c) { return 1; }' >python3.c
x86_64-w64-mingw32-gcc-posix -shared -nostdlib -e DllMainCRTStartup -o python/python3.dll python3.c python3.def
rm random.c python.c python.def python3.c python3.def libpython.dll.a

# numpy 2 aborts under wine 8. uvloop is not for Windows, which pip on Linux does not know.
requirements=(numpy==1.26.4 tokenizers sentencepiece jinja2 filelock huggingface_hub 'typer<0.28' rich prompt_toolkit
    llguidance pydantic fastapi uvicorn httptools prometheus-client opentelemetry-api colorama tzdata
    hypothesis pytest pytest-timeout gguf openai)
[ -d wheels ] || fetch wheels "${requirements[@]}"
for each in wheels/*.whl "$wheel"; do "$python" -m zipfile -e "$each" python/Lib/site-packages; done
export WINEPREFIX=$here/prefix WINEDEBUG=-all WINEDLLOVERRIDES='bcryptprimitives=n;mscoree,mshtml='
[ -d prefix ] || wineboot --init </dev/null >/dev/null 2>&1
wine python/python.exe -c 'import llama2; from llama2 import native; print(*native.supported())' </dev/null 2>&1 | cat
