#!/bin/sh
# Starts the server as the container's process 1, once the model is there and is the one that was meant.
#
# MODEL           a file or folder, by default the only one in /models
# MODEL_SHA256    of the file; a model that differs is refused
# PORT            8080
# LLAMA2_API_KEY  what clients must send
#
# Words that follow the image's name are options of `llama2 serve`.
set -eu

fail() {
    echo "llama2: error: $1" >&2
    exit 1
}

if [ -z "${MODEL:-}" ]; then
    set -- "$@" --
    count=0
    for each in /models/*; do
        [ -e "$each" ] || continue
        MODEL=$each count=$((count + 1))
    done
    [ "$count" -gt 0 ] || fail "/models holds no model; mount a volume there that has one, or set MODEL"
    [ "$count" -eq 1 ] || fail "/models holds $count models; set MODEL to one of them"
    # Take the mark away again, and keep the options as they were.
    while [ "$1" != -- ]; do
        set -- "$@" "$1"
        shift
    done
    shift
fi
[ -r "$MODEL" ] || fail "$MODEL: no such model, or it cannot be read; mount the volume that has it, readable for user $(id -u)"
if [ -n "${MODEL_SHA256:-}" ]; then
    [ -f "$MODEL" ] || fail "$MODEL: is a folder, and MODEL_SHA256 is of a file; set MODEL to the file"
    found=$(sha256sum "$MODEL" | cut -d ' ' -f 1)
    [ "$found" = "$MODEL_SHA256" ] || fail "$MODEL: its SHA-256 is $found, not $MODEL_SHA256; fetch it again"
fi
[ -n "${LLAMA2_API_KEY:-}" ] || fail "LLAMA2_API_KEY: is not set, and others can reach this server; set it to a key"
exec llama2 serve -m "$MODEL" --host 0.0.0.0 --port "${PORT:-8080}" "$@"
