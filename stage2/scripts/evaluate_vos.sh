#!/usr/bin/env bash
# J and F of models on annotated videos, which the processes share.
#   bash stage2/scripts/evaluate_vos.sh DATA_PATH=data/sa-v/sav_val OUTPUT=output/vos GPUS=8 --checkpoints a.pt b.pt
# All else, such as --names and --untrained, is passed on. Multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage2/evaluate_vos.py
# shellcheck disable=SC2034
FLAGS="DATA_PATH:--data OUTPUT:--output"
: "${DATA_PATH=}" "${OUTPUT=}" "${MASTER_PORT=29509}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
