#!/usr/bin/env bash
# From nothing to a distilled model: installs into .venv, then runs Stage 1, geometry fine-tuning and the distillation of
# the whole model on sample photos and Stage 2 on sample videos with a tiny teacher, and ends with tables, pictures and a
# video. Needs Python 3.10 or newer; no GPU, no network but pip's, no weights.
#
#   bash scripts/quickstart.sh
#
# The teacher has random weights: this shows the mechanics, not SAM3's quality. Everything goes to output/quickstart,
# and a second run starts there anew (with the same data and teacher). EPOCHS=N, TUNE_EPOCHS=N, MEMORY_STEPS=N and
# OUT=folder change what they say.
# Works with bash 3.2 (macOS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-output/quickstart}
DATA=data/sample-sa1b
TEACHER=sam3_checkpoints/sam3_tiny.pt
EPOCHS=${EPOCHS:-40}
TUNE_EPOCHS=${TUNE_EPOCHS:-4}
MEMORY_STEPS=${MEMORY_STEPS:-120}
VIDEOS=data/sample-sav
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

step "12. sample videos in the SA-V layout" "$PYTHON" data/make_sample_sav.py --output "$VIDEOS"
step "13. their frames" "$PYTHON" data/extract_sav_frames.py \
    --source_dir "$VIDEOS/sav_train" --output_dir "$VIDEOS/extracted_frames"
step "14. the trunk's maps of the frames" bash stage2/scripts/save_embeddings.sh \
    DATA_DIR="$VIDEOS/extracted_frames" OUTPUT="$OUT/video_embeddings" CHECKPOINT="$TEACHER" GPUS=0 \
    --frame_stride 4 --num_workers 2
step "15. train a compressed memory ($MEMORY_STEPS steps)" bash stage2/scripts/train_memory.sh \
    CFG=stage2/configs/efficient_memory_tiny.yaml OUTPUT="$OUT/memory" GPUS=0 \
    DATA.SAV_ROOT "$VIDEOS/extracted_frames" DATA.EMBEDDING_DIR "$OUT/video_embeddings" TRAIN.MAX_STEPS "$MEMORY_STEPS"
step "16. put it into the teacher's checkpoint" bash stage2/scripts/convert_weights.sh \
    STAGE2_WEIGHTS="$OUT/memory/ckpt_latest.pth" SAM3_WEIGHTS="$TEACHER" OUTPUT="$OUT/efficient_sam3_memory.pt"
step "17. and into the tuned student's" bash stage2/scripts/convert_weights.sh \
    STAGE2_WEIGHTS="$OUT/memory/ckpt_latest.pth" SAM3_WEIGHTS="$OUT/efficient_sam3_ev_s_geometry.pt" \
    OUTPUT="$OUT/efficient_sam3_full.pt"
step "18. follow an object through a video" "$PYTHON" scripts/predict_video.py \
    --checkpoint "$OUT/efficient_sam3_full.pt" --video "$(ls "$VIDEOS"/sav_train/*.mp4 | head -n 1)" \
    --point 160 120 1 --output "$OUT/tracked.gif"
step "19. compare on held-out videos" "$PYTHON" stage2/evaluate_vos.py \
    --checkpoints "$TEACHER" "$OUT/efficient_sam3_memory.pt" "$OUT/efficient_sam3_full.pt" \
    --names teacher "memory" "student and memory" --data "$VIDEOS/sav_val" --output "$OUT/vos" --save-masks

step "20. distil all of the teacher, slim student" "$PYTHON" train_distill.py \
    --config configs/distillation_tiny.yaml --phase all --data "$DATA" --teacher "$TEACHER" \
    --output "$OUT/distillation" --opts log_dir="$OUT/distillation/logs"
step "21. segment a photo with it" "$PYTHON" scripts/predict.py \
    --checkpoint "$OUT/distillation/phase2/student_fp16.pt" --image "$(ls "$DATA"/images/val/*.jpg | head -n 1)" \
    --text "objects in the image" --threshold 0 --top-k 5 --output "$OUT/distilled_prediction.png"
step "22. the checks of this distillation" "$PYTHON" train_distill.py --verify \
    --config configs/distillation_tiny.yaml --data "$DATA" --teacher "$TEACHER" --output "$OUT/verify"

step "23. photos with masks, for prompts" "$PYTHON" data/make_sample_prompts.py --sa1b "$DATA" --output "$OUT/prompts"
step "24. two teachers of the SAM-1 family, random" "$PYTHON" scripts/make_tiny_sam1.py --output "$OUT/sam1"
step "25. distil both, prompt by prompt" bash scripts/train_prompt_distill.sh CFG=configs/prompt_tiny.yaml GPUS=0 \
    --opts dataset.train_dataset="$OUT/prompts/train" dataset.val_dataset="$OUT/prompts/val" \
    teachers.0.cfg="$OUT/sam1/vit_tiny.yaml" teachers.1.cfg="$OUT/sam1/mobile_sam.yaml" \
    model.checkpoint_path="$OUT/sam1/mobile_sam.pt" model.save_path="$OUT/prompt_distillation"

say "done in $SECONDS s"
printf '%s' "$times"
size() { du -sh "$1" | cut -f1; }
cat <<END

  teacher's embeddings   $OUT/teacher/embeddings ($(size "$OUT/teacher/embeddings"))
  training, curves       $OUT/es_ev_s, $OUT/geometry/es_ev_s, $OUT/memory (see them with .venv/bin/tensorboard --logdir $OUT)
  merged models          $OUT/efficient_sam3_ev_s.pt ($(size "$OUT/efficient_sam3_ev_s.pt"))
                         $OUT/efficient_sam3_ev_s_geometry.pt (tuned behind boxes and points)
                         $OUT/efficient_sam3_full.pt (with the compressed memory)
  slim student           $OUT/distillation/phase2/student_fp16.pt ($(size "$OUT/distillation/phase2/student_fp16.pt"))
  prompted student       $OUT/prompt_distillation/mobile_sam.pt ($(size "$OUT/prompt_distillation/mobile_sam.pt"))
  look at                $OUT/evaluation.png
                         $OUT/prediction.png, $OUT/distilled_prediction.png
                         $OUT/tracked.gif and $OUT/vos/overlays
END
