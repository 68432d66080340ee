#!/usr/bin/env bash
# The main job on an embedded default: makes demo videos, pre-trains AdaMAE on them, draws what it does, and judges it
# beside the same steps with random masking. Stopping it and starting it again goes on where it was.
#
#   bash scripts/demo.sh
#   SEED=1 OUTPUT_DIR=output/demo-1 bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/env.sh runtime
PYTHON=.venv/bin/python
OUT=${OUTPUT_DIR:-output/demo}
SEED=${SEED:-0}
SECONDS=0

# A small AdaMAE: 128 tokens, of which 19 are visible; 6 epochs of 250 steps of 8 videos x 2 clips. Float32, because so
# small a model is no faster in bfloat16 on a CPU.
recipe=(
    --model pretrain_videomae_tiny_patch8_64 --input_size 32 --decoder_depth 2 --pos_embed sinusoid_3d
    --mask_ratio 0.85 --num_frames 16 --sampling_rate 1 --batch_size 8 --num_sample 2 --epochs 6 --warmup_steps 160
    --lr 0.032 --min_lr 0.0016 --warmup_epochs 1 --opt_betas 0.9 0.95 --amp off --decoder pyav --num_workers 1
    --save_ckpt_freq 1 --vis_freq 2 --log_freq 50 --seed "$SEED"
)
pretrain() { # pretrain MASKING: one thread each, so that the two runs share two cores in peace
    OMP_NUM_THREADS=1 $PYTHON run_mae_pretraining.py "${recipe[@]}" --mask_type "$1" \
        --data_path "$OUT/videos/train.csv" --output_dir "$OUT/$1"
}

echo "demo 1/4: videos of ten motions"
$PYTHON tools/make_demo_videos.py --output "$OUT/videos" --seed "$SEED"

echo "demo 2/4: pre-training with adaptive masking; beside it with random masking (its output: $OUT/random.log)"
pretrain random >"$OUT/random.log" 2>&1 &
random=$!
trap 'kill $random 2>/dev/null || true' EXIT # Ctrl-C stops both
pretrain adaptive
wait $random || { tail "$OUT/random.log" >&2; exit 1; }
trap - EXIT

echo "demo 3/4: the pictures"
$PYTHON tools/visualize.py --model "$OUT/adaptive/checkpoint-5.pth" --list "$OUT/videos/test.csv" \
    --num_clips 6 --compare_masks --output "$OUT/pictures"

echo "demo 4/4: the report, on held-out videos"
$PYTHON tools/demo_report.py --data "$OUT/videos/test.csv" --output "$OUT" \
    --models "adaptive=$OUT/adaptive" "random=$OUT/random"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: look at $OUT/report.png and $OUT/pictures/"
