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
KNOWN="LINKS SUBSET OUTPUT JOBS PYTHON"
# shellcheck source=data/download_settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/download_settings.sh"

SUBSET="${SUBSET:-1p}"
if [ ! -f "$root/data/sa-1b-$SUBSET.txt" ]; then
    echo "error: SUBSET=$SUBSET is not known; wanted 1p or 10p" >&2
    exit 2
fi
exec "$PYTHON" "$root/data/download_files.py" --links "${LINKS:-links.txt}" --names "$root/data/sa-1b-$SUBSET.txt" \
    --output "${OUTPUT:-data/sa-1b-$SUBSET}" --jobs "${JOBS:-4}" "$@"
