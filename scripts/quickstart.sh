#!/usr/bin/env bash
# From nothing to a distilled model: installs into .venv, then runs Stage 1 and geometry fine-tuning on sample photos with
# a tiny teacher, and ends with a table and a picture. Needs Python 3.10 or newer; no GPU, no network but pip's, no weights.
#
#   bash scripts/quickstart.sh
#
# The teacher has random weights: this shows the mechanics, not SAM3's quality. Everything goes to output/quickstart,
# and a second run starts there anew (with the same data and teacher). EPOCHS=N, TUNE_EPOCHS=N and OUT=folder change what
# they say.
# Works with bash 3.2 (macOS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-output/quickstart}
DATA=data/sample-sa1b
TEACHER=sam3_checkpoints/sam3_tiny.pt
EPOCHS=${EPOCHS:-40}
TUNE_EPOCHS=${TUNE_EPOCHS:-4}
times=""
# With fewer free cores than threads, spinning threads would slow each other down several times over.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

say() { printf '\n[quickstart] %s\n' "$*"; }
# Names the step, runs it, and keeps its time for the end.
step() {
    local title="$1" start=$SECONDS
    shift
    say "$title"
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
    times="$times$(printf '  %-46s %4d s' "$title" $((SECONDS - start)))
"
}

step "1. install" bash scripts/setup_env.sh
PYTHON=.venv/bin/python
rm -rf "$OUT"
step "2. sample photos in the SA-1B layout" "$PYTHON" data/make_sample_sa1b.py --output "$DATA"
step "3. a tiny teacher in the layout of sam3.pt" "$PYTHON" scripts/make_tiny_sam3.py --output "$TEACHER"
step "4. the teacher's embeddings" bash stage1/scripts/save_stage1_embeddings.sh \
    CFG=stage1/configs/teacher/sam3_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/teacher" GPUS=0
step "5. check the store" bash stage1/scripts/save_stage1_embeddings.sh \
    CFG=stage1/configs/teacher/sam3_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/teacher" GPUS=0 --verify-store
step "6. train a student ($EPOCHS epochs)" bash stage1/scripts/train_stage1_student.sh \
    CFG=stage1/configs/es_ev_s_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/es_ev_s" GPUS=0 \
    --opts DISTILL.TEACHER_EMBED_PATH "$OUT/teacher/embeddings" TRAIN.EPOCHS "$EPOCHS" SAVE_FREQ "$EPOCHS"
step "7. merge it into the teacher's checkpoint" "$PYTHON" stage1/convert_stage1_weights.py \
    --student-ckpt "$OUT/es_ev_s/ckpt_epoch_$((EPOCHS - 1)).pth" --sam3-ckpt "$TEACHER" \
    --output "$OUT/efficient_sam3_ev_s.pt"
step "8. tune it behind boxes and points ($TUNE_EPOCHS epochs)" \
    bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh \
    CFG=stage1_geometry_finetune/configs/es_ev_s_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/geometry/es_ev_s" GPUS=0 \
    PRETRAINED="$OUT/efficient_sam3_ev_s.pt" SAM3_CHECKPOINT="$TEACHER" TEACHER_EMBED_PATH="$OUT/teacher/embeddings" \
    --opts TRAIN.EPOCHS "$TUNE_EPOCHS" SAVE_FREQ "$TUNE_EPOCHS"
step "9. put the tuned weights into the merged model" "$PYTHON" stage1_geometry_finetune/convert_geometry_finetune.py \
    --finetune-ckpt "$OUT/geometry/es_ev_s/ckpt_epoch_$((TUNE_EPOCHS - 1)).pth" \
    --pretrained "$OUT/efficient_sam3_ev_s.pt" --output "$OUT/efficient_sam3_ev_s_geometry.pt"
step "10. segment a photo with the tuned model" "$PYTHON" scripts/predict.py \
    --checkpoint "$OUT/efficient_sam3_ev_s_geometry.pt" --image "$(ls "$DATA"/images/val/*.jpg | head -n 1)" \
    --text "a photo" --top-k 5 --output "$OUT/prediction.png"
step "11. compare with the teacher on held-out photos" "$PYTHON" scripts/evaluate_student.py \
    --teacher "$TEACHER" --students "$OUT/efficient_sam3_ev_s.pt" "$OUT/efficient_sam3_ev_s_geometry.pt" \
    --names ES-EV-S "ES-EV-S, geometry" --untrained --data-path "$DATA" --output "$OUT"

say "done in $SECONDS s"
printf '%s' "$times"
size() { du -sh "$1" | cut -f1; }
cat <<END

  teacher's embeddings   $OUT/teacher/embeddings ($(size "$OUT/teacher/embeddings"))
  training, curves       $OUT/es_ev_s and $OUT/geometry/es_ev_s (see them with .venv/bin/tensorboard --logdir $OUT)
  merged models          $OUT/efficient_sam3_ev_s.pt ($(size "$OUT/efficient_sam3_ev_s.pt"))
                         $OUT/efficient_sam3_ev_s_geometry.pt (tuned behind boxes and points)
  look at                $OUT/evaluation.png
                         $OUT/prediction.png
END
