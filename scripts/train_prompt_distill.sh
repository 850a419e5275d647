#!/usr/bin/env bash
# Fine-tunes MobileSAM on prompts, with teachers of the SAM-1 family.
#   bash scripts/train_prompt_distill.sh CFG=configs/prompt_box.yaml GPUS=8 --opts dataset.train_dataset=data/photos/train
# Settings of any kind follow --opts; multi-node and CPU: see scripts/launch.sh.
# shellcheck disable=SC2034  # read by launch.sh
SCRIPT=scripts/train_prompt_distill.py
# shellcheck disable=SC2034
FLAGS="CFG:--config RESUME:--resume"
: "${CFG=configs/prompt_mixed.yaml}" "${RESUME=}" "${MASTER_PORT=29507}"
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
