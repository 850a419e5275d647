#!/usr/bin/env bash
# Step 1 of Stage 1: one pass of SAM3's image encoder over the pictures, its outputs written to <OUTPUT>/embeddings.
#   bash stage1/scripts/save_stage1_embeddings.sh DATA_PATH=data/sa-1b OUTPUT=output/stage1_teacher BATCH_SIZE=32 GPUS=8
# Settings, multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage1/save_embedding_stage1.py
# shellcheck disable=SC2034
FLAGS="CFG:--cfg DATA_PATH:--data-path OUTPUT:--output BATCH_SIZE:--batch-size"
: "${CFG=stage1/configs/teacher/sam_vit_huge_sa1b.yaml}" "${DATA_PATH=data/sa-1b}" "${OUTPUT=output/stage1_teacher}"
: "${BATCH_SIZE=}" "${MASTER_PORT=29501}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
