#!/usr/bin/env bash
# Creates .venv at the top of the repository and installs the pinned requirements into it.
#
#   bash scripts/env.sh            everything: requirements of the programs and the tests
#   bash scripts/env.sh runtime    requirements of the programs only
#
# Needs python3 (3.10-3.13; set PYTHON=... to use another one) and access to the package registry. It does nothing if
# the environment is up to date, and rebuilds it after an interrupted installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "env.sh: $*" >&2; exit 1; }

case "${1:-all}" in
    all) files=(requirements.txt requirements-test.txt) ;;
    runtime) files=(requirements.txt) ;;
    *) fail "unknown argument '$1': use 'runtime', or no argument for everything" ;;
esac

candidates=(python3 python3.13 python3.12 python3.11 python3.10)
if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi

find_python() {
    local candidate
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found (tried: ${candidates[*]}):" \
        "install one, or set PYTHON=/path/to/python3.11"
}

make_venv() {
    local python
    python=$(find_python)
    echo "env.sh: creating .venv with $("$python" --version)"
    rm -rf .venv
    mkdir .venv
    touch .venv/.unfinished
    "$python" -m venv .venv ||
        fail "'$python -m venv' failed, see above. Debian and Ubuntu package it separately:" \
            "install python3-venv, or set PYTHON=... to a complete Python"
}

stamp() { cksum "$1"; } # checksum, size and name of one requirements file
is_installed() { [[ "$(cat ".venv/.installed-$1" 2>/dev/null)" == "$(stamp "$1")" ]]; }

install_requirements() {
    local file uv
    touch .venv/.unfinished
    rm -rf .venv/ffmpeg
    uv=$(command -v uv || true)
    if [[ -z $uv ]]; then
        uv=.venv/bin/uv
        [[ -x $uv ]] || .venv/bin/python -m pip install --quiet uv || fail "pip could not install uv, see above"
    fi
    echo "env.sh: installing ${files[*]}"
    "$uv" pip install --python .venv/bin/python "${files[@]/#/--requirement=}" ||
        fail "installation failed, see above; fix the cause and rerun"
    for file in "${files[@]}"; do stamp "$file" >".venv/.installed-$file"; done
    rm .venv/.unfinished
}

# Where torchcodec finds no FFmpeg, .venv/ffmpeg links the libraries in PyAV's wheel (for Linux) under the names that it
# looks for (libavutil.so.60 for libavutil-5809ad29.so.60.26.102), and under their own, by which they load each other.
link_ffmpeg() {
    local library name found=1
    .venv/bin/python -c 'import sys, torchcodec as t; sys.exit(t.ffmpeg_major_version is None)' 2>/dev/null || found=""
    mkdir .venv/ffmpeg
    for library in .venv/lib/python3.*/site-packages/av.libs/*.so.*; do
        [[ -z $found && -e $library ]] || return 0
        name=${library##*/}
        ln -s "../${library#*/}" ".venv/ffmpeg/$name"
        if [[ $name =~ ^(lib(av|sw)[a-z]+)-[0-9a-f]+(\.so\.[0-9]+) ]]; then
            ln -s "$name" ".venv/ffmpeg/${BASH_REMATCH[1]}${BASH_REMATCH[3]}"
        fi
    done
}

main() {
    local file
    if [[ -e .venv/.unfinished ]] || ! .venv/bin/python -c '' 2>/dev/null; then make_venv; fi
    for file in "${files[@]}"; do
        is_installed "$file" || { install_requirements; break; }
    done
    [[ -d .venv/ffmpeg ]] || link_ffmpeg
}

# Concurrent runs (the demo and the tests) take turns, if the system has flock.
(if command -v flock >/dev/null; then flock 9; fi; main) 9<requirements.txt
