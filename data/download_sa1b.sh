#!/usr/bin/env bash
# Downloads archives of SA-1B, resumably. Accept the licence at
# https://ai.meta.com/datasets/segment-anything-downloads/ and save the list of links it gives as links.txt. Then:
#
#   LINKS=links.txt bash data/download_sa1b.sh                 the 10 archives of the 1% subset, about 110 GB
#   LINKS=links.txt SUBSET=10p bash data/download_sa1b.sh      the 100 archives of the 10% subset, about 1.1 TB
#
# LINKS   your list of links (file_name<TAB>cdn_link)
# SUBSET  1p (default) or 10p: the names in data/sa-1b-$SUBSET.txt
# OUTPUT  data/sa-1b-$SUBSET
# JOBS    4 downloads at a time
# PYTHON  .venv/bin/python (made by scripts/setup_env.sh), else python3
#
# Each is set in the environment or given as KEY=VALUE; other arguments go to data/download_files.py (--dry-run, --help).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

count=$#
while [ "$count" -gt 0 ]; do
    argument="$1"
    shift
    count=$((count - 1))
    case "$argument" in
        LINKS=*) LINKS="${argument#*=}" ;;
        SUBSET=*) SUBSET="${argument#*=}" ;;
        OUTPUT=*) OUTPUT="${argument#*=}" ;;
        JOBS=*) JOBS="${argument#*=}" ;;
        PYTHON=*) PYTHON="${argument#*=}" ;;
        -*) set -- "$@" "$argument" ;;
        *=*)
            echo "error: unknown setting '${argument%%=*}'; known: LINKS SUBSET OUTPUT JOBS PYTHON" >&2
            exit 2
            ;;
        *) set -- "$@" "$argument" ;;
    esac
done

SUBSET="${SUBSET:-1p}"
if [ ! -f "$root/data/sa-1b-$SUBSET.txt" ]; then
    echo "error: SUBSET=$SUBSET is not known; wanted 1p or 10p" >&2
    exit 2
fi
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
exec "$PYTHON" "$root/data/download_files.py" --links "${LINKS:-links.txt}" --names "$root/data/sa-1b-$SUBSET.txt" \
    --output "${OUTPUT:-data/sa-1b-$SUBSET}" --jobs "${JOBS:-4}" "$@"
