#!/usr/bin/env bash
# Step 3 of Stage 2: puts the trained memory into SAM3, or into a merged Stage-1 model.
#   bash stage2/scripts/convert_weights.sh STAGE2_WEIGHTS=output/stage2_memory/ckpt_best.pth \
#     SAM3_WEIGHTS=sam3_checkpoints/sam3.pt OUTPUT=output/efficient_sam3_memory.pt
# Settings: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=stage2/convert_memory_weights_stage2.py
# shellcheck disable=SC2034
FLAGS="STAGE2_WEIGHTS:--stage2_weights SAM3_WEIGHTS:--sam3_weights OUTPUT:--output_path"
: "${STAGE2_WEIGHTS=output/stage2_memory/ckpt_best.pth}" "${SAM3_WEIGHTS=sam3_checkpoints/sam3.pt}"
: "${OUTPUT=output/efficient_sam3_memory.pt}"
# shellcheck disable=SC2034  # read by launch.sh
LAUNCH_PLAIN=1
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
