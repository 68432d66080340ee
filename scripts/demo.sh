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

# A small AdaMAE: 128 tokens, of which 19 are visible; 13 epochs of 125 steps of 16 clips. Float32, because so small a
# model is no faster in bfloat16 on a CPU.
recipe=(
    --model pretrain_videomae_tiny_patch8_64 --input_size 32 --decoder_depth 2 --pos_embed sinusoid_3d
    --mask_ratio 0.85 --num_frames 16 --sampling_rate 1 --batch_size 16 --epochs 13 --warmup_epochs 1
    --lr 0.016 --min_lr 0.0008 --opt_betas 0.9 0.95 --amp off --num_workers 2
    --save_ckpt_freq 1 --vis_freq 4 --log_freq 25 --seed "$SEED"
)

echo "demo 1/4: the videos"
$PYTHON tools/make_demo_videos.py --output "$OUT/videos" --seed "$SEED"
for mask in adaptive random; do
    echo "demo 2/4: pre-training with $mask masking"
    $PYTHON run_mae_pretraining.py "${recipe[@]}" --mask_type $mask \
        --data_path "$OUT/videos/train.csv" --output_dir "$OUT/$mask"
done

echo "demo 3/4: the pictures"
$PYTHON tools/visualize.py --model "$OUT/adaptive/checkpoint-12.pth" --list "$OUT/videos/test.csv" \
    --num_clips 6 --compare_masks --output "$OUT/pictures"

echo "demo 4/4: the report, on held-out videos"
$PYTHON tools/demo_report.py --data "$OUT/videos/test.csv" --models "adaptive=$OUT/adaptive" "random=$OUT/random" \
    --output "$OUT"
echo "done: look at $OUT/report.png and $OUT/pictures/"
