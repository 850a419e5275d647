#!/usr/bin/env bash
# Step 2 of Stage 2: trains the compressed memory. Config keys follow as KEY VALUE pairs.
#   bash stage2/scripts/train_memory.sh CFG=stage2/configs/efficient_memory.yaml OUTPUT=output/stage2_memory GPUS=8 \
#     DATA.SAV_ROOT data/sa-v/extracted_frames TRAIN.BATCH_SIZE 4
# RESUME is a checkpoint to go on from; the newest in OUTPUT is found without it. An empty OUTPUT is the config's.
# Settings, multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage2/train_memory_stage2.py
# shellcheck disable=SC2034
FLAGS="CFG:--config OUTPUT:--output_dir RESUME:--resume"
: "${CFG=stage2/configs/efficient_memory.yaml}" "${OUTPUT=output/stage2_memory}" "${RESUME=}" "${MASTER_PORT=29504}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
