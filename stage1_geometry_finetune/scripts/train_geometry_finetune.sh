#!/usr/bin/env bash
# Tunes a Stage-1 student through SAM3's frozen heads, with boxes and points as prompts.
#   bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh CFG=stage1_geometry_finetune/configs/es_rv_m.yaml \
#     DATA_PATH=data/sa-1b OUTPUT=output_geometry_finetune/es_rv_m BATCH_SIZE=4 GPUS=8
# An empty knob leaves it to the config. Settings, multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage1_geometry_finetune/train_geometry_finetune.py
# shellcheck disable=SC2034
FLAGS="CFG:--cfg DATA_PATH:--data-path OUTPUT:--output BATCH_SIZE:--batch-size PRETRAINED:--pretrained
  SAM3_CHECKPOINT:--sam3-checkpoint TEACHER_EMBED_PATH:--teacher-embed-path"
: "${CFG=stage1_geometry_finetune/configs/es_rv_m.yaml}" "${DATA_PATH=data/sa-1b}" "${OUTPUT=}" "${BATCH_SIZE=}"
: "${PRETRAINED=}" "${SAM3_CHECKPOINT=}" "${TEACHER_EMBED_PATH=}" "${MASTER_PORT=29503}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
