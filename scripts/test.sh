#!/usr/bin/env bash
# Checks everything: environment, lint, format, tests. The exit code is 0 only if all of them pass.
#
#   bash scripts/test.sh                              all tests, slow ones too
#   bash scripts/test.sh -m "not slow"                arguments go to pytest in place of the default
#   bash scripts/test.sh tests/data -k download -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh
failed=""
step() { # name, command...
    local name="$1"
    shift
    printf '[test] %s: %s\n' "$name" "$*"
    "$@" || failed="$failed${failed:+, }$name"
}
if [ $# -eq 0 ]; then set -- tests; fi
# Two processes share the tests and the cores; those at full size, of several GiB each, all go to one of them.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
step lint .venv/bin/ruff check .
step format .venv/bin/ruff format --check .
step pytest .venv/bin/python -m pytest --numprocesses 2 --dist loadscope "$@"
if [ -n "$failed" ]; then
    printf '[test] failed: %s\n' "$failed" >&2
    exit 1
fi
echo "[test] all passed"
