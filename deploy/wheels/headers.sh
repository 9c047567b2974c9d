#!/usr/bin/env bash
# deploy/wheels/headers.sh DIR: what is needed of other systems' Pythons to compile for them, from Debian's packages:
# headers of 3.11 and 3.13 for x86-64 and ARM, and for Windows the names that its DLLs export.
#
# DIR/linux/include/python3.X      headers, and one pyconfig.h for each processor beside them
# DIR/windows/3.X/include          the same headers with Windows' own pyconfig.h
# DIR/windows/3.X/pythonXX.def     what python311.dll (3.11) and python3.dll (the stable ABI) export
#
# Needs Debian or Ubuntu with apt and curl's certificates; 80 MB are fetched, and nothing is installed.
set -euo pipefail
mkdir -p "$1"
here=$(realpath "$1")
cd "$here"
mkdir -p apt/lists/partial apt/cache linux

# The machine's own mirror, for the two suites that have these versions.
awk '/^Types:/ { block++ } block < 2' /etc/apt/sources.list.d/debian.sources |
    sed -e 's/^Types:.*/Types: deb deb-src/' -e 's/^Suites:.*/Suites: bookworm trixie/' >apt/debian.sources
fetch() { # ARCHITECTURE COMMAND PACKAGE ...
    local options=(-o Dir::Etc::SourceParts=/dev/null -o Dir::Etc::SourceList="$here/apt/debian.sources"
        -o Dir::State::Lists="$here/apt/lists" -o Dir::Cache="$here/apt/cache" -o Dir::State::status=/dev/null
        -o APT::Architecture="$1" -o APT::Architectures="$1" -o APT::Sandbox::User=root)
    apt-get --quiet=2 "${options[@]}" update
    apt-get --quiet=2 "${options[@]}" "${@:2}"
}
for architecture in amd64 arm64; do
    fetch "$architecture" download libpython3.11-dev libpython3.13-dev libpython3.11 libpython3.13
done
for package in libpython*.deb; do dpkg-deb --extract "$package" linux; done
[ -d linux/include ] || mv linux/usr/include linux/include

fetch amd64 source --download-only python3.11 python3.13
for version in 3.11 3.13; do
    folder=windows/$version
    mkdir -p "$folder/source"
    tar --extract --file "$(echo python"$version"_*.orig.tar.[gx]z)" --directory "$folder/source" --strip-components 1 \
        --wildcards '*/PC/pyconfig.h*' '*/PC/python3dll.c'
    cp --recursive "linux/include/python$version" "$folder/include"
    cp "$folder"/source/PC/pyconfig.h* "$folder/include/pyconfig.h" # from 3.13 on it is a template of nothing
done

# python311.dll exports what the library on Linux does, python3.dll what its source lists.
{
    echo 'LIBRARY python311.dll' && echo EXPORTS
    nm --dynamic --defined-only linux/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0 |
        awk '$3 ~ /^_?Py/ { print $3 ($2 == "T" ? "" : " DATA") }'
} >windows/3.11/python.def
{
    echo 'LIBRARY python3.dll' && echo EXPORTS
    sed --quiet --regexp-extended -e 's/^EXPORT_FUNC\((\w+)\)/\1/p' -e 's/^EXPORT_DATA\((\w+)\)/\1 DATA/p' \
        windows/3.13/source/PC/python3dll.c
} >windows/3.13/python.def
rm -rf apt ./*.deb ./python3.* linux/usr windows/*/source
