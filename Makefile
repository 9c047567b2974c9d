# Everything below does its own set-up, in .venv; nothing but the target needs to be typed.
#
#   make chat                              talk with the default model; the first time, build and fetch it
#   make chat CHAT='"Why is it?" --seed 1' what follows `llama2 chat`
#   make test TESTS=tests/unit             what follows `pytest`
#   make docs                              the documentation as a site, in build/site
#   make ... PYTHON=python3.12             the interpreter that .venv is made from
#   make ... INSTALL='uv pip install'      what installs into .venv, by default its pip
#   make ... LLAMA2=dist/NAME.whl          what is installed, by default this folder

PYTHON = python3
CHAT =
TESTS =

BIN = .venv/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL = $(PIP) install
LLAMA2 = --editable .
NATIVE = src/llama2/native/*.h src/llama2/native/*.cpp
CPP_FILES = $(NATIVE) tests/native/*.cpp bench/*.c

.PHONY: chat test lint docs format build wheels clean

chat: .venv/installed
	@$(BIN)/llama2 chat $(CHAT)

test: .venv/testing
	@$(BIN)/pytest $(TESTS)

lint: .venv/testing
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

docs: .venv/documenting
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/testing
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet
	@$(BIN)/clang-format -i $(CPP_FILES)

build: .venv/created
	@$(PIP) wheel --no-deps --wheel-dir dist . </dev/null

# Six wheels for three systems, on Debian; what that takes is in deploy/wheels/build.py.
wheels: .venv/building build/pythons
	@$(BIN)/python deploy/wheels/build.py

build/pythons:
	@deploy/wheels/headers.sh $@ >&2

clean:
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# What ran is written down as an empty file; a change of the C++ or of the requirements installs again.

.venv/created:
	@$(PYTHON) -c 'import ensurepip, os, sys, sysconfig, venv; header = sysconfig.get_path("include") + "/Python.h"; \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))' 2>/dev/null || { echo \
	"$(PYTHON) is not Python 3.11 or newer with venv and C headers: name one with PYTHON=python3.12, or on Debian" \
	"'apt install python3-venv python3-dev'" >&2; exit 1; }
	@echo "Creating .venv" >&2
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml CMakeLists.txt $(NATIVE)
	@{ test -n "$$CXX" || command -v c++ || command -v g++ || command -v clang++; } >/dev/null || { echo \
	"a C++20 compiler is needed: on Debian 'apt install g++', on macOS 'xcode-select --install'" >&2; exit 1; }
	@echo "Building and installing llama2, which takes about a minute" >&2
	@$(INSTALL) $(LLAMA2) </dev/null >&2
	@touch $@

# PyTorch by itself first, so that nothing else chooses its version or build.
.venv/testing: .venv/installed
	@echo "Installing what the tests need, PyTorch among it, which takes some minutes" >&2
	@$(INSTALL) 'torch==2.13.0' </dev/null >&2
	@$(INSTALL) 'whole-llama[test]' </dev/null >&2
	@touch $@

.venv/building: .venv/created pyproject.toml
	@$(INSTALL) 'auditwheel>=6.4' 'cmake>=3.30' 'nanobind>=2.9' 'ninja>=1.11' 'wheel>=0.45' 'ziglang>=0.15' </dev/null >&2
	@touch $@

.venv/documenting: .venv/installed
	@$(INSTALL) 'whole-llama[docs]' </dev/null >&2
	@touch $@
