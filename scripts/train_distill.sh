#!/usr/bin/env bash
# Distils all that SAM3 says about a phrase into one slim student.
#   bash scripts/train_distill.sh DATA_PATH=data/sa1b TEACHER=sam3_checkpoints/sam3.pt PHASE=all GPUS=8
# Settings of any kind follow --opts; multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=train_distill.py
# shellcheck disable=SC2034
FLAGS="CFG:--config DATA_PATH:--data TEACHER:--teacher OUTPUT:--output PHASE:--phase RESUME:--resume"
: "${CFG=configs/distillation.yaml}" "${DATA_PATH=}" "${TEACHER=}" "${OUTPUT=}" "${PHASE=all}" "${RESUME=}"
: "${MASTER_PORT=29508}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
