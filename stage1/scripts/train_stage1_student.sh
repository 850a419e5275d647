#!/usr/bin/env bash
# Step 2 of Stage 1: trains a light encoder to give the embeddings that step 1 stored.
#   bash stage1/scripts/train_stage1_student.sh CFG=stage1/configs/es_rv_m.yaml DATA_PATH=data/sa-1b BATCH_SIZE=32 GPUS=8
# An empty OUTPUT is the config's. Settings, multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage1/train_stage1.py
# shellcheck disable=SC2034
FLAGS="CFG:--cfg DATA_PATH:--data-path OUTPUT:--output BATCH_SIZE:--batch-size"
: "${CFG=stage1/configs/es_rv_m.yaml}" "${DATA_PATH=data/sa-1b}" "${OUTPUT=}"
: "${BATCH_SIZE=}" "${MASTER_PORT=29502}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
