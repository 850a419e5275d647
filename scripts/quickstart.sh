#!/usr/bin/env bash
# From nothing to light models: installs into .venv, then runs Stage 1, geometry fine-tuning, Stage 2 and distillation of
# the whole model behind the small SAM3 of this repository, on generated scenes of named objects, and ends with one table
# and one page with pictures and curves. Needs Python 3.10 or newer; no GPU, no network but pip's.
#
#   bash scripts/quickstart.sh
#
# Everything goes to output/quickstart (OUT=folder), scenes to data/scenes (DATA=folder) and clips to data/scene-videos
# (VIDEOS=folder); a second run starts anew, with the same data. Lengths: EPOCHS=N of Stage 1, TUNE_EPOCHS=N,
# MEMORY_STEPS=N, DISTILL_EPOCHS=N of phase 1. Sizes, for folders of their own: SCENES=N and VAL_SCENES=N to train on and
# to judge by, CLIPS=N and VAL_CLIPS=N.
# Works with bash 3.2 (macOS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-output/quickstart}
DATA=${DATA:-data/scenes}
VIDEOS=${VIDEOS:-data/scene-videos}
TEACHER=sam3_checkpoints/sam3_tiny.safetensors
SCENES=${SCENES:-440} VAL_SCENES=${VAL_SCENES:-40}
CLIPS=${CLIPS:-32} VAL_CLIPS=${VAL_CLIPS:-6}
EPOCHS=${EPOCHS:-7} TUNE_EPOCHS=${TUNE_EPOCHS:-1} MEMORY_STEPS=${MEMORY_STEPS:-320} DISTILL_EPOCHS=${DISTILL_EPOCHS:-2}
STUDENT="$OUT/efficient_sam3_ev_s.pt" TUNED="$OUT/efficient_sam3_ev_s_geometry.pt"
MEMORY="$OUT/efficient_sam3_memory.pt" FULL="$OUT/efficient_sam3_full.pt"
SLIM="$OUT/distillation/phase2/student_fp16.pt"
PAIR=(GPUS=2 DEVICE=cpu MASTER_PORT=0)
number=0
# With fewer free cores than threads, spinning threads would slow each other down several times over.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # models as small as these gain from a second process, not from a thread

# Names the step, runs it, and keeps its time and command for the page.
step() {
    local title="$1" start=$SECONDS command
    shift
    number=$((number + 1))
    printf '\n[quickstart] %d. %s\n' "$number" "$title"
    command=$(printf ' %q' "$@")
    printf '+%s\n' "$command"
    "$@"
    mkdir -p "$OUT"
    printf '%s\t%d\t%s\n' "$number. $title" $((SECONDS - start)) "$command" >>"$OUT/steps.tsv"
}

if [ -e "$OUT" ] && [ ! -f "$OUT/steps.tsv" ]; then
    echo "error: $OUT is there and is no quickstart's; name another folder by OUT=folder, or remove it" >&2
    exit 1
fi
rm -rf "$OUT"
step "install" bash scripts/setup_env.sh
PYTHON=.venv/bin/python
step "scenes of named objects, in the layout of SA-1B" "$PYTHON" data/make_sample_sa1b.py --scenes \
    --num-train "$SCENES" --num-val "$VAL_SCENES" --output "$DATA"
step "Stage 1: the teacher's embeddings" bash stage1/scripts/save_stage1_embeddings.sh \
    CFG=stage1/configs/teacher/sam3_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/teacher" GPUS=0
step "Stage 1: train a student ($EPOCHS epochs)" bash stage1/scripts/train_stage1_student.sh \
    CFG=stage1/configs/es_ev_s_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/es_ev_s" "${PAIR[@]}" BATCH_SIZE=2 \
    --opts DISTILL.TEACHER_EMBED_PATH "$OUT/teacher/embeddings" TRAIN.EPOCHS "$EPOCHS" SAVE_FREQ "$EPOCHS"
step "Stage 1: put it into the teacher's place" "$PYTHON" stage1/convert_stage1_weights.py \
    --student-ckpt "$OUT/es_ev_s/ckpt_epoch_$((EPOCHS - 1)).pth" --sam3-ckpt "$TEACHER" --output "$STUDENT"
step "geometry: tune it behind boxes and points ($TUNE_EPOCHS epochs)" \
    bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh \
    CFG=stage1_geometry_finetune/configs/es_ev_s_tiny.yaml DATA_PATH="$DATA" OUTPUT="$OUT/geometry" \
    "${PAIR[@]}" BATCH_SIZE=2 \
    PRETRAINED="$STUDENT" SAM3_CHECKPOINT="$TEACHER" TEACHER_EMBED_PATH="$OUT/teacher/embeddings" \
    --opts TRAIN.EPOCHS "$TUNE_EPOCHS" SAVE_FREQ "$TUNE_EPOCHS"
step "geometry: put it into the merged model" "$PYTHON" stage1_geometry_finetune/convert_geometry_finetune.py \
    --finetune-ckpt "$OUT/geometry/ckpt_epoch_$((TUNE_EPOCHS - 1)).pth" --pretrained "$STUDENT" --output "$TUNED"
step "clips of named objects, in the layout of SA-V" "$PYTHON" data/make_sample_sav.py --scenes \
    --num-train "$CLIPS" --num-val "$VAL_CLIPS" --num-frames 24 --output "$VIDEOS"
step "their frames" "$PYTHON" data/extract_sav_frames.py \
    --source_dir "$VIDEOS/sav_train" --output_dir "$VIDEOS/extracted_frames"
step "Stage 2: the trunk's maps of the frames" bash stage2/scripts/save_embeddings.sh \
    DATA_DIR="$VIDEOS/extracted_frames" OUTPUT="$OUT/video_embeddings" CHECKPOINT="$TEACHER" GPUS=0 \
    --frame_stride 4 --num_workers 2
step "Stage 2: train a compressed memory ($MEMORY_STEPS steps)" bash stage2/scripts/train_memory.sh \
    CFG=stage2/configs/efficient_memory_tiny.yaml OUTPUT="$OUT/memory" "${PAIR[@]}" \
    DATA.BATCH_SIZE 1 DATA.SAV_ROOT "$VIDEOS/extracted_frames" DATA.EMBEDDING_DIR "$OUT/video_embeddings" \
    TRAIN.MAX_STEPS "$MEMORY_STEPS"
step "Stage 2: put it into the teacher" bash stage2/scripts/convert_weights.sh \
    STAGE2_WEIGHTS="$OUT/memory/ckpt_latest.pth" SAM3_WEIGHTS="$TEACHER" OUTPUT="$MEMORY"
step "Stage 2: put it into the tuned student" bash stage2/scripts/convert_weights.sh \
    STAGE2_WEIGHTS="$OUT/memory/ckpt_latest.pth" SAM3_WEIGHTS="$TUNED" OUTPUT="$FULL"
step "distil the whole model ($DISTILL_EPOCHS epochs, then 1)" bash scripts/train_distill.sh \
    CFG=configs/distillation_tiny.yaml DATA_PATH="$DATA" TEACHER="$TEACHER" OUTPUT="$OUT/distillation" "${PAIR[@]}" \
    --opts batch_size=2 log_dir="$OUT/distillation/logs" num_val="$VAL_SCENES" phase1_epochs="$DISTILL_EPOCHS"
step "compare on held-out scenes" "$PYTHON" scripts/evaluate_prompts.py \
    --models "$TEACHER" "$STUDENT" "$TUNED" "$SLIM" --names teacher "Stage 1" "Stage 1 + geometry" distilled \
    --untrained --num-images "$VAL_SCENES" --data-path "$DATA" --output "$OUT/prompts"
step "compare on held-out clips" bash stage2/scripts/evaluate_vos.sh \
    DATA_PATH="$VIDEOS/sav_val" OUTPUT="$OUT/vos" "${PAIR[@]}" \
    --checkpoints "$TEACHER" "$STUDENT" "$TUNED" "$MEMORY" "$FULL" \
    --names teacher "Stage 1" "Stage 1 + geometry" "teacher, memory" "student, memory" \
    --untrained --overlays 1 --overlay-format gif
picture=$(basename "$(find "$DATA/images/val" -name '*.jpg' | sort | head -n 1)" .jpg)
phrase=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["phrases"][0]["text"])' \
    "$DATA/annotations/val/$picture.json")
step "find objects by a phrase" "$PYTHON" scripts/predict.py \
    --checkpoint "$TUNED" --image "$DATA/images/val/$picture.jpg" --text "$phrase" --output "$OUT/prediction.png"
printf '\n[quickstart] done in %d s, of which the steps took\n' "$SECONDS"
awk -F '\t' '{ printf "  %-58s %4d s\n", $1, $2 }' "$OUT/steps.tsv"
echo
"$PYTHON" scripts/make_report.py --input "$OUT" --output "$OUT/report.html"
cat <<END

  look at          $OUT/report.html, $OUT/prompts/prompts.png, $OUT/prediction.png, $OUT/vos/overlays
  merged models    $STUDENT, $TUNED (students)
                   $MEMORY, $FULL (with a compressed memory)
  slim student     $SLIM
  curves           .venv/bin/tensorboard --logdir $OUT
END
