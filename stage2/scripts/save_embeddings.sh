#!/usr/bin/env bash
# Step 1 of Stage 2: one pass of the trunk over the frames of all videos, its outputs written to OUTPUT.
#   bash stage2/scripts/save_embeddings.sh DATA_DIR=data/sa-v/extracted_frames OUTPUT=output/stage2_embeddings GPUS=8
# An empty CHECKPOINT is the program's own. Settings, multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage2/save_video_embeddings_stage2.py
# shellcheck disable=SC2034
FLAGS="DATA_DIR:--data_dir OUTPUT:--output_dir BATCH_SIZE:--batch_size CHECKPOINT:--checkpoint"
: "${DATA_DIR=data/sa-v/extracted_frames}" "${OUTPUT=output/stage2_embeddings}" "${BATCH_SIZE=8}" "${CHECKPOINT=}"
: "${GPUS=1}" "${MASTER_PORT=29500}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
