# shellcheck shell=bash
# Shared by the download launchers of this folder. A launcher states the settings it knows and sources this, with its
# own arguments in place:
#
#   KNOWN="LINKS OUTPUT JOBS PYTHON"
#   . "$(dirname "${BASH_SOURCE[0]}")/download_settings.sh"
#
# Takes KEY=VALUE arguments into variables, leaves the others as "$@", finds an interpreter that has this project's
# packages, and sets root. Works with bash 3.2 (macOS).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

count=$#
while [ "$count" -gt 0 ]; do
    argument="$1"
    shift
    count=$((count - 1))
    key="${argument%%=*}"
    case "$argument" in
        -*) set -- "$@" "$argument" ;;
        *=*)
            case " $KNOWN " in
                *" $key "*) printf -v "$key" '%s' "${argument#*=}" ;;
                *)
                    echo "error: unknown setting '$key'; known: $KNOWN" >&2
                    exit 2
                    ;;
            esac
            ;;
        *) set -- "$@" "$argument" ;;
    esac
done

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi
installed='import importlib.util, sys; sys.exit(sys.version_info < (3, 10) or importlib.util.find_spec("torch") is None)'
if ! "$PYTHON" -c "$installed" 2>/dev/null; then
    echo "error: $PYTHON is older than Python 3.10 or lacks this project's packages; run: bash scripts/setup_env.sh" >&2
    exit 1
fi
export PYTHONPATH="$root/sam3${PYTHONPATH:+:$PYTHONPATH}"
