#!/usr/bin/env bash
# Makes .venv beside this repository and installs the package with everything that development and the quickstart need.
# A second run does nothing, unless setup.py or pyproject.toml or the interpreter has changed.
#
#   bash scripts/setup_env.sh
#   PYTHON=python3.12 bash scripts/setup_env.sh      interpreter for a new .venv; Python 3.10 or newer
#
# pip's own settings apply; a machine without a GPU saves some GB with PyTorch's CPU index in PIP_EXTRA_INDEX_URL.
# Works with bash 3.2 (macOS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than Python 3.10"
        return
    fi
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$PYTHON"; then return; fi
    done
    fail "found no Python 3.10 or newer; install one (https://www.python.org) or name it: PYTHON=/path/to/python3 bash $0"
}

# Changes with what is to be installed and with the interpreter of .venv.
fingerprint() {
    .venv/bin/python - <<'PY'
import hashlib, pathlib, sys

parts = [pathlib.Path(name).read_bytes() for name in ("setup.py", "pyproject.toml")]
print(hashlib.sha256(b"\0".join([sys.version.encode(), str(pathlib.Path.cwd()).encode(), *parts])).hexdigest())
PY
}

if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    new_enough .venv/bin/python || fail ".venv has a Python older than 3.10; remove the folder .venv and run this again"
else
    find_python
    say "making .venv with $("$PYTHON" --version 2>&1) ($PYTHON)"
    "$PYTHON" -m venv .venv ||
        fail "$PYTHON cannot make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv"
fi

stamp=.venv/efficientsam3.stamp
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
    say ".venv is up to date"
    exit 0
fi
say 'installing into .venv: pip install -e ".[dev]" (the first time takes minutes)'
{ .venv/bin/python -m pip install --quiet --upgrade pip && .venv/bin/python -m pip install -e ".[dev]"; } ||
    fail "the installation stopped; see the lines above, then run the same command again"
fingerprint >"$stamp.tmp"
mv "$stamp.tmp" "$stamp" # only a finished installation leaves the stamp
say ".venv is ready: source .venv/bin/activate"
