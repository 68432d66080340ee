#!/usr/bin/env bash
# The whole pipeline on a toy data set: makes demo videos, pre-trains on them with AdaMAE and, in parallel, with random
# masking, fine-tunes both models and one from scratch for the same number of steps, visualises the sampler, and puts
# all results on one page, index.html. An interrupted demo resumes when rerun.
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
export OMP_NUM_THREADS=1 # two programs run at a time, one core each

# float32, since a model this small is no faster in bfloat16 on most CPUs.
common=(
    --input_size 32 --pos_embed sinusoid_3d --num_frames 16 --sampling_rate 1 --amp off --decoder pyav
    --num_workers 1 --save_ckpt_freq 1 --seed "$SEED"
)
# A small AdaMAE: 19 of 128 tokens visible; 5 epochs of 250 steps of 8 videos x 2 clips.
pretrain=(
    $PYTHON run_mae_pretraining.py "${common[@]}" --model pretrain_videomae_tiny_patch8_64 --decoder_depth 2
    --mask_ratio 0.85 --batch_size 8 --num_sample 2 --epochs 5 --warmup_steps 160 --lr 0.032 --min_lr 0.0016
    --warmup_epochs 1 --opt_betas 0.9 0.95 --vis_freq 2 --log_freq 50 --data_path "$OUT/videos/train.csv"
)
# 2 epochs of 125 steps of 16 clips, at a learning rate of 0.003, halved with every layer down; the crop is the only
# augmentation, since the motion is the label. The test uses three crops per video.
finetune=(
    $PYTHON run_class_finetuning.py "${common[@]}" --model vit_tiny_patch8_64 --slot_pooling --init_scale 1
    --drop_path 0 --batch_size 16 --num_sample 1 --epochs 2 --warmup_steps 40 --lr 0.048 --min_lr 0.00048
    --layer_decay 0.5 --crop_scale 0.5 1 --flip false --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0
    --smoothing 0 --log_freq 25 --data_path "$OUT/videos" --data_set custom --nb_classes 10
    --labels "$OUT/videos/labels.txt" --short_side_size 36 --test_num_segment 1 --test_num_crop 3
)

# Two lanes, one core each. The second one runs in the background, with output in random.log.
second_lane() {
    trap 'kill $child; wait $child; exit 143' TERM
    run "${pretrain[@]}" --mask_type random --output_dir "$OUT/random"
    run "${finetune[@]}" --finetune "$OUT/random/checkpoint-4.pth" --output_dir "$OUT/finetuned_random"
    run "${finetune[@]}" --output_dir "$OUT/finetuned_scratch"
}
run() { # runs a command so that a signal to the lane arrives at once
    "$@" &
    child=$!
    wait $child
}
join() { wait $lane || { tail "$OUT/random.log" >&2; exit 1; }; }
trap 'kill ${lane:-} 2>/dev/null || true' EXIT # Ctrl-C stops both

echo "demo 1/5: making videos of ten motion classes"
$PYTHON tools/make_demo_videos.py --output "$OUT/videos" --num_test 400 --seed "$SEED"

echo "demo 2/5: pre-training with adaptive masking; in parallel with random masking, and fine-tuning from that and" \
    "from scratch (log: $OUT/random.log)"
second_lane >"$OUT/random.log" 2>&1 &
lane=$!
"${pretrain[@]}" --mask_type adaptive --output_dir "$OUT/adaptive"

echo "demo 3/5: fine-tuning from AdaMAE"
"${finetune[@]}" --finetune "$OUT/adaptive/checkpoint-4.pth" --output_dir "$OUT/finetuned_adaptive"

echo "demo 4/5: pictures and pre-training report"
$PYTHON tools/visualize.py --model "$OUT/adaptive/checkpoint-4.pth" --list "$OUT/videos/test.csv" \
    --labels "$OUT/videos/labels.txt" --num_clips 4 --compare_masks --output "$OUT/pictures"
while [[ ! -e $OUT/random/checkpoint-4.pth ]]; do # commonly there long since
    kill -0 $lane 2>/dev/null || join
    sleep 1
done
$PYTHON tools/demo_report.py --data "$OUT/videos/test.csv" --output "$OUT" \
    --models "adaptive=$OUT/adaptive" "random=$OUT/random"
join

echo "demo 5/5: comparing the fine-tuned models"
$PYTHON tools/demo_table.py --output "$OUT" --runs "from AdaMAE=$OUT/finetuned_adaptive" \
    "from random masking=$OUT/finetuned_random" "from scratch=$OUT/finetuned_scratch"
$PYTHON tools/report_page.py --title "The demo: AdaMAE on ten motions" "$OUT" "$OUT"/{adaptive,random} \
    "$OUT"/finetuned_{adaptive,random,scratch}
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; open $OUT/index.html in a browser"
