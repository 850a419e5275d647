#!/usr/bin/env bash
# Downloads the archives of SA-V, resumably. Accept the licence at
# https://ai.meta.com/datasets/segment-anything-video-downloads/ and save the list of links it gives as links.txt. Then:
#
#   LINKS=links.txt bash data/download_sa_v.sh                 56 archives of training videos, one of val, one of test
#   LINKS=links.txt NAMES=mine.txt bash data/download_sa_v.sh  only the archives named in mine.txt, one a line
#
# LINKS   your list of links (file_name<TAB>cdn_link)
# NAMES   data/sa-v.txt
# OUTPUT  data/sa-v
# JOBS    4 downloads at a time
# PYTHON  .venv/bin/python (made by scripts/setup_env.sh), else python3
#
# Each is set in the environment or given as KEY=VALUE; other arguments go to data/download_files.py (--dry-run, --help).
# The next step reads the archives of training videos in place: python data/extract_sav_frames.py --source_dir data/sa-v
# The other two hold pictures: tar -xf data/sa-v/sav_val.tar -C data/sa-v
KNOWN="LINKS NAMES OUTPUT JOBS PYTHON"
# shellcheck source=data/download_settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/download_settings.sh"

exec "$PYTHON" "$root/data/download_files.py" --links "${LINKS:-links.txt}" --names "${NAMES:-$root/data/sa-v.txt}" \
    --output "${OUTPUT:-data/sa-v}" --jobs "${JOBS:-4}" "$@"
