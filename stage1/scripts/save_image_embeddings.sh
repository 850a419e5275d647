#!/usr/bin/env bash
# The newer name of save_stage1_embeddings.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/save_stage1_embeddings.sh" "$@"
