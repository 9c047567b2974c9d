"""Wheels for Linux on x86-64 and ARM and for Windows, all built on Linux.

For Linux, Clang compiles, as the package ziglang brings it, for the version of glibc that the wheel's name promises.
For Windows it is Debian's MinGW. Each wheel has every instruction set of its processor. Python files and metadata come
from the build backend, once; the compiled modules are added to them for each system and ABI: CPython 3.11's own, and
the stable ABI of 3.12 and later.

    make wheels                                  # all six, in dist/
    python deploy/wheels/build.py --only linux-x86_64 --abi abi3

`make wheels` installs what this needs; for Windows it takes Debian's package g++-mingw-w64-x86-64-posix besides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class System:
    """What a wheel is for."""

    compiler: dict[str, str]  # what compiles, archives and makes indexes; {} is zig
    name: str  # CMake's
    processor: str  # CMake's
    tag: str  # of the wheel's file name

    @property
    def windows(self) -> bool:
        return self.name == "Windows"


def _zig(target: str) -> dict[str, str]:
    return {"CXX_COMPILER": f'"{{}}" c++ -target {target}', "AR": '"{}" ar', "RANLIB": '"{}" ranlib'}


@dataclass(frozen=True, slots=True)
class Abi:
    """What a module may ask of Python."""

    headers: str  # the version of Python whose headers are used
    tag: str  # of the wheel's file name
    suffix: str  # of a module's file name on Linux, where {} is the processor
    windows_suffix: str


MINGW = "x86_64-w64-mingw32-"
SYSTEMS = {
    "linux-x86_64": System(_zig("x86_64-linux-gnu.2.28"), "Linux", "x86_64", "manylinux_2_28_x86_64"),
    "linux-aarch64": System(_zig("aarch64-linux-gnu.2.28"), "Linux", "aarch64", "manylinux_2_28_aarch64"),
    "windows-x86_64": System(
        {"CXX_COMPILER": f"{MINGW}g++-posix", "AR": f"{MINGW}ar", "RANLIB": f"{MINGW}ranlib"},
        "Windows",
        "AMD64",
        "win_amd64",
    ),
}
ABIS = {
    "cp311": Abi("3.11", "cp311-cp311", ".cpython-311-{}-linux-gnu.so", ".cp311-win_amd64.pyd"),
    "abi3": Abi("3.13", "cp312-abi3", ".abi3.so", ".pyd"),
}


def run(command: Sequence[str | Path]) -> None:
    """Run a command to its end; its words are shown only when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n{' '.join(map(str, command))} failed")


def compiler(folder: Path, system: System) -> dict[str, Path]:
    """Programs that compile and archive for `system`, as CMake calls them."""
    import ziglang

    zig, found = Path(ziglang.__file__).with_name("zig"), {}
    for name, command in system.compiler.items():
        found[name] = folder / name.lower()
        found[name].write_text(f'#!/bin/sh\nexec {command.format(zig)} "$@"\n', encoding="utf-8")
        found[name].chmod(0o755)
    return found


def compile_modules(folder: Path, system: System, abi: Abi, pythons: Path) -> list[Path]:
    """The compiled modules for a system and an ABI, in `folder`, which keeps what a later build need not repeat."""
    import cmake
    import ninja

    folder.mkdir(parents=True, exist_ok=True)
    suffix = abi.windows_suffix if system.windows else abi.suffix.format(system.processor)
    include = pythons / ("windows" if system.windows else "linux")
    include = include / abi.headers / "include" if system.windows else include / "include" / f"python{abi.headers}"
    # The stable ABI's headers leave <stdio.h> out, and nanobind's rely on it; Debian's pyconfig.h includes another.
    flags = f"-include stdio.h -isystem {include.parent}"
    settings: dict[str, object] = {f"CMAKE_{name}": path for name, path in compiler(folder, system).items()}
    settings |= {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": system.name,
        "CMAKE_SYSTEM_PROCESSOR": system.processor,
        "CMAKE_CXX_FLAGS": flags,
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "LLAMA2_CROSS": "ON",
        "LLAMA2_DOTPROD": "-mcpu=generic+v8_2a+dotprod",  # zig has names of its own for processors
        "NB_SUFFIX": suffix,
        "NB_SUFFIX_S": suffix,
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": include,
    }
    if system.windows:
        # CMake reads the version from the library's name.
        library, stable = folder / f"libpython{abi.headers}.dll.a", folder / "libpython3.dll.a"
        run([f"{MINGW}dlltool", "-d", pythons / "windows" / abi.headers / "python.def", "-l", library])
        shutil.copy(library, stable)
        static = "-static -static-libgcc -static-libstdc++"
        settings |= {f"CMAKE_{kind}_LINKER_FLAGS": static for kind in ("SHARED", "MODULE")}
        settings |= {"Python_LIBRARY": library, "Python_SABI_LIBRARY": stable}
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    arguments = [f"-D{name}={value}" for name, value in settings.items()]
    run([program, "-G", "Ninja", "-S", ROOT, "-B", folder, *arguments])
    run([program, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    return sorted(folder.glob(f"_*{suffix}"))


def python_files(folder: Path) -> Path:
    """The wheel of the Python files alone, unpacked: what the build backend makes without CMake."""
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "-C",
            "wheel.cmake=false",
            "-C",
            "wheel.py-api=py3",
            "-w",
            folder,
            ROOT,
        ]
    )
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "wheel", "unpack", "-d", folder, wheel])
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def pack(base: Path, modules: Sequence[Path], system: System, abi: Abi, out: Path) -> Path:
    """A wheel of the Python files and the modules."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / base.name
        shutil.copytree(base, folder)
        for module in modules:
            shutil.copy(module, folder / "llama2/native")
        (metadata,) = folder.glob("*.dist-info/WHEEL")
        kept = [line for line in metadata.read_text().splitlines() if not line.startswith(("Tag:", "Root-Is-Purelib:"))]
        tag = f"{abi.tag}-{system.tag}"
        metadata.write_text("\n".join([*filter(None, kept), "Root-Is-Purelib: false", f"Tag: {tag}"]) + "\n")
        run([sys.executable, "-m", "wheel", "pack", "-d", out, folder])
    (wheel,) = out.glob(f"*-{tag}.whl")
    return wheel


def main() -> None:
    """Build, pack, and let auditwheel check that nothing newer is called than the name promises."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="systems (default all)")
    parser.add_argument("--abi", nargs="+", choices=ABIS, default=list(ABIS), help="ABIs (default both)")
    parser.add_argument("--pythons", type=Path, default=ROOT / "build/pythons", help="the folder of headers.sh")
    parser.add_argument("--build", type=Path, default=ROOT / "build/wheels", help="where to compile")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheels go")
    options = parser.parse_args()
    if not (options.pythons / "windows/3.13/python.def").is_file():
        sys.exit(f"{options.pythons} has no headers; make it with deploy/wheels/headers.sh {options.pythons}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        base = python_files(Path(name))
        for system in (SYSTEMS[name] for name in options.only):
            for abi in (ABIS[name] for name in options.abi):
                folder = options.build / f"{abi.tag}-{system.tag}"
                modules = compile_modules(folder, system, abi, options.pythons.resolve())
                wheel = pack(base, modules, system, abi, options.out)
                if not system.windows:
                    run([sys.executable, "-m", "auditwheel", "show", wheel])
                print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  {len(modules)} modules", flush=True)


if __name__ == "__main__":
    main()
